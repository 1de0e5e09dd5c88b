"""Where a loop's time comes from: the machine's monotonic clock, or a test's hand."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from typing import Protocol

NS_PER_S = 1_000_000_000
FIRST_WAKE_NS = 200_000
"""Before the deadline, without a spin: more than a wake-up takes, too little to forget in."""
DEFAULT_SPIN_NS = 200_000
"""Above the wake-up latency of nearly every tick on a loaded virtual machine; at 50 Hz 1 % of a
core."""
_TIMER_ABSTIME = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


# Through ctypes.CDLL the GIL is released for the length of the call.
_clock_nanosleep = ctypes.CDLL(None).clock_nanosleep
_clock_nanosleep.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_clock_nanosleep.restype = ctypes.c_int


class Clock(Protocol):
    """Nanoseconds that only go forward."""

    def now_ns(self) -> int: ...

    def wait_until_ns(self, deadline_ns: int) -> None:
        """Return at ``deadline_ns``, or at once when that has passed."""
        ...


class MonotonicClock:
    """CLOCK_MONOTONIC. Wakes shortly before the deadline, then spins up to it, or sleeps again.

    After a period of others' work nothing of ours is in the caches. On a loaded machine the first
    few lines after a wake-up then take longer than the wake-up itself. So the thread is awake
    before the deadline in either case:

    * With a spin of at least the machine's wake-up latency, it is on time to some microseconds, at
      the price of so much CPU per tick. The spin is bounded: an endless one would be throttled
      under SCHED_FIFO.
    * Without, it sleeps once more for what is left. That wake-up finds the core awake and the code
      in its caches, and costs next to nothing.

    The kernel is given absolute deadlines, so neither being preempted before the call nor a signal
    during it makes the sleep longer. Signal handlers run during the wait, and what they raise ends
    it. One thread waits on one clock.

    Args:
        spin_ns: How long before the deadline to wake up and spin; 0 for no spin.

    Raises:
        ValueError: ``spin_ns`` is negative.
    """

    def __init__(self, spin_ns: int = DEFAULT_SPIN_NS) -> None:
        if spin_ns < 0:
            raise ValueError(f"spin_ns: got {spin_ns}, expected 0 or more")
        self._spin_ns = spin_ns
        self._lead_ns = spin_ns or FIRST_WAKE_NS
        self._until = _Timespec()
        self._until_address = ctypes.addressof(self._until)

    # The function itself: a method of our own would be one more thing to fetch from memory.
    now_ns = staticmethod(time.monotonic_ns)

    def wait_until_ns(self, deadline_ns: int) -> None:
        now_ns = self.now_ns
        self._sleep_until_ns(deadline_ns - self._lead_ns)
        if not self._spin_ns:
            self._sleep_until_ns(deadline_ns)
        while now_ns() < deadline_ns:
            pass

    def _sleep_until_ns(self, wake_ns: int) -> None:
        if wake_ns <= self.now_ns():
            return
        self._until.tv_sec, self._until.tv_nsec = divmod(wake_ns, NS_PER_S)
        while failed := _clock_nanosleep(
            time.CLOCK_MONOTONIC, _TIMER_ABSTIME, self._until_address, None
        ):
            if failed != errno.EINTR:
                raise OSError(failed, f"clock_nanosleep: {os.strerror(failed)}")


def spin_for(priority: int) -> int:
    """How long a loop of that SCHED_FIFO priority should spin; 0 is an ordinary thread.

    An ordinary thread should not: under load, what it burns before the deadline counts against it,
    and the scheduler lets somebody else in just then.
    """
    return DEFAULT_SPIN_NS if priority else 0


class ManualClock:
    """Time passes only when told to, or to whatever is waited for. For tests and lockstep."""

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        return self._now_ns

    def wait_until_ns(self, deadline_ns: int) -> None:
        self._now_ns = max(self._now_ns, deadline_ns)

    def advance_ns(self, duration_ns: int) -> None:
        if duration_ns < 0:
            raise ValueError(f"duration_ns: got {duration_ns}, expected 0 or more")
        self._now_ns += duration_ns
