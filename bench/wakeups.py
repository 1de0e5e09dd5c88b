"""What ends a process' sleep, and how fast: eventfd, POSIX semaphore, futex.

    python -m bench.wakeups

Two processes on two cores wake each other in turns, in alternating blocks; a figure is half a round
trip, so one signal and one wake-up as Python sees them. ``back to back`` finds a peer that has just
gone to sleep, ``after 5 ms`` one whose core may have gone to sleep too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import select
import signal
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import posix_ipc
from numba import njit, types

from bench.process import cores, pinned
from bench.records import Records
from transport.shm.atomics import load_acquire, store_release

_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), -1)
_WAIT, _WAKE = 0, 1
_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))


@njit("i8(i8, i8, i8, i8)", nogil=True)
def _futex(number: int, address: int, operation: int, value: int) -> int:
    return _syscall(number, address, operation, value, 0, 0, 0)


class Bell(Protocol):
    """One direction."""

    def ring(self) -> None: ...

    def wait(self) -> None:
        """Until it was rung as often as was waited for, asleep."""

    def close(self) -> None: ...


class Eventfd:
    """A blocking read."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_SEMAPHORE)

    def ring(self) -> None:
        os.eventfd_write(self.fd, 1)

    def wait(self) -> None:
        os.eventfd_read(self.fd)

    def close(self) -> None:
        os.close(self.fd)


class EventfdInEpoll(Eventfd):
    """Waited for as a server does that has other descriptors too."""

    def __init__(self) -> None:
        super().__init__()
        self._epoll = select.epoll()
        self._epoll.register(self.fd, select.EPOLLIN)

    def wait(self) -> None:
        self._epoll.poll()
        super().wait()

    def close(self) -> None:
        self._epoll.close()
        super().close()


class Semaphore:
    """A POSIX semaphore, its name given up at once."""

    def __init__(self) -> None:
        self._semaphore = posix_ipc.Semaphore(None, posix_ipc.O_CREX)
        self._semaphore.unlink()

    def ring(self) -> None:
        self._semaphore.release()

    def wait(self) -> None:
        self._semaphore.acquire()

    def close(self) -> None:
        self._semaphore.close()


class Futex:
    """A word in shared memory; the system is called by compiled code."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._words = np.frombuffer(self._memory, np.int64)
        self._address, self._seen = int(self._words.ctypes.data), 0

    def ring(self) -> None:
        store_release(self._address, load_acquire(self._address) + 1)
        self._call(_WAKE, 1)

    def wait(self) -> None:
        # The low half of a word that counts up: little-endian, and far from 2**31.
        while load_acquire(self._address) == self._seen:
            self._call(_WAIT, self._seen)
        self._seen += 1

    def close(self) -> None:
        pass  # the mapping goes with the last view

    def _call(self, operation: int, value: int) -> None:
        _futex(_FUTEX, self._address, operation, value)


class FutexByCtypes(Futex):
    """The system is called through ctypes."""

    def __init__(self) -> None:
        super().__init__()
        self._libc = ctypes.CDLL(None)
        self._libc.syscall.argtypes = [ctypes.c_long] * 7

    def _call(self, operation: int, value: int) -> None:
        self._libc.syscall(_FUTEX, self._address, operation, value, 0, 0, 0)


KINDS: dict[str, Callable[[], Bell]] = {
    "eventfd, read": Eventfd,
    "eventfd, epoll": EventfdInEpoll,
    "POSIX semaphore": Semaphore,
}
if _FUTEX >= 0:
    KINDS |= {"futex, compiled": Futex, "futex, ctypes": FutexByCtypes}


class Partner:
    """A forked process on the other core that answers every ring with one."""

    def __init__(self, kind: Callable[[], Bell]) -> None:
        self.there, self.back = kind(), kind()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.sched_setaffinity(0, {cores()[1]})
                while True:
                    self.there.wait()
                    self.back.ring()
            finally:
                os._exit(1)

    def one_way_us(self, count: int, pause_s: float) -> list[float]:
        samples = []
        for _ in range(count):
            if pause_s:
                time.sleep(pause_s)
            began_ns = time.perf_counter_ns()
            self.there.ring()
            self.back.wait()
            samples.append((time.perf_counter_ns() - began_ns) / 2000)
        return samples

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self.there.close()
        self.back.close()


def main() -> None:
    records = Records()
    with pinned(cores()[0]):
        partners = {name: Partner(kind) for name, kind in KINDS.items()}
        try:
            for group, blocks, block, pause_s in (
                ("wake-up back to back", 20, 500, 0.0),
                ("wake-up after 5 ms", 10, 40, 0.005),
            ):
                samples: dict[str, list[float]] = {name: [] for name in partners}
                for _ in range(blocks):
                    for name, partner in partners.items():
                        partner.one_way_us(20, 0.0)
                        samples[name] += partner.one_way_us(block, pause_s)
                records.add(group, {name: np.array(values) for name, values in samples.items()})
        finally:
            for partner in partners.values():
                partner.close()
        records.add("signal nobody waits for", {name: _unheard(k) for name, k in KINDS.items()})
    for group in records.groups:
        print(records.table(group), end="\n\n")
        records.save("wakeups", group)


def _unheard(kind: Callable[[], Bell]) -> np.ndarray:
    """What a ring costs its caller when nobody sleeps, 100 at a time."""
    bell, samples = kind(), []
    for _ in range(50):
        began_ns = time.perf_counter_ns()
        for _ in range(100):
            bell.ring()
        samples.append((time.perf_counter_ns() - began_ns) / 1e5)
    bell.close()
    return np.array(samples)


if __name__ == "__main__":
    main()
