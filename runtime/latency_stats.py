"""Latency statistics: percentiles, stage durations, and estimates of when to send a request."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from policies.types import STAGES


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles, maximum and count of a set of durations.

    Seconds, unless the name of the field that holds it has another unit.
    """

    count: int
    p50: float
    p99: float
    p999: float
    max: float

    @classmethod
    def of(cls, samples: ArrayLike) -> Percentiles:
        """Compute them from durations; all zero for an empty set. numpy's linear interpolation."""
        values = np.asarray(samples, np.float64)
        if values.size == 0:
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        p50, p99, p999 = np.percentile(values, (50, 99, 99.9))
        return cls(int(values.size), float(p50), float(p99), float(p999), float(values.max()))

    def as_dict(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

    def in_ms(self) -> str:
        """The values, in seconds, as text in milliseconds.

        E.g. ``p50 1.20  p99 1.90  p99.9 2.00  max 2.10 ms (n=400)``.
        """
        if not self.count:
            return "none"
        p50, p99, p999, worst = (1e3 * v for v in (self.p50, self.p99, self.p999, self.max))
        return (
            f"p50 {p50:.2f}  p99 {p99:.2f}  p99.9 {p999:.2f}  max {worst:.2f} ms (n={self.count})"
        )


class RequestLatency:
    """The p99 latency of the newest requests, which decides when to send the next one.

    The p99 of the newest ``window`` replies, by nearest rank from above; with fewer than 100 it is
    the maximum. The first ``warmup`` replies include one-time start-up work. They count only until
    there are others. The estimate never decides at which tick an action is executed.

    Args:
        warmup: Replies at the start that are not counted.
        window: Replies remembered.
    """

    def __init__(self, warmup: int = 3, window: int = 1000) -> None:
        self._skipped, self._warmup = 0, warmup
        self._samples_ns = np.zeros(window, np.int64)
        self._sorted_ns = np.zeros(window, np.int64)
        self._count = 0
        self._p99_ns = 0

    def add(self, latency_ns: int) -> None:
        """Add one reply: ns from the capture of its observation until its actions were usable."""
        if self._skipped < self._warmup:
            self._skipped += 1
            self._p99_ns = max(self._p99_ns, latency_ns)
            return
        self._samples_ns[self._count % len(self._samples_ns)] = latency_ns
        self._count += 1
        held = min(self._count, len(self._samples_ns))
        ordered = self._sorted_ns[:held]
        ordered[:] = self._samples_ns[:held]
        ordered.sort()
        self._p99_ns = int(ordered[min(held - 1, math.ceil(0.99 * held))])

    @property
    def p99_s(self) -> float:
        """The p99 in seconds; 0 before the first reply."""
        return self._p99_ns / 1e9

    def ticks(self, dt_s: float) -> int:
        """How many ticks of ``dt_s`` ahead to send a request: the p99, rounded up, plus one.

        The extra tick is needed because a reply is read only at the start of a tick.
        """
        return math.ceil(self._p99_ns / (dt_s * 1e9)) + 1


REQUEST = "request"
"""The key of a request's total, beside the names of its stages."""


class StageTimes:
    """Stage durations of many requests, and each request's total."""

    def __init__(self) -> None:
        self._samples_ns: dict[str, list[int]] = {name: [] for name in (*STAGES, REQUEST)}

    def add(self, stages_ns: Mapping[str, int]) -> None:
        """Add one request, ns by stage. Stages not in ``STAGES`` count only in the total."""
        for stage in STAGES:
            if stage in stages_ns:
                self._samples_ns[stage].append(stages_ns[stage])
        self._samples_ns[REQUEST].append(sum(stages_ns.values()))

    def extend(self, samples_ns: Mapping[str, list[int]]) -> None:
        """Add the ``samples_ns`` of another ``StageTimes``."""
        for name, durations_ns in samples_ns.items():
            self._samples_ns[name].extend(durations_ns)

    def samples_ns(self) -> dict[str, list[int]]:
        """Durations in ns by stage and ``REQUEST``; stages without a sample are left out."""
        return {name: list(values) for name, values in self._samples_ns.items() if values}

    def percentiles(self) -> dict[str, Percentiles]:
        """Percentiles in seconds, by the names of ``samples_ns``."""
        return {
            name: Percentiles.of(np.asarray(values) / 1e9)
            for name, values in self._samples_ns.items()
            if values
        }


class LatencyEstimate:
    """How many ticks ahead to send a request: twice the largest of the newest latencies.

    Used only to decide when to send. An early request makes the actions slightly older; a late one
    stops the arm, so the margin is large. With this few samples the maximum stands for the p99.
    """

    MARGIN = 2.0

    def __init__(self, dt_s: float, window: int = 100) -> None:
        self._dt_ns = dt_s * 1e9
        self._samples_ns: deque[int] = deque(maxlen=window)

    def add(self, latency_ns: int) -> None:
        """Add the latency of one reply, ns."""
        self._samples_ns.append(latency_ns)

    def ticks(self) -> int:
        """Ticks, rounded up, at least 1: a reply is read at the tick after its arrival."""
        return math.ceil(self.MARGIN * max(self._samples_ns, default=0) / self._dt_ns) + 1
