"""How often a session may ask."""

from __future__ import annotations

BURST_S = 0.25
"""What a session may save up: a stall's worth of requests, not a flood."""


class TokenBucket:
    """A token bucket: ``rate_hz`` requests per second, at most ``BURST_S`` of them (but two) at
    once."""

    def __init__(self, rate_hz: float) -> None:
        self.rate_hz = rate_hz
        self._most = max(2.0, rate_hz * BURST_S)
        self._left, self._at_ns = self._most, 0

    def allows(self, now_ns: int) -> bool:
        """Whether one more may come at ``now_ns``, which is then spent."""
        earned = (now_ns - self._at_ns) / 1e9 * self.rate_hz if self._at_ns else 0.0
        self._left, self._at_ns = min(self._most, self._left + earned), now_ns
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
