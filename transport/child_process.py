"""Child processes: started, ready within a deadline, heard, and ended with their parent.

A child is ``python -m module``. It sends events to its parent, one JSON object per line, the first
of them ``ready`` or ``failed``. The parent sends lines to the child's standard input; the end of
standard input is the parent's end. Events leave through the child's standard output, or, where that
is for people, through a pipe of their own (``events_flag``).

Code that is not ours may print, and may wait for somebody to press Enter: a child that runs such
code calls ``isolate`` first.
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
from typing import Any, Self

from transport.errors import ChildFailed

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
KEPT_TEXT = 2000
"""Bytes of what was printed last that are kept for an error."""
TIMED_OUT = 3
"""Exit status of a child that code which is not ours kept waiting for too long."""
STOP_WITHIN_S = 10.0
"""For a child to end after its standard input has."""
KILL_AFTER_S = 1.0
"""From SIGTERM to SIGKILL."""
TELL_EVERY_S = 5.0
KEPT_LINES = 5
"""Of what a child printed that did not become ready; the reason comes last."""


# In the child


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


def send_event(event: str, **fields: Any) -> None:
    """Tell the parent, past whatever ``isolate`` keeps from it.

    ``ready`` says that this process is, with what the parent needs to know. ``failed`` says that it
    never will be; its ``error`` says why, and ``kind``, if given, is the name of an exception.
    """
    write_event(_Output.fd, event, **fields)


def write_event(fd: int, event: str, **fields: Any) -> None:
    """``send_event`` through a pipe of its own. Nothing happens if nobody listens any more."""
    data = json.dumps({"event": event, **fields}).encode() + b"\n"
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(fd, data) :]


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
        message = " ".join(str(error).split())
        if isinstance(error, EOFError):
            return f"it asked {self._quoted()}, and nobody can answer here"
        return f"{type(error).__name__}: {message}"

    @contextlib.contextmanager
    def deadline(self, timeout_s: float, what: str, hint: str = "") -> Iterator[None]:
        """End this process if the block takes longer: code that hangs cannot be interrupted.

        The parent is sent ``failed``.

        Args:
            timeout_s: For the block.
            what: Subject of the message, e.g. ``LeRobot's connect()``.
            hint: What to do about it; added to the message.
        """
        done = threading.Event()

        def watch() -> None:
            if done.wait(timeout_s):
                return
            message = f"{what} took longer than {timeout_s:g} s"
            if self.printed():
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
    ``send_event`` still reaches the parent.
    """
    return Isolation()


# In the parent


class ChildProcess:
    """``python -m module arguments…``, running.

    Args:
        module: Sends ``ready`` or ``failed``, and ends when its standard input does.
        arguments: Its command line.
        name: Subject of every message about it; ``module`` if left out.
        pass_fds: Descriptors that it inherits.
        outlives: Whether it may outlive the parent for as long as it has something to finish. It is
            in a session of its own then, so that a terminal's signals reach the parent alone.
        events_flag: A flag of ``module`` that takes the number of a pipe for events, for one that
            prints for people. What it prints, on both streams, is then logged, and the end of it is
            in errors. Otherwise events are what it prints, and its standard error is the parent's.

    Attributes:
        name: As above.
        pid: Its process id.
        pidfd: Means this very process, also when its id is somebody else's; -1 when closed.
        ready: What it sent when it was ready.
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
    ) -> None:
        self.name = name or module
        self.ready: Mapping[str, Any] = {}
        # What this process can import, the child can: a plug-in need not be installed.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", module, *arguments]
        inherited = list(pass_fds)
        self._events_fd, sink = os.pipe()
        if events_flag:
            command += [events_flag, str(sink)]
            inherited.append(sink)
            environment["PYTHONUNBUFFERED"] = "1"
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if events_flag else sink,
                stderr=subprocess.STDOUT if events_flag else None,
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
        return self.returncode is None

    @property
    def returncode(self) -> int | None:
        """Its exit status, minus the signal's number if one killed it; None while it runs."""
        return self._process.poll()

    @property
    def status(self) -> str:
        """How it ended, in words."""
        code = self.returncode
        if code is None:
            return "alive"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def wait_ready(
        self,
        timeout_s: float,
        tell: Callable[[str], None] | None = None,
        tell_every_s: float = TELL_EVERY_S,
    ) -> Mapping[str, Any]:
        """What it sends when it is ready; events before that are dropped.

        Args:
            timeout_s: For it to be ready, from now on.
            tell: Called with a line each time that ``tell_every_s`` have passed.

        Raises:
            ChildFailed: It failed, ended, or took longer. It is not closed.
        """
        began_s = time.monotonic()
        while True:
            waited_s = time.monotonic() - began_s
            if waited_s >= timeout_s:
                raise self._failed(f"was not ready within {timeout_s:g} s")
            try:
                event = self._received.get(timeout=min(tell_every_s, timeout_s - waited_s))
            except queue.Empty:
                waited_s = time.monotonic() - began_s
                if tell is not None:
                    tell(f"waiting for {self.name} to be ready, {waited_s:.0f} s so far")
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
        """What it has sent since, without waiting. The last event, ``ended``, is not of its own."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._received.get_nowait()

    def send_line(self, line: str) -> None:
        """To its standard input; nothing happens if it has ended."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._process.stdin.write(f"{line}\n".encode())
                self._process.stdin.flush()

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def close(self, within_s: float = STOP_WITHIN_S) -> None:
        """End it. Idempotent.

        Its standard input ends. If it has not ended ``within_s`` later it gets SIGTERM, and SIGKILL
        ``KILL_AFTER_S`` after that.
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

        Not until its pipes are closed: what it started may have them, and may live on.
        """
        take: dict[int, Callable[[bytes], None]] = {self._events_fd: self._take_event}
        if self._process.stdout is not None:
            take[self._process.stdout.fileno()] = self._take_print
        begun = dict.fromkeys(take, b"")
        poller = select.poll()
        for fd in (*take, self.pidfd):
            poller.register(fd, select.POLLIN)
        while (readable := {fd for fd, _ in poller.poll()}) != {self.pidfd}:
            for fd in readable - {self.pidfd}:
                part = os.read(fd, 65536)
                *lines, begun[fd] = (begun[fd] + part).split(b"\n")
                if not part:
                    poller.unregister(fd)
                    lines.append(begun.pop(fd))
                for line in filter(None, lines):
                    take[fd](line)
        self._received.put({"event": "ended"})

    def _take_event(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and "event" in event:
            self._received.put(event)
        else:
            self._log(line)

    def _take_print(self, line: bytes) -> None:
        self._log(line)
        if text := line.decode(errors="replace").strip():
            self._printed.append(text)

    def _log(self, line: bytes) -> None:
        logger.info("%s: %s", self.name, line.decode(errors="replace").rstrip())
