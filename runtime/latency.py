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


class StageTimes:
    """Collects the stage durations of many requests."""

    def __init__(self) -> None:
        self._samples_ns: dict[str, list[int]] = {stage: [] for stage in STAGES}

    def add(self, stages_ns: Mapping[str, int]) -> None:
        for stage, duration_ns in stages_ns.items():
            self._samples_ns[stage].append(duration_ns)

    def extend(self, samples_ns: Mapping[str, list[int]]) -> None:
        for stage, durations_ns in samples_ns.items():
            self._samples_ns[stage].extend(durations_ns)

    def samples_ns(self) -> dict[str, list[int]]:
        """Raw durations by stage; only the stages that occurred."""
        return {stage: list(values) for stage, values in self._samples_ns.items() if values}

    def percentiles(self) -> dict[str, Percentiles]:
        return {
            stage: Percentiles.of(np.asarray(values) / 1e9)
            for stage, values in self._samples_ns.items()
            if values
        }
