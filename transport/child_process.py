"""Child processes: start, wait until ready with a deadline, exchange events, end with the parent.

A child is ``python -m module``. It sends events to its parent, one JSON object per line. The first
is ``ready`` or ``failed``. The parent sends lines to the child's standard input, which ends when
the parent ends. Events use the child's standard output or, if users read that, a separate pipe
(``events_flag``).

Third-party code may print, and may wait for a key press. A child that runs such code calls
``isolate`` first.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from transport.errors import ChildFailed

logger = logging.getLogger(__name__)

PACKAGES = Path(__file__).resolve().parents[1]
"""The folder of this project's packages."""
PR_SET_PDEATHSIG = 1
KEPT_TEXT = 2000
"""Bytes of the latest printed text that are kept for an error."""
TIMED_OUT = 3
"""Exit status of a child in which third-party code missed a deadline."""
STOP_WITHIN_S = 10.0
"""Time for a child to end after its standard input was closed."""
KILL_AFTER_S = 1.0
"""From SIGTERM to SIGKILL."""
REPORT_EVERY_S = 5.0
KEPT_LINES = 5
"""Printed lines that are kept for the error of a child that did not become ready: the last ones,
which hold the reason."""


# In the child


class _Output:
    """The descriptor from which the parent reads events."""

    fd = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    This also works on a stopped or stuck process, which would not notice a closed pipe.

    Args:
        parent: The parent's process id, to detect that it has ended already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent process has ended")


def send_event(event: str, **fields: Any) -> None:
    """Send an event to the parent, also after ``isolate``.

    ``ready`` means that this process is ready; its fields are for the parent. ``failed`` means that
    it will not become ready; ``error`` is the reason and ``kind``, if given, an exception's name.
    """
    write_event(_Output.fd, event, **fields)


def write_event(fd: int, event: str, **fields: Any) -> None:
    """Send an event through descriptor ``fd``. Does nothing if the reader has closed it."""
    data = json.dumps({"event": event, **fields}).encode() + b"\n"
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(fd, data) :]


def take_stdin() -> int:
    """Move standard input to a new descriptor; descriptor 0 is then at its end at once."""
    kept = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return kept


def stop_with_stdin() -> None:
    """Send this process SIGTERM when its standard input closes: it must not outlive its parent.

    Third-party code may read standard input; it cannot consume the parent's end of file.
    """
    threading.Thread(target=_stop_at_end_of_file, args=(take_stdin(),), daemon=True).start()


