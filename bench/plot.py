"""The picture of the last runs: every way to hand over an observation, on one logarithmic scale.

python -m bench.plot
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.contestant import HOMES
from bench.picture_files import save_picture
from bench.records import Records

PATH = Path(__file__).resolve().parents[1] / "docs" / "images" / "transport.webp"
GROUPS = ("64 B", "1 image", "4 images")
_OURS, _PEERS, _FLOOR = "#c2185b", "#455a64", "#2e7d32"


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    records = Records()
    records.load("transport")
    rows = {group: _rows(records, group) for group in GROUPS}
    heights = [len(each) for each in rows.values()]
    figure, panels = plt.subplots(
        len(GROUPS),
        1,
        sharex=True,
        figsize=(9, 0.26 * sum(heights) + 1.6),
        height_ratios=heights,
        layout="constrained",
    )
    for axes, (group, named) in zip(panels, rows.items(), strict=True):
        for place, (name, samples) in enumerate(named):
            p50, p99, p999 = np.percentile(samples, (50, 99, 99.9))
            color = _color(name)
            axes.plot([p50, p999], [place, place], color=color, linewidth=0.9, alpha=0.55)
            axes.plot([p50, p99], [place, place], color=color, linewidth=2.6, alpha=0.75)
            axes.plot(p50, place, "o", color=color, markersize=6)
            axes.annotate(
                f"{p50:,.0f}" if p50 >= 10 else f"{p50:.1f}",
                (p50, place),
                xytext=(-7, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=7,
                color=color,
            )
        axes.set_yticks(range(len(named)), [name for name, _ in named], fontsize=8)
        for label, (name, _) in zip(axes.get_yticklabels(), named, strict=True):
            label.set_color(_color(name))
        axes.invert_yaxis()
        axes.set(xscale="log", title=f"{group} there, {_reply(group)} back")
        axes.title.set_fontsize(9)
        axes.grid(axis="x", which="both", alpha=0.25, linewidth=0.5)
        axes.margins(x=0.08, y=0.03)
    panels[-1].set_xlabel("round trip, µs: median, thick to p99, thin to p99.9")
    handles = [
        Line2D([], [], color=color, marker="o", linewidth=2, label=label)
        for color, label in (
            (_FLOOR, "limit of the machine"),
            (_OURS, "Metronome"),
            (_PEERS, "others"),
        )
    ]
    panels[0].legend(handles=handles, fontsize=8, loc="upper right")
    figure.suptitle(str(records.facts.get("processor", "")), fontsize=8, color="gray")
    PATH.parent.mkdir(parents=True, exist_ok=True)
    save_picture(figure, PATH, (_OURS, _PEERS, _FLOOR, "gray"))
    print(PATH)


def _rows(records: Records, group: str) -> list[tuple[str, np.ndarray]]:
    found = {
        key.rpartition("/")[2]: samples
        for key, samples in records.samples.items()
        if key.rpartition("/")[0] == group
    }
    return sorted(found.items(), key=lambda row: float(np.median(row[1])))


def _color(name: str) -> str:
    if name == "floor":
        return _FLOOR
    return _OURS if HOMES.get(name, "").startswith("bench.ours") else _PEERS


def _reply(group: str) -> str:
    return "64 B" if group == "64 B" else "100x14 float32"


if __name__ == "__main__":
    main()
