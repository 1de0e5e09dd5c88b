"""Decides from past waits whether to poll memory for a short time before sleeping."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

MAX_SPIN_US = 200
"""Upper bound of the time that a wait may spin."""
DEFAULT_SPIN_US = MAX_SPIN_US
"""Enough for a client that copies an image or two between a reply and its next request."""
SIGNAL_SPIN_US = 1000
"""How long to spin for an announced message. Copying several images takes less."""
_ROUNDS_PER_CALL = 100
"""Loads per compiled call: some microseconds, after which the clock is read."""
_SHORT_WAITS = 8
"""Short waits in a row that turn spinning on again."""
_WAKE_UP_NS = 100_000
"""Added to a wait that slept: the waking side's system call and the sleeper's wake-up."""


class AdaptiveSpin:
    """A bounded spin that turns itself off where it does not help.

    A spin that sees no message turns spinning off. ``_SHORT_WAITS`` waits in a row that a spin
    would have ended turn it on again. So a client that sends 50 requests a second, or whose policy
    takes milliseconds, sleeps at once, and a client in a tight exchange never sleeps. Where both
    sides share one core, so that neither can send while the other polls, one wait in
    ``_SHORT_WAITS`` spins for nothing.

    Args:
        limit_us: Longest spin in µs, 0 to ``MAX_SPIN_US``. 0 turns spinning off, and so does a
            machine of one core.

    Raises:
        ValueError: ``limit_us`` is out of that range.
    """

    __slots__ = ("_score", "_signal_spin_ns", "_signals_to_ignore", "_spun", "limit_ns")

    def __init__(self, limit_us: float = DEFAULT_SPIN_US) -> None:
        if not 0 <= limit_us <= MAX_SPIN_US:
            raise ValueError(f"spin_us: got {limit_us}, expected 0 to {MAX_SPIN_US}")
        alone = (os.cpu_count() or 1) < 2
        self.limit_ns = 0 if alone else round(limit_us * 1000)
        self._signal_spin_ns = 0 if alone else SIGNAL_SPIN_US * 1000
        self._signals_to_ignore = 0
        self._score = _SHORT_WAITS
        self._spun = False

    @property
    def will_spin(self) -> bool:
        """Whether the next wait will begin with a spin."""
        return self.limit_ns > 0 and self._score >= _SHORT_WAITS

    def spin(self, poll: Callable[[int], bool]) -> bool:
        """Spin for at most the limit, if ``will_spin``; whether a message arrived.

        Args:
            poll: Called with a number of rounds; polls that often and returns whether a message
                arrived.
        """
        self._spun = self.will_spin
        if not self._spun:
            return False
        if _poll_for(poll, self.limit_ns):
            return True
        self._score = 0
        return False

    def spin_after_signal(self, poll: Callable[[int], bool]) -> bool:
        """Spin for a message that the peer announced, even if ``spin`` is off; whether it arrived.

        After an announcement without a message, the next ones are ignored."""
        if self._signals_to_ignore:
            self._signals_to_ignore -= 1
            return False
        if _poll_for(poll, self._signal_spin_ns):
            return True
        self._signals_to_ignore = _SHORT_WAITS
        return False

    def record_wait(self, duration_ns: int) -> None:
        """Adapt to a wait that is over. A wait that slept includes the time of a wake-up."""
        if self._spun and self._score:
            return
        short = duration_ns <= self.limit_ns + _WAKE_UP_NS
        self._score = min(_SHORT_WAITS, self._score + 1) if short else 0
        self._spun = False


def _poll_for(poll: Callable[[int], bool], limit_ns: int) -> bool:
    """Call ``poll`` for at most ``limit_ns``; whether a message arrived."""
    until = time.perf_counter_ns() + limit_ns
    while not poll(_ROUNDS_PER_CALL):
        if time.perf_counter_ns() >= until:
            return False
    return True