def _stop_at_end_of_file(fd: int) -> None:
    while os.read(fd, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


class Isolation:
    """Keeps the parent's two pipes out of reach of third-party code; see ``isolate``.

    Attributes:
        input_fd: The former standard input, which ends when the parent ends.
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
        threading.Thread(target=self._forward_forever, name="what is printed", daemon=True).start()

    def last_printed_line(self) -> str:
        """The last printed line that is not empty."""
        sys.stdout.flush()
        self._take()
        lines = self._text.decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def explain(self, error: BaseException) -> str:
        """Describe ``error`` in one line.

        Code that reads standard input gets ``EOFError`` at once. The description then quotes the
        question, which was printed before.
        """
        message = " ".join(str(error).split())
        if isinstance(error, EOFError):
            return f"it asked {self._quoted()}, and nobody can answer here"
        return f"{type(error).__name__}: {message}"

    @contextlib.contextmanager
    def deadline(self, timeout_s: float, what: str, hint: str = "") -> Iterator[None]:
        """End this process if the block takes longer, since hanging code cannot be interrupted.

        ``failed`` is sent to the parent.

        Args:
            timeout_s: For the block, in seconds.
            what: Subject of the message, e.g. ``LeRobot's connect()``.
            hint: Advice that is added to the message.
        """
        done = threading.Event()

        def watch() -> None:
            if done.wait(timeout_s):
                return
            message = f"{what} took longer than {timeout_s:g} s"
            if self.last_printed_line():
                message += f"; it printed last: {self._quoted()}"
            send_event("failed", error=f"{message}; {hint}" if hint else message)
            os._exit(TIMED_OUT)

        watcher = threading.Thread(target=watch, name=f"deadline of {what}", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def _quoted(self) -> str:
        return repr(self.last_printed_line())

    def _forward_forever(self) -> None:
        while True:
            select.select([self._source], [], [])
            self._take()

    def _take(self) -> None:
        """Forward the printed text to standard error, and keep its end."""
        with self._lock:
            while select.select([self._source], [], [], 0)[0]:
                part = os.read(self._source, 65536)
                self._text = (self._text + part)[-KEPT_TEXT:]
                with contextlib.suppress(OSError):
                    os.write(2, part)


def isolate() -> Isolation:
    """Keep third-party code from the parent's pipes. Call this before that code is imported.

    Afterwards standard input is empty, so ``input`` raises ``EOFError`` at once. Printed text goes
    to standard error, and its end is kept for errors. ``input_fd`` ends when the parent ends, and
    ``send_event`` still reaches the parent.
    """
    return Isolation()


# In the parent


class ChildProcess:
    """A child process ``python -m module arguments…``.

    Args:
        module: Sends ``ready`` or ``failed``, and ends when its standard input ends.
        arguments: Command-line arguments.
        name: Subject of every message about the child; ``module`` if empty.
        pass_fds: Descriptors that the child inherits.
        outlives: Whether the child may outlive the parent to finish its work. It then runs in its
            own session, so that a terminal's signals reach only the parent.
        events_flag: A flag of ``module`` that takes the descriptor of a pipe for events, if users
            read the child's output. The output of both streams is then logged, and its end is in
            errors. Otherwise the child's output is its events, and it shares standard error.
        shares_output: With ``events_flag``: whether the child writes to this process's own output
            and error instead.
        interpreter: The Python that runs the child, if not this process's. It must have the same
            minor version, since it imports compiled packages from this one's path.

    Attributes:
        name: As above.
        pid: Process id.
        pidfd: Refers to this process even after its id is reused; -1 when closed.
        ready: The ``ready`` event; empty before.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        name: str = "",
        pass_fds: Iterable[int] = (),
        outlives: bool = False,
        events_flag: str = "",
        shares_output: bool = False,
        interpreter: str = sys.executable,
    ) -> None:
        self.name = name or module
        self.ready: Mapping[str, Any] = {}
        # The child can import what this process can, so a plug-in need not be installed.
        # Another interpreter does not know where an editable installation keeps its packages.
        paths = [*filter(None, sys.path), str(PACKAGES)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
        command = [interpreter, "-m", module, *arguments]
        inherited = list(pass_fds)
        self._events_fd, sink = os.pipe()
        output: int | None = sink
        error: int | None = None
        if events_flag:
            command += [events_flag, str(sink)]
            inherited.append(sink)
            environment["PYTHONUNBUFFERED"] = "1"
            output, error = (None, None) if shares_output else (subprocess.PIPE, subprocess.STDOUT)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=error,
                pass_fds=inherited,
                start_new_session=outlives,
                env=environment,
            )
        except BaseException:
            os.close(self._events_fd)
            raise
        finally:
            os.close(sink)
        self.pid = self._process.pid
        # Opened while it cannot have been reaped.
        self.pidfd = os.pidfd_open(self.pid)
        self._printed: deque[str] = deque(maxlen=KEPT_LINES)
        self._received: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._listener = threading.Thread(
            target=self._listen, name=f"events of {self.name}", daemon=True
        )
        self._listener.start()

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self.returncode is None

    @property
    def returncode(self) -> int | None:
        """Exit status, or minus the number of the signal that killed it; None while it runs."""
        return self._process.poll()

    @property
    def status(self) -> str:
        """How the child ended, in words; ``alive`` while it runs."""
        code = self.returncode
        if code is None:
            return "alive"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def wait_ready(
        self,
        timeout_s: float,
        report: Callable[[str], None] | None = None,
        report_every_s: float = REPORT_EVERY_S,
    ) -> Mapping[str, Any]:
        """Wait for the ``ready`` event and return it; events before it are dropped.

        Args:
            timeout_s: From now until the child is ready, in seconds.
            report: Called with a line of text every ``report_every_s`` seconds.

        Raises:
            ChildFailed: The child failed, ended, or took longer. It is not closed.
        """
        began_s = time.monotonic()
        while True:
            waited_s = time.monotonic() - began_s
            if waited_s >= timeout_s:
                raise self._failed(f"was not ready within {timeout_s:g} s")
            try:
                event = self._received.get(timeout=min(report_every_s, timeout_s - waited_s))
            except queue.Empty:
                waited_s = time.monotonic() - began_s
                if report is not None:
                    report(f"waiting for {self.name} to be ready, {waited_s:.0f} s so far")
                continue
            if event["event"] == "ready":
                self.ready = event
                return event
            if event["event"] == "failed":
                error = event["error"]
                raise ChildFailed(f"{self.name}: {error}", error=error, kind=event.get("kind", ""))
            if event["event"] == "ended":
                raise self._failed(f"did not start ({self.status})")

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events received since the last call, without waiting.

        The last event, ``ended``, is made by the parent when the child has ended.
        """
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._received.get_nowait()

    def send_line(self, line: str) -> None:
        """Write a line to the child's standard input. Does nothing if the child has ended."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._process.stdin.write(f"{line}\n".encode())
                self._process.stdin.flush()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def close(self, within_s: float = STOP_WITHIN_S) -> None:
        """End the child. Idempotent.

        Its standard input is closed. If it has not ended ``within_s`` seconds later it gets
        SIGTERM, and ``KILL_AFTER_S`` after that SIGKILL.
        """
        if self.pidfd < 0:
            return
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        if not self._ends_within(within_s):
            self._process.terminate()
            if not self._ends_within(KILL_AFTER_S):
                late_s = within_s + KILL_AFTER_S
                logger.error("%s did not end within %g s: killed", self.name, late_s)
                self._process.kill()
                self._process.wait()
        self._listener.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        os.close(self._events_fd)
        os.close(self.pidfd)
        self.pidfd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ends_within(self, timeout_s: float) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _failed(self, what: str) -> ChildFailed:
        printed = " ".join(list(self._printed))
        return ChildFailed(f"{self.name} {what}{': ' if printed else ''}{printed}")

    def _listen(self) -> None:
        """Read until the process has ended and its pipes are empty.

        It does not wait until the pipes are closed, because processes that the child started may
        hold them and live on.
        """
        take: dict[int, Callable[[bytes], None]] = {self._events_fd: self._on_event_line}
        if self._process.stdout is not None:
            take[self._process.stdout.fileno()] = self._on_printed_line
        partial = dict.fromkeys(take, b"")
        poller = select.poll()
        for fd in (*take, self.pidfd):
            poller.register(fd, select.POLLIN)
        while (readable := {fd for fd, _ in poller.poll()}) != {self.pidfd}:
            for fd in readable - {self.pidfd}:
                part = os.read(fd, 65536)
                *lines, partial[fd] = (partial[fd] + part).split(b"\n")
                if not part:
                    poller.unregister(fd)
                    lines.append(partial.pop(fd))
                for line in filter(None, lines):
                    take[fd](line)
        self._received.put({"event": "ended"})

    def _on_event_line(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and "event" in event:
            self._received.put(event)
        else:
            self._log(line)

    def _on_printed_line(self, line: bytes) -> None:
        self._log(line)
        if text := line.decode(errors="replace").strip():
            self._printed.append(text)

    def _log(self, line: bytes) -> None:
        logger.info("%s: %s", self.name, line.decode(errors="replace").rstrip())
