"""How often a tick is later than x: one panel per rate and load, both axes logarithmic."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

from bench.picture_files import save_picture
from bench.records import RESULTS, Records

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

PICTURE = RESULTS / "jitter.webp"
COLOURS = {
    "ours, FIFO, spin": ("#1b7837", "-"),
    "ours, FIFO": ("#1b7837", "--"),
    "cyclictest, FIFO": ("black", "-"),
    "ours, spin": ("#2166ac", "-"),
    "ours": ("#2166ac", "--"),
    "ILStudio": ("#b2182b", "-"),
    "openpi": ("#ef8a62", "-"),
    "LeRobot": ("#d6604d", "--"),
    "cyclictest": ("grey", "-"),
}
LEAST_US = 0.05
"""Where the axis begins; what is earlier is drawn there."""


def draw(records: Records, path: Path = PICTURE) -> Path | None:
    """Draw every group of lateness in ``records``; None if there is none."""
    groups = [group for group in records.groups if group.startswith("lateness ")]
    groups = [g for g in groups if any(key.startswith(f"{g}/") for key in records.samples)]
    if not groups:
        return None
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.0 * columns, 3.0 * rows), sharex=True, sharey=True, squeeze=False
    )
    for axis, group in zip(axes.flat, sorted(groups, key=_order), strict=False):
        for name, (colour, style) in COLOURS.items():
            samples = records.samples.get(f"{group}/{name}")
            if samples is None:
                continue
            ordered = np.sort(np.maximum(samples, LEAST_US))
            share = 1.0 - np.arange(ordered.size) / ordered.size
            axis.step(
                ordered,
                share,
                where="pre",
                color=colour,
                linestyle=style,
                linewidth=1.3,
            )
        axis.set(xscale="log", yscale="log", title=group)
        axis.grid(visible=True, which="major", alpha=0.3)
    styles = [Line2D([], [], color=c, linestyle=s, label=name) for name, (c, s) in COLOURS.items()]
    axes[0, 0].legend(handles=styles, fontsize=8, loc="lower left")
    for axis in axes[-1]:
        axis.set_xlabel("lateness, µs")
    for axis in axes[:, 0]:
        axis.set_ylabel("share of ticks that are later")
    for axis in list(axes.flat)[len(groups) :]:
        axis.set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    save_picture(figure, path, (colour for colour, _ in COLOURS.values()), dpi=64)
    plt.close(figure)
    return path


def _order(group: str) -> tuple[int, str]:
    _, hz, _, load = group.split(" ")
    return int(hz), load
