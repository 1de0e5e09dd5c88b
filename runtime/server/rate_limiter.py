"""A token bucket that limits the requests per second of a session."""

from __future__ import annotations

BURST_S = 0.25
"""How many seconds of requests a session may send at once, after a pause."""


class TokenBucket:
    """Allows ``rate_hz`` requests per second, and ``rate_hz * BURST_S``, at least 2, at once."""

    def __init__(self, rate_hz: float) -> None:
        self.rate_hz = rate_hz
        self._capacity = max(2.0, rate_hz * BURST_S)
        self._tokens, self._updated_ns = self._capacity, 0

    def allows(self, now_ns: int) -> bool:
        """Whether a request at ``now_ns`` (monotonic) is allowed; if so, it takes a token."""
        earned = (now_ns - self._updated_ns) / 1e9 * self.rate_hz if self._updated_ns else 0.0
        self._tokens, self._updated_ns = min(self._capacity, self._tokens + earned), now_ns
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
