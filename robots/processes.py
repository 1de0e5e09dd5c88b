"""Child processes that end with their parent, however it ends, and say when they are ready."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from robots.errors import ConnectFailed

PR_SET_PDEATHSIG = 1
STOP_WITHIN_S = 5.0


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    Works on a stopped or stuck process too, where noticing a closed pipe does not.

    Args:
        parent: Its process id, for the case that it has ended already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent process has ended")


def say(**facts: Any) -> None:
    """Tell the parent, who waits in ``Child``: that we are ready, or the ``error``."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


class Child:
    """``python -m module arguments…``, ready when it has said so.

    Args:
        module: Calls ``die_with_parent`` and ``say``, and ends when its stdin does.
        arguments: Its command line.
        pass_fds: Descriptors that it inherits.
        start_within_s: How long it may take.

    Attributes:
        said: What it told when it was ready.

    Raises:
        ConnectFailed: It ended or said an error instead, or took too long; carries the reason.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        pass_fds: Iterable[int] = (),
        start_within_s: float = 60.0,
    ) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(pass_fds),
        )
        try:
            self.said = self._read_ready(time.monotonic() + start_within_s)
        except BaseException:
            self._process.kill()
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    def _read_ready(self, deadline_s: float) -> Mapping[str, Any]:
        pipe = self._process.stdout
        if pipe is None:
            raise ConnectFailed(f"{self._module}: no pipe to it")
        line = b""
        while not line.endswith(b"\n"):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
                raise ConnectFailed(f"{self._module}: not ready in time")
            part = os.read(pipe.fileno(), 65536)
            if not part:
                raise ConnectFailed(f"{self._module}: ended with status {self._process.wait()}")
            line += part
        said: Mapping[str, Any] = json.loads(line)
        if "error" in said:
            raise ConnectFailed(f"{self._module}: {said['error']}")
        return said

    def close(self) -> None:
        """Stop it; kill it if it does not. Idempotent."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
