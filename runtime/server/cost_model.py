"""Inference durations by batch size, from the newest inferences."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

WINDOW = 64
"""Durations remembered per batch size."""
_RECOMPUTE_EVERY = 8
"""The three figures are computed again after this many new durations."""


class InferenceCostModel:
    """Durations in ns by batch size; integers in, integers out.

    There are three figures, because the decisions differ in what an error costs:

    * ``min`` decides whether a request has expired, so that one slow inference never makes the
      server refuse the next requests.
    * ``median`` compares batch sizes.
    * ``near_max``, the second largest of the window, decides where a robot's deadline depends on
      it; the largest is left out because it may be one interruption.

    A size without a measurement costs its multiple of a single observation.

    Args:
        known: Durations in ns by batch size, one each.
    """

    def __init__(self, known: Mapping[int, int] | None = None) -> None:
        self._durations_ns: dict[int, deque[int]] = {}
        self._since_recomputed: dict[int, int] = {}
        self._figures: dict[int, tuple[int, int, int]] = {}
        for size, duration_ns in (known or {}).items():
            self.add(size, duration_ns)

    def add(self, size: int, duration_ns: int) -> None:
        """Add the duration of one inference of ``size`` observations."""
        durations_ns = self._durations_ns.get(size)
        if durations_ns is None:
            durations_ns = self._durations_ns[size] = deque(maxlen=WINDOW)
        durations_ns.append(duration_ns)
        since = self._since_recomputed.get(size, _RECOMPUTE_EVERY) + 1
        if since >= _RECOMPUTE_EVERY or len(durations_ns) < _RECOMPUTE_EVERY:
            ordered = sorted(durations_ns)
            middle, last = ordered[len(ordered) // 2], ordered[max(0, len(ordered) - 2)]
            self._figures[size] = ordered[0], middle, max(middle, last)
            since = 0
        self._since_recomputed[size] = since

    def min(self, size: int = 1) -> int:
        """The shortest duration in ns; 0 if nothing is known."""
        return self._figure(size, 0)

    def median(self, size: int = 1) -> int:
        """The median duration in ns; 0 if nothing is known."""
        return self._figure(size, 1)

    def near_max(self, size: int = 1) -> int:
        """The second longest duration in ns, at least the median; 0 if nothing is known."""
        return self._figure(size, 2)

    def as_dict(self) -> dict[int, dict[str, float]]:
        """The figures in ms by batch size.

        The keys are ``least`` (min), ``usual`` (median) and ``most`` (near_max).
        """
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
