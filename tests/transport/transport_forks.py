"""Test processes forked from a prepared one: they start in milliseconds and inherit no resources.

A ``ForkServer`` imports the modules of its children once and then only forks, so that a thousand
killed children cost no further imports. Children inherit no socket, no segment and no thread. As in
``transport_peers``, a child writes one JSON object per event and reads one word per line.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from transport.shm.segment import FOLDER, PREFIX

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
LONG = os.environ.get("METRONOME_LONG", "") not in ("", "0")
"""Whether to run at full length: ``make soak``."""


class ForkedChild:
    """One forked child: its process id, its events, and the lines sent to it."""

    def __init__(self, pid: int, stdin: int, stdout: int) -> None:
        self.pid, self._stdin, self._stdout = pid, stdin, stdout
        self._buffer = b""
        self.over = False

    def next(self, patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """The next event; ``{"event": "end"}`` after the process has ended."""
        while b"\n" not in self._buffer and not self.over:
            readable, _, _ = select.select([self._stdout], [], [], patience_s)
            assert readable, f"no event within {patience_s} s: it is stuck"
            more = os.read(self._stdout, 65536)
            self.over = not more
            self._buffer += more
        if not self._buffer:
            return {"event": "end"}
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    def expect(self, event: str, patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """The next event, which must have this name."""
        said = self.next(patience_s)
        assert said["event"] == event, said
        return said

    def wait_for(self, event: str) -> dict[str, Any]:
        """The first event of this name; earlier ones are dropped."""
        while (said := self.next())["event"] != event:
            assert said["event"] not in ("end", "fault"), said
        return said

    def send_line(self, word: object) -> None:
        os.write(self._stdin, f"{word}\n".encode())

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stopped(self) -> bool:
        """Whether the kernel has stopped it (SIGSTOP)."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    def await_stop(self) -> None:
        while not self.stopped():
            os.sched_yield()

    def finish(self) -> None:
        """Close its standard input, which ends a client, and send SIGTERM, which ends a server."""
        if not self.over:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
                self.signal(signal.SIGTERM)
            if self._stdin >= 0:
                os.close(self._stdin)
                self._stdin = -1
            while self.next()["event"] != "end":
                pass

    def close(self) -> None:
        """Kill it and close its pipes. Idempotent."""
        if not self.over:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
        for fd in (self._stdin, self._stdout):
            if fd >= 0:
                os.close(fd)
        self._stdin = self._stdout = -1


class ForkServer:
    """A process that imports ``modules`` and forks.

    Args:
        modules: Imported once; they hold the functions that ``fork`` names.
        prefix: A command that starts the process, for namespaces and limits.
    """

    def __init__(self, *modules: str, prefix: Sequence[str] = ()) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = (ROOT, ROOT / "tests", Path(__file__).parent)
        with theirs:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, __file__, str(theirs.fileno()), *modules],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
                pass_fds=[theirs.fileno()],
            )
        try:
            self._control.settimeout(PATIENCE_S)
            assert self._control.recv(16) == b"ready", "the fork server did not start"
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def fork(self, role: str, **arguments: Any) -> Iterator[ForkedChild]:
        """Fork a child that runs ``role`` (``module:function``)."""
        child_in, our_out = os.pipe()
        our_in, child_out = os.pipe()
        request = json.dumps({"role": role, "arguments": arguments}).encode()
        try:
            socket.send_fds(self._control, [request], [child_in, child_out])
            child = ForkedChild(int(self._control.recv(16)), our_out, our_in)
        except BaseException:
            os.close(our_out)
            os.close(our_in)
            raise
        finally:
            os.close(child_in)
            os.close(child_out)
        try:
            yield child
            child.finish()
        finally:
            child.close()

    @property
    def shm(self) -> Path:
        """Its /dev/shm, which ``prefix`` may have replaced."""
        return Path(f"/proc/{self._process.pid}/root{FOLDER}")

    def close(self) -> None:
        self._control.close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def orphans(folder: Path = FOLDER) -> set[str]:
    """Names in /dev/shm that no living process holds; another test run may hold others."""
    found = set()
    for path in folder.glob(f"{PREFIX}*"):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.add(path.name)
        except OSError:
            continue
    return found


def send_event(event: str, **what: Any) -> None:
    """Send one event from a child, in one write."""
    os.write(1, json.dumps({"event": event, **what}).encode() + b"\n")


def isolated(options: str) -> list[str]:
    """A command prefix for a separate /dev/shm. ``options``: size, then other tmpfs options."""
    mount = 'mount -t tmpfs -o size=$0 tmpfs /dev/shm && exec "$@"'
    return ["unshare", "-m", "sh", "-c", mount, options]


def isolated_if_possible(size: str) -> list[str]:
    """As ``isolated``; empty if that is not allowed."""
    prefix = isolated(size)
    try:
        allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return []
    return [] if allowed.returncode else prefix


def _run_role(role: str, arguments: dict[str, Any]) -> None:
    module, _, name = role.partition(":")
    try:
        getattr(import_module(module), name)(**arguments)
    except BaseException as error:
        send_event("fault", type=type(error).__name__, text=traceback.format_exc()[-3000:])


def main(control_fd: str, *modules: str) -> None:
    control = socket.socket(fileno=int(control_fd))
    for module in modules:
        import_module(module)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    control.send(b"ready")
    while True:
        request, fds, _, _ = socket.recv_fds(control, 65536, 2)
        if not request:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, fd in enumerate(fds):
                os.dup2(fd, number)
                os.close(fd)
            _run_role(**json.loads(request))
            os._exit(0)
        for fd in fds:
            os.close(fd)
        control.send(str(pid).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
