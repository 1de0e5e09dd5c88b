"""What an inference costs, by batch size, as the newest ones say."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

WINDOW = 64
"""Inferences remembered per size."""
_NEWS = 8
"""Figures are worked out again after so many."""


class InferenceCostModel:
    """Durations in ns by batch size; integers in, integers out.

    Three figures, since decisions differ in what a mistake costs. ``least``: before a request is
    refused for being late, so that one slow inference never refuses the next ones. ``usual``
    (median): to compare batch sizes. ``most`` (the worst but one of the window, so that one
    interruption does not count): where a robot's deadline depends on it.

    A size never seen costs as many times the single one.
    """

    def __init__(self, known: Mapping[int, int] | None = None) -> None:
        self._seen: dict[int, deque[int]] = {}
        self._news: dict[int, int] = {}
        self._figures: dict[int, tuple[int, int, int]] = {}
        for size, duration_ns in (known or {}).items():
            self.add(size, duration_ns)

    def add(self, size: int, duration_ns: int) -> None:
        """One inference of ``size`` observations took that long."""
        seen = self._seen.get(size)
        if seen is None:
            seen = self._seen[size] = deque(maxlen=WINDOW)
        seen.append(duration_ns)
        news = self._news.get(size, _NEWS) + 1
        if news >= _NEWS or len(seen) < _NEWS:
            ordered = sorted(seen)
            middle, last = ordered[len(ordered) // 2], ordered[max(0, len(ordered) - 2)]
            self._figures[size] = ordered[0], middle, max(middle, last)
            news = 0
        self._news[size] = news

    def least(self, size: int = 1) -> int:
        return self._figure(size, 0)

    def usual(self, size: int = 1) -> int:
        return self._figure(size, 1)

    def most(self, size: int = 1) -> int:
        return self._figure(size, 2)

    def as_dict(self) -> dict[int, dict[str, float]]:
        """Milliseconds, by size."""
        return {
            size: dict(zip(("least", "usual", "most"), (v / 1e6 for v in figures), strict=True))
            for size, figures in sorted(self._figures.items())
        }

    def _figure(self, size: int, which: int) -> int:
        figures = self._figures.get(size)
        if figures is not None:
            return figures[which]
        single = self._figures.get(1)
        return 0 if single is None else size * single[which]
