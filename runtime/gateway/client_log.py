"""A gateway's log of its clients, which no client can fill."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

BURST = 50
"""Most lines of a level at once."""
EVERY_S = 1.0
"""Then a line of a level in this time, seconds."""


class ClientLog:
    """Writes a bounded number of lines per time. Thread-safe.

    Each level has a budget of its own, so that many connections hide no error. The next line of a
    level says how many were left out before it.

    Args:
        logger: Of the module whose lines these are.
        clock: Monotonic seconds.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._clock = logger, clock
        self._lock = threading.Lock()
        self._budgets: dict[int, _Budget] = {}

    def write(self, level: int, text: str, *, with_traceback: bool = False) -> None:
        """Write ``text``, or count it if the level has had too many lines."""
        if not self._logger.isEnabledFor(level):
            return
        with self._lock:
            budget = self._budgets.setdefault(level, _Budget(self._clock()))
            left_out = budget.spend(self._clock())
        if left_out is None:
            return
        if left_out:
            text += f" (before it, {left_out} lines were left out)"
        self._logger.log(level, "%s", text, exc_info=with_traceback)


class _Budget:
    """The lines of a level: ``BURST`` at first, and one more every ``EVERY_S``."""

    def __init__(self, now_s: float) -> None:
        self._lines, self._at_s, self._left_out = float(BURST), now_s, 0

    def spend(self, now_s: float) -> int | None:
        """Take a line. Returns how many were left out before it; None if there is none to take."""
        self._lines = min(float(BURST), self._lines + (now_s - self._at_s) / EVERY_S)
        self._at_s = now_s
        if self._lines < 1:
            self._left_out += 1
            return None
        self._lines -= 1
        left_out, self._left_out = self._left_out, 0
        return left_out


class ClientErrors:
    """The errors of one client: a line when a kind of them begins, and one when it is over.

    Args:
        log: The gateway's.
        name: The client's.
    """

    def __init__(self, log: ClientLog, name: str) -> None:
        self._log, self._name = log, name
        self._kind, self._more = "", 0

    def failed(self, kind: str, reason: str) -> None:
        """A request failed. It is only counted if the one before failed in the same way.

        Args:
            kind: What makes two errors the same; not empty.
            reason: What the log says about the first one.
        """
        if kind == self._kind:
            self._more += 1
            return
        self._log.write(logging.WARNING, f"{self._name}: {reason}{self._count()}")
        self._kind = kind

    def worked(self) -> None:
        """A request did not fail."""
        if self._kind:
            self._log.write(logging.WARNING, f"{self._name}: requests succeed again{self._count()}")
            self._kind = ""

    def _count(self) -> str:
        more, self._more = self._more, 0
        return f" (after {more} more errors like the last one)" if more else ""
