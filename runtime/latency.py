"""Durations summed up the same way everywhere: p50, p99, p99.9, max and the count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from policies.types import STAGES


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a set of durations; seconds unless the name of the field that holds it says else."""

    count: int
    p50: float
    p99: float
    p999: float
    max: float

    @classmethod
    def of(cls, samples: ArrayLike) -> Percentiles:
        values = np.asarray(samples, np.float64)
        if values.size == 0:
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        p50, p99, p999 = np.percentile(values, (50, 99, 99.9))
        return cls(int(values.size), float(p50), float(p99), float(p999), float(values.max()))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def in_ms(self) -> str:
        """e.g. ``p50 1.20  p99 1.90  p99.9 2.00  max 2.10 ms (n=400)``."""
        if not self.count:
            return "none"
        p50, p99, p999, worst = (1e3 * v for v in (self.p50, self.p99, self.p999, self.max))
        return (
            f"p50 {p50:.2f}  p99 {p99:.2f}  p99.9 {p999:.2f}  max {worst:.2f} ms (n={self.count})"
        )


REQUEST = "request"
"""The sum of a request's stages, kept beside them."""


class StageTimes:
    """Collects the stage durations of many requests, and each request's total."""

    def __init__(self) -> None:
        self._samples_ns: dict[str, list[int]] = {name: [] for name in (*STAGES, REQUEST)}

    def add(self, stages_ns: Mapping[str, int]) -> None:
        """One request. Stages of somebody's own count towards its total only."""
        for stage in STAGES:
            if stage in stages_ns:
                self._samples_ns[stage].append(stages_ns[stage])
        self._samples_ns[REQUEST].append(sum(stages_ns.values()))

    def extend(self, samples_ns: Mapping[str, list[int]]) -> None:
        """What another one's ``samples_ns`` said."""
        for name, durations_ns in samples_ns.items():
            self._samples_ns[name].extend(durations_ns)

    def samples_ns(self) -> dict[str, list[int]]:
        """Raw durations by stage, and ``REQUEST``; only what occurred."""
        return {name: list(values) for name, values in self._samples_ns.items() if values}

    def percentiles(self) -> dict[str, Percentiles]:
        """Seconds, by the names of ``samples_ns``."""
        return {
            name: Percentiles.of(np.asarray(values) / 1e9)
            for name, values in self._samples_ns.items()
            if values
        }
