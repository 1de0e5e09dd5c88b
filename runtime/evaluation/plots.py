"""Plots of results: the timing of one evaluation, the success rates of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime.evaluation.episode_result import Episode
from runtime.evaluation.video import import_matplotlib
from runtime.latency_stats import StageTimes

if TYPE_CHECKING:
    from runtime.evaluation.latency_curves import LatencyCurve


def write_timing_plot(path: Path, episodes: Sequence[Episode], title: str) -> None:
    """Write a PNG: the complementary cumulative distribution of every duration, log-log.

    A point (t, p) means that a fraction p of the samples is longer than t. A steep curve means
    steady timing; a long right tail means late commands.
    """
    import_matplotlib()
    from matplotlib import pyplot as plt

    stages = StageTimes()
    for episode in episodes:
        stages.extend(episode.stages_ns)
    curves = {name: np.asarray(values) / 1e9 for name, values in stages.samples_ns().items()}
    for name in ("lateness_s", "action_age_s"):
        samples = np.concatenate([getattr(episode, name) for episode in episodes])
        curves[name.removesuffix("_s").replace("_", " ")] = samples
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    thick = {"request": "black", "lateness": "red", "action age": "blue"}
    for name, samples in curves.items():
        positive = np.sort(samples[samples > 0])
        if positive.size:
            share = 1 - np.arange(positive.size) / positive.size
            axes.step(
                1e3 * positive,
                share,
                where="post",
                label=name,
                color=thick.get(name),
                linewidth=2.2 if name in thick else 1.0,
            )
    axes.set(xscale="log", yscale="log", xlabel="ms", ylabel="share of samples above", title=title)
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


Estimate = tuple[float, float, float]
"""A value with the limits of its 95 % interval."""


def write_comparison_plot(
    path: Path, rates: Mapping[str, Estimate], differences: Mapping[str, Estimate]
) -> None:
    """Write a picture: success rates on the left, their differences on the right, in per cent.

    Args:
        path: The file; its suffix chooses the format, PNG without one.
        rates: By the evaluation's label.
        differences: By what is subtracted, e.g. ``B - A``.

    Raises:
        ValueError: matplotlib does not know the format.
        OSError: The file cannot be written.
    """
    import_matplotlib()
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, estimates in ((left, rates), (right, differences)):
        values, low, high = 100 * np.array(list(estimates.values())).T
        axes.errorbar(
            np.arange(len(values)), values, (values - low, high - values), fmt="o", capsize=5
        )
        axes.set_xticks(np.arange(len(values)), list(estimates))
        axes.margins(x=0.3)
        axes.grid(alpha=0.3, axis="y")
    left.set(ylabel="success, %", title="success rate, 95 % interval")
    right.set(ylabel="points", title="difference, 95 % interval")
    right.axhline(0, color="black", linewidth=0.8)
    try:
        figure.savefig(path, dpi=120)
    finally:
        plt.close(figure)


def write_latency_plot(path: Path, curves: Sequence[LatencyCurve], title: str) -> None:
    """Write a picture: success, starved ticks, largest seam and jerk against latency.

    Raises:
        ValueError: matplotlib does not know the format of ``path``'s suffix.
        OSError: The file cannot be written.
    """
    import_matplotlib()
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex=True)
    success, starved, seam, jerk = grid.flat
    for curve in curves:
        points, name = curve.points, curve.points[0].strategy
        latency = [point.latency_ms for point in points]
        rate = 100 * np.array([point.success_rate for point in points])
        low, high = 100 * np.array([point.wilson_95 for point in points]).T
        success.errorbar(
            latency,
            rate,
            (rate - low, high - rate),
            marker="o",
            capsize=3,
            label=f"{name} (finds a drop of {curve.detectable_text})",
        )
        starved.plot(latency, [100 * point.starved_share for point in points], "o-")
        seam.plot(latency, [point.largest_seam for point in points], "o-")
        jerk.plot(latency, [np.nan if p.jerk is None else p.jerk for p in points], "o-")
    success.set(ylabel="success, %, with 95 % interval", ylim=(-3, 103))
    starved.set(ylabel="starved ticks, %")
    seam.set(ylabel="largest seam", xlabel="latency, ms")
    jerk.set(ylabel="median RMS jerk, 1/s³", xlabel="latency, ms")
    for axes in (starved, seam, jerk):
        axes.set_ylim(bottom=0)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    success.legend(fontsize=7)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=100)
    finally:
        plt.close(figure)
