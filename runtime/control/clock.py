"""Clocks of a control loop: the machine's monotonic clock, and a manual one for tests."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from typing import Protocol

NS_PER_S = 1_000_000_000
FIRST_WAKE_NS = 200_000
"""Lead of the first wake-up without a spin: longer than a wake-up, too short to lose the caches."""
DEFAULT_SPIN_NS = 200_000
"""Longer than nearly every wake-up on a loaded virtual machine. At 50 Hz it costs 1 % of a core."""
_TIMER_ABSTIME = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


# Through ctypes.CDLL the GIL is released for the length of the call.
_clock_nanosleep = ctypes.CDLL(None).clock_nanosleep
_clock_nanosleep.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_clock_nanosleep.restype = ctypes.c_int


class Clock(Protocol):
    """A monotonic clock in nanoseconds."""

    def now_ns(self) -> int:
        """The current time."""
        ...

    def wait_until_ns(self, deadline_ns: int) -> None:
        """Return at ``deadline_ns``, or at once if it has passed."""
        ...


class MonotonicClock:
    """CLOCK_MONOTONIC. Wakes shortly before the deadline, then spins until it, or sleeps again.

    After a period in which other threads ran, the caches hold nothing of this thread. On a loaded
    machine the first few lines after a wake-up then take longer than the wake-up itself. So the
    thread wakes before the deadline in both cases:

    * With a spin of at least the machine's wake-up latency, it is on time within microseconds, and
      spends that much CPU time per tick. The spin is bounded: SCHED_FIFO throttles an endless one.
    * Without a spin, it sleeps again for the rest. The core is then active and the code in its
      caches, so this second wake-up is fast.

    The kernel gets absolute deadlines, so neither preemption before the call nor a signal during
    it makes the sleep longer. Signal handlers run during the wait, and an exception that they raise
    ends it. Only one thread may wait on a clock.

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

    # The function itself: a method around it would be one more access to memory.
    now_ns = staticmethod(time.monotonic_ns)

    def wait_until_ns(self, deadline_ns: int) -> None:
        """Return at ``deadline_ns``, or at once if it has passed.

        Raises:
            OSError: ``clock_nanosleep`` failed.
        """
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
    """Nanoseconds that a loop of this SCHED_FIFO priority should spin; priority 0 is SCHED_OTHER.

    Under SCHED_OTHER it should not spin: on a loaded machine the CPU time of the spin counts
    against the thread, and the scheduler then runs another thread at the deadline.
    """
    return DEFAULT_SPIN_NS if priority else 0


class ManualClock:
    """A clock for tests and lockstep; only ``wait_until_ns`` and ``advance_ns`` change its time.

    Args:
        start_ns: The initial time.
    """

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        """The current time."""
        return self._now_ns

    def wait_until_ns(self, deadline_ns: int) -> None:
        """Set the time to ``deadline_ns``, unless it has passed."""
        self._now_ns = max(self._now_ns, deadline_ns)

    def advance_ns(self, duration_ns: int) -> None:
        """Move the time forward; raises ``ValueError`` for a negative duration."""
        if duration_ns < 0:
            raise ValueError(f"duration_ns: got {duration_ns}, expected 0 or more")
        self._now_ns += duration_ns
