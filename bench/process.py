"""The other process of an exchange: ``python -m bench.process NAME PAYLOAD FD CORE``.

Pinned to a core of its own before anything of the contestant is imported, so that its threads are
too. It dies with its parent, whatever the parent dies of.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from bench.contestant import Absent, Contestant, find
from bench.payload import PAYLOADS, Payload, Sink

ROOT = Path(__file__).resolve().parents[1]
_PR_SET_PDEATHSIG = 1
START_WITHIN_S = 60.0


def cores() -> tuple[int, int]:
    """(client's, server's): the last two this process may use.

    Raises:
        Absent: There is only one; two processes on it measure the scheduler.
    """
    allowed = sorted(_ALLOWED)
    if len(allowed) < 2:
        raise Absent(f"two cores needed, this process may use {allowed}")
    return allowed[-2], allowed[-1]


_ALLOWED = os.sched_getaffinity(0)


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """This thread, and whatever threads it starts meanwhile, on ``core``."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class ServerProcess:
    """A contestant's server on the server's core.

    Args:
        gc_on: Whether its garbage collector runs.

    Raises:
        Absent: It could not start there; carries what it said.
    """

    def __init__(self, contestant: Contestant, payload: Payload, *, gc_on: bool = True) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            command = [sys.executable, "-m", "bench.process", contestant.name, payload.name]
            command += [str(fd), str(cores()[1]), str(int(gc_on))]
            self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[fd])
        self.link = Connection(ours.detach())
        self.busy = contestant.busy
        try:
            if not self.link.poll(START_WITHIN_S):
                raise Absent(f"its server did not start within {START_WITHIN_S:g} s")
            said = self.link.recv()
        except (EOFError, ConnectionError, Absent) as error:
            self.close()
            raise Absent(f"its server died at the start: {error!r}") from error
        if said is not None:
            self.close()
            raise Absent(said)

    @property
    def pid(self) -> int:
        return self._process.pid

    def pause(self) -> None:
        """Stop one that never sleeps, so that its core is others'."""
        if self.busy:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self.busy:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill it; what it leaves behind is its contestant's to remove. Idempotent."""
        self._process.kill()
        self._process.wait()
        self.link.close()


def main(name: str, payload: str, fd: str, core: str, gc_on: str) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.sched_setaffinity(0, {int(core)})
    link = Connection(int(fd))
    try:
        contestant = find(name)
    except Absent as error:
        link.send(str(error))
        return
    sink = Sink(PAYLOADS[payload])
    gc.collect()
    gc.freeze()
    if not int(gc_on):
        gc.disable()
    link.send(None)
    contestant.serve(sink, link)


if __name__ == "__main__":
    main(*sys.argv[1:])
