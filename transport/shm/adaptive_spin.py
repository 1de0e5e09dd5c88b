"""Whether to watch memory for a moment before sleeping, decided by how long waits have been."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

MAX_SPIN_US = 200
"""No wait burns more than this."""
DEFAULT_SPIN_US = MAX_SPIN_US
"""A client that copies a picture or two between an answer and its next question is still caught."""
EXPECT_US = 1000
"""How long something announced is watched for: to copy several pictures takes less."""
_SLICE_ROUNDS = 100
"""Looks per compiled call: some microseconds, after which the clock is asked."""
_CONVINCED = 8
"""Waits in a row."""
_WAKE_UP_NS = 100_000
"""A sleeper's peer is slower, too, while it rings; this is for both."""


class AdaptiveSpin:
    """A bounded spin that stops where it does not help.

    A spin in vain turns spinning off; so many waits in a row that a spin would have ended turn it
    on again. So a client that asks 50 times a second, or whose policy takes milliseconds, sleeps
    at once; one in a tight exchange never sleeps; and where both sides share one core, so that
    neither can come while the other watches, a spin is wasted once in ``_CONVINCED`` waits.

    Args:
        limit_us: At most so long, 0 to ``MAX_SPIN_US``; 0 turns it off, and so does a machine of
            one core.

    Raises:
        ValueError: Out of that range.
    """

    __slots__ = ("_distrust", "_expect_ns", "_score", "_tried", "limit_ns")

    def __init__(self, limit_us: float = DEFAULT_SPIN_US) -> None:
        if not 0 <= limit_us <= MAX_SPIN_US:
            raise ValueError(f"spin_us: got {limit_us}, expected 0 to {MAX_SPIN_US}")
        alone = (os.cpu_count() or 1) < 2
        self.limit_ns = 0 if alone else round(limit_us * 1000)
        self._expect_ns = 0 if alone else EXPECT_US * 1000
        self._distrust = 0
        self._score = _CONVINCED
        self._tried = False

    @property
    def worthwhile(self) -> bool:
        """Whether the next wait will begin by watching."""
        return self.limit_ns > 0 and self._score >= _CONVINCED

    def watch(self, look: Callable[[int], bool]) -> bool:
        """Look, for as long as the limit, if it is worthwhile; whether something came.

        Args:
            look: Called with a number of rounds; looks that often, and says whether it saw.
        """
        self._tried = self.worthwhile
        if not self._tried:
            return False
        if _seen(look, self.limit_ns):
            return True
        self._score = 0
        return False

    def expect(self, look: Callable[[int], bool]) -> bool:
        """Look for what the peer has announced, even where spinning in hope is off; whether it
        came. A peer that announced in vain is not believed the next times."""
        if self._distrust:
            self._distrust -= 1
            return False
        if _seen(look, self._expect_ns):
            return True
        self._distrust = _CONVINCED
        return False

    def waited(self, duration_ns: int) -> None:
        """Learn from a wait that is over; one that slept took a wake-up longer than it had to."""
        if self._tried and self._score:
            return
        short = duration_ns <= self.limit_ns + _WAKE_UP_NS
        self._score = min(_CONVINCED, self._score + 1) if short else 0
        self._tried = False


def _seen(look: Callable[[int], bool], limit_ns: int) -> bool:
    """Look for at most so long; whether something came."""
    until = time.perf_counter_ns() + limit_ns
    while not look(_SLICE_ROUNDS):
        if time.perf_counter_ns() >= until:
            return False
    return True
