"""A private policy server in a child process, for those who have a checkpoint and need a server."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence

from runtime.errors import RuntimeFault

logger = logging.getLogger(__name__)

_STARTED = re.compile(r"Policy Server started on (\S+)")
STOP_WITHIN_S = 10.0
KEPT_LINES = 5
"""Of what a server said that did not start; the reason comes last."""
SAY_EVERY_S = 15.0
"""How long a server that loads is waited for without a word."""


class ServerProcess:
    """Runs ``python -m runtime.server`` on a free port of this host; ``address`` says where.

    Args:
        flags: Its command line; host and port are chosen here.
        start_within_s: How long loading and warming up may take.

    Raises:
        RuntimeFault: It did not start; carries what it said.
    """

    def __init__(self, flags: Sequence[str], *, start_within_s: float = 300.0) -> None:
        command = [sys.executable, "-m", "runtime.server", *flags]
        command += ["--host", "127.0.0.1", "--port", "0", "--log_level", "WARNING"]
        # The child stops when this pipe closes, however its parent ended.
        command.append("--stop_with_stdin")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        giving_up = threading.Timer(start_within_s, self._process.kill)
        giving_up.start()
        waiting = threading.Thread(
            target=self._say_that_it_loads, args=(ready := threading.Event(),)
        )
        waiting.start()
        try:
            self.address = self._read_address()
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._close_pipes()
            raise
        finally:
            ready.set()
            giving_up.cancel()
            giving_up.join()
            waiting.join()
        self._log = threading.Thread(target=self._pass_on_output, daemon=True)
        self._log.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def _lines(self) -> Iterable[str]:
        return self._process.stdout or ()

    def _read_address(self) -> str:
        said: list[str] = []
        for line in self._lines():
            if match := _STARTED.search(line):
                return match[1]
            said.append(line.strip())
        status = self._process.wait()
        last = " ".join(filter(None, said[-KEPT_LINES:]))
        raise RuntimeFault(f"the policy server did not start (status {status}): {last}")

    def _say_that_it_loads(self, ready: threading.Event) -> None:
        began_s = time.monotonic()
        while not ready.wait(SAY_EVERY_S):
            logger.warning(
                "the policy server is still loading, %.0f s so far", time.monotonic() - began_s
            )

    def _pass_on_output(self) -> None:
        # The pipe must be read to its end, or the server would block on a full one.
        for line in self._lines():
            logger.info("server: %s", line.rstrip())

    def close(self) -> None:
        """Stop it; kill it if it does not. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.join()
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
