"""Where a loop's time comes from: the machine's monotonic clock, or a test's hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Nanoseconds that only go forward."""

    def now_ns(self) -> int: ...

    def wait_until_ns(self, deadline_ns: int) -> None:
        """Return at ``deadline_ns``, or at once when that has passed."""
        ...


class MonotonicClock:
    """CLOCK_MONOTONIC. Sleeps to ``spin_ns`` before the deadline and spins the rest.

    The sleep overshoots by the kernel's wake-up latency (tens of microseconds); the spin hides it
    at the price of that much CPU per tick. An endless spin would be throttled under SCHED_FIFO.
    """

    def __init__(self, spin_ns: int = 100_000) -> None:
        if spin_ns < 0:
            raise ValueError(f"spin_ns: got {spin_ns}, expected 0 or more")
        self._spin_ns = spin_ns

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def wait_until_ns(self, deadline_ns: int) -> None:
        # time.sleep is clock_nanosleep on an absolute CLOCK_MONOTONIC deadline (CPython >= 3.11).
        remaining_ns = deadline_ns - self._spin_ns - time.monotonic_ns()
        if remaining_ns > 0:
            time.sleep(remaining_ns * 1e-9)
        while time.monotonic_ns() < deadline_ns:
            pass


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
