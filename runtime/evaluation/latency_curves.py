"""Success and smoothness against latency, one curve per strategy, from the points' result files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.evaluation.result_file import read_result
from runtime.evaluation.results import wilson_95
from runtime.evaluation.success_statistics import (
    PairCounts,
    detectable_difference,
    mcnemar_exact,
    paired_difference_95,
)


@dataclass(frozen=True, slots=True)
class LatencyPoint:
    """One strategy at one latency.

    Attributes:
        strategy: As given, e.g. ``temporal_ensemble:5``.
        latency_ms: The dial's.
        outcomes: Success by seed.
        wilson_95: Interval of the success rate.
        success_s: Mean time to success, in seconds; None without a success.
        starved_share: Starved ticks divided by all ticks.
        largest_seam: Largest seam of any episode, in the action's unit.
        jerk: Median over the episodes of the commanded path's RMS jerk; None if none has it.
        chunks_per_s: Inferences used per second of the world.
        delay_p50_s: Median delay of an answer, in seconds.
        result: The result file.
    """

    strategy: str
    latency_ms: float
    outcomes: dict[int, bool]
    wilson_95: tuple[float, float]
    success_s: float | None
    starved_share: float
    largest_seam: float
    jerk: float | None
    chunks_per_s: float
    delay_p50_s: float
    result: Path

    @property
    def success_rate(self) -> float:
        """Successes divided by episodes."""
        return sum(self.outcomes.values()) / len(self.outcomes)


@dataclass(frozen=True, slots=True)
class LatencyCurve:
    """One strategy over all latencies.

    Attributes:
        points: By rising latency.
        detectable: Smallest drop of the success rate from the first point that a paired test of
            this many episodes finds with a probability of 80 %; None if it finds none.
    """

    points: tuple[LatencyPoint, ...]
    detectable: float | None

    @classmethod
    def of(cls, points: Sequence[LatencyPoint]) -> LatencyCurve:
        """Make a curve of the points of one strategy, at least one."""
        ordered = tuple(sorted(points, key=lambda point: point.latency_ms))
        first = ordered[0]
        return cls(ordered, detectable_difference(first.success_rate, len(first.outcomes)))

    @property
    def detectable_text(self) -> str:
        """``detectable`` in words."""
        return "none" if self.detectable is None else f"{100 * self.detectable:.1f} points"

    def drop(self, point: LatencyPoint) -> Drop:
        """Compare ``point`` with the curve's first one."""
        return Drop.of(self.points[0], point)


@dataclass(frozen=True, slots=True)
class Drop:
    """The difference of two points' success rates over the seeds that both have.

    Attributes:
        difference: The second rate minus the first.
        interval_95: Its 95 % interval.
        p_value: Of McNemar's exact test.
    """

    difference: float
    interval_95: tuple[float, float]
    p_value: float

    @classmethod
    def of(cls, first: LatencyPoint, second: LatencyPoint) -> Drop:
        """Compare two points."""
        seeds = [seed for seed in first.outcomes if seed in second.outcomes]
        pairs = PairCounts.of(
            [first.outcomes[seed] for seed in seeds], [second.outcomes[seed] for seed in seeds]
        )
        return cls(
            pairs.difference,
            paired_difference_95(pairs),
            float(mcnemar_exact(pairs.only_first, pairs.only_second)),
        )


def read_point(path: Path, strategy: str, latency_ms: float) -> LatencyPoint:
    """Read one point's result file.

    Raises:
        ComparisonError: It is no complete result file.
    """
    outcomes = read_result(path).outcomes
    result: dict[str, Any] = json.loads(path.read_text())
    timing, dt_s = result["timing"], result["world"]["dt_s"]
    jerks = [e["command_jerk"] for e in result["episodes"] if e["command_jerk"] is not None]
    ticks = result["horizon_success"]
    return LatencyPoint(
        strategy=strategy,
        latency_ms=latency_ms,
        outcomes=outcomes,
        wilson_95=wilson_95(sum(outcomes.values()), len(outcomes)),
        success_s=None if ticks is None else ticks * dt_s,
        starved_share=timing["starved_ticks"] / timing["ticks"],
        largest_seam=timing["seam_jump"],
        jerk=float(np.median(jerks)) if jerks else None,
        chunks_per_s=timing["chunks"] / (timing["ticks"] * dt_s),
        delay_p50_s=timing["answer_delay"]["p50"],
        result=path,
    )


def as_json(curves: Sequence[LatencyCurve]) -> list[dict[str, Any]]:
    """Return all numbers as JSON types."""
    return [
        {
            "strategy": curve.points[0].strategy,
            "detectable_difference": curve.detectable,
            "points": [_point_json(curve, point) for point in curve.points],
        }
        for curve in curves
    ]


def _point_json(curve: LatencyCurve, point: LatencyPoint) -> dict[str, Any]:
    drop = curve.drop(point)
    return {
        "latency_ms": point.latency_ms,
        "total": len(point.outcomes),
        "total_success": sum(point.outcomes.values()),
        "wilson_95": point.wilson_95,
        "difference": drop.difference,
        "difference_95": drop.interval_95,
        "p_value": drop.p_value,
        "success_s": point.success_s,
        "starved_share": point.starved_share,
        "largest_seam": point.largest_seam,
        "jerk": point.jerk,
        "chunks_per_s": point.chunks_per_s,
        "delay_p50_s": point.delay_p50_s,
        "result": str(point.result),
    }


HEADER = (
    "| strategy | latency ms | success | 95 % | difference to the first (95 %), points "
    "| time to success s | starved | largest seam | jerk | inferences/s |"
)


def format_table(curves: Sequence[LatencyCurve]) -> str:
    """Return a Markdown table of all points, and below it what each curve can detect."""
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for curve in curves:
        lines += [_row(curve, point) for point in curve.points]
    lines.append("")
    for curve in curves:
        first = curve.points[0]
        lines.append(
            f"{first.strategy}: {len(first.outcomes)} episodes a point find a drop of "
            f"{curve.detectable_text} from {first.latency_ms:g} ms in 4 of 5 cases"
        )
    return "\n".join(lines)


def _row(curve: LatencyCurve, point: LatencyPoint) -> str:
    low, high = (100 * limit for limit in point.wilson_95)
    drop = curve.drop(point)
    below, above = (100 * limit for limit in drop.interval_95)
    compared = f"{100 * drop.difference:+.1f} ({below:+.1f} to {above:+.1f})"
    cells = (
        point.strategy,
        f"{point.latency_ms:g}",
        f"{sum(point.outcomes.values())}/{len(point.outcomes)}",
        f"{low:.1f} to {high:.1f}",
        "" if point is curve.points[0] else compared,
        "-" if point.success_s is None else f"{point.success_s:.2f}",
        f"{100 * point.starved_share:.1f} %",
        f"{point.largest_seam:.3f}",
        "-" if point.jerk is None else f"{point.jerk:.0f}",
        f"{point.chunks_per_s:.1f}",
    )
    return f"| {' | '.join(cells)} |"
