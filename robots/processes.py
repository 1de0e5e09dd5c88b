"""Child processes that end with their parent, however it ends, and say when they are ready.

A child speaks to its parent through its standard output and hears of the parent's end through its
standard input. Code that is not ours may print, and may wait for somebody to press Enter: a child
that runs such code calls ``isolate`` first.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from robots import errors
from robots.errors import ConnectFailed

PR_SET_PDEATHSIG = 1
STOP_WITHIN_S = 5.0
KEPT_TEXT = 2000
"""Bytes of what was printed last that are kept for an error."""
TIMED_OUT = 3
"""Exit status of a child that code which is not ours kept waiting for too long."""


class _Output:
    """Where the parent listens."""

    fd = 1


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
    """Tell the parent, who waits in ``Child``: that we are ready, or the ``error``.

    ``kind``, a class of ``robots.errors``, says what is raised there for an ``error``.
    """
    write_line(json.dumps(facts))


def write_line(line: str) -> None:
    """One line to the parent, past whatever ``isolate`` keeps from it."""
    data = line.encode() + b"\n"
    while data:
        data = data[os.write(_Output.fd, data) :]


def take_stdin() -> int:
    """Standard input under another number; whoever reads the old one is at its end at once."""
    kept = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return kept


class Isolation:
    """The parent's two pipes, out of reach of code that is not ours; see ``isolate``.

    Attributes:
        input_fd: What was standard input: ends with the parent.
    """

    def __init__(self) -> None:
        self.input_fd = take_stdin()
        _Output.fd = os.dup(_Output.fd)
        self._source, sink = os.pipe()
        os.dup2(sink, 1)
        os.close(sink)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (as long as the process)
        sys.stdout = open(1, "w", buffering=1, errors="replace", closefd=False)  # noqa: SIM115
        self._text = b""
        self._lock = threading.Lock()
        threading.Thread(target=self._pass_on, name="what is printed", daemon=True).start()

    def printed(self) -> str:
        """The last line that was printed and is not empty."""
        sys.stdout.flush()
        self._take()
        lines = self._text.decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def explain(self, error: BaseException) -> str:
        """``error`` in one line, with what was printed last where that says more.

        Code that asks gets ``EOFError`` at once; its question was printed before.
        """
        said = " ".join(str(error).split())
        if isinstance(error, EOFError):
            return f"it asked {self._quoted()}, and nobody can answer here"
        return f"{type(error).__name__}: {said}"

    @contextlib.contextmanager
    def deadline(
        self, timeout_s: float, what: str, give_up: Callable[[str], None] | None = None
    ) -> Iterator[None]:
        """End this process if the block takes longer: code that hangs cannot be interrupted.

        Args:
            timeout_s: For the block.
            what: Subject of the message, e.g. ``LeRobot's connect()``.
            give_up: Tells the parent the message; ``say(error=…)`` if left out.
        """
        done = threading.Event()

        def watch() -> None:
            if done.wait(timeout_s):
                return
            message = f"{what} took longer than {timeout_s:g} s"
            if self.printed():
                message += f"; it printed last: {self._quoted()}"
            with contextlib.suppress(OSError):
                if give_up is None:
                    say(error=message)
                else:
                    give_up(message)
            os._exit(TIMED_OUT)

        watcher = threading.Thread(target=watch, name=f"deadline of {what}", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def _quoted(self) -> str:
        return repr(self.printed())

    def _pass_on(self) -> None:
        while True:
            select.select([self._source], [], [])
            self._take()

    def _take(self) -> None:
        """What was printed since goes to standard error; its end is kept."""
        with self._lock:
            while select.select([self._source], [], [], 0)[0]:
                part = os.read(self._source, 65536)
                self._text = (self._text + part)[-KEPT_TEXT:]
                with contextlib.suppress(OSError):
                    os.write(2, part)


def isolate() -> Isolation:
    """Keep code that is not ours from the parent's pipes. Call it before that code is imported.

    Afterwards standard input is empty: whoever asks gets ``EOFError`` at once. What is printed goes
    to standard error, and its end is kept for errors. The parent's end is seen at ``input_fd``, and
    ``say`` and ``write_line`` still reach the parent.
    """
    return Isolation()


class Child:
    """``python -m module arguments…``, ready when it has said so.

    Args:
        module: Calls ``die_with_parent`` and ``say``, and ends when its stdin does.
        arguments: Its command line.
        pass_fds: Descriptors that it inherits.
        start_within_s: How long it may take.
        name: What it is called in errors; ``module`` if left out.
        outlives: Whether it is to see the parent's end at its standard input and end by itself,
            in its own time; its signals are then its own, too.

    Attributes:
        said: What it told when it was ready.

    Raises:
        ConnectFailed: It ended or said an error instead, or took too long; carries the reason.
            Another ``RobotError``, where the child says which.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        pass_fds: Iterable[int] = (),
        start_within_s: float = 60.0,
        name: str = "",
        outlives: bool = False,
    ) -> None:
        self._name = name or module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(pass_fds),
            start_new_session=outlives,
            # What this process can import, the child can: a plug-in need not be installed.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
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
            raise ConnectFailed(f"{self._name}: no pipe to it")
        line = b""
        while not line.endswith(b"\n"):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
                raise ConnectFailed(f"{self._name}: not ready in time")
            part = os.read(pipe.fileno(), 65536)
            if not part:
                raise ConnectFailed(f"{self._name}: ended with status {self._process.wait()}")
            line += part
        said: Mapping[str, Any] = json.loads(line)
        if "error" in said:
            kind = getattr(errors, said.get("kind", ""), ConnectFailed)
            raise kind(f"{self._name}: {said['error']}")
        return said

    def close(self, within_s: float = STOP_WITHIN_S) -> None:
        """Stop it; kill it if it does not within so long. Idempotent."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
