"""What a run measured: samples by group and name, as tables and as files.

A group is one comparison: its rows were measured in turns, under the same conditions. Only within
one run, and best within one group, is a ratio worth anything.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.record_files import write_record
from bench.sample_files import COARSE, TICKS_PER_US, in_ticks, read_samples, write_samples

RESULTS = Path(__file__).parent / "results"
STATISTICS: Mapping[str, float] = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}


class Records:
    """Microseconds, by ``group/name``.

    Attributes:
        absent: ``group/name`` of what was to be measured and could not be, with the reason.
        values: Single figures that are not times, by a name that says their unit.
        facts: What else a reader must know of the machine and its settings.
    """

    def __init__(self) -> None:
        self.samples: dict[str, NDArray[np.float32]] = {}
        self.absent: dict[str, str] = {}
        self.values: dict[str, float] = {}
        self.facts: dict[str, Any] = {
            "processor": processor(),
            "system": f"{platform.system()} {platform.release().partition('-')[0]}",
            "python": platform.python_version(),
        }

    def add(self, group: str, samples: Mapping[str, NDArray[Any]]) -> None:
        for name, values in samples.items():
            self.samples[f"{group}/{name}"] = (in_ticks(values) / TICKS_PER_US).astype(np.float32)

    def statistic(self, key: str, which: str = "p50") -> float:
        """``which`` of ``STATISTICS`` of ``group/name`` in µs, or the value of that name.

        Raises:
            KeyError: It was not measured in this run.
        """
        if key in self.values:
            return self.values[key]
        return float(np.percentile(self.samples[key], STATISTICS[which]))

    def has(self, key: str) -> bool:
        return key in self.samples or key in self.values

    def table(self, group: str, *, to: str | None = None) -> str:
        """One group, its rows by their medians.

        Args:
            to: The name to give ratios to, if it is there.
        """
        rows = {k.removeprefix(f"{group}/"): v for k, v in self.samples.items() if _in(k, group)}
        base = np.median(rows[to]) if to in rows else None
        lines = [
            f"{group}, µs",
            f"{'':24}{'p50':>10}{'p99':>10}{'p99.9':>10}{'max':>10}{'count':>8}"
            + (f"   ÷ {to}" if base else ""),
        ]
        for name, values in sorted(rows.items(), key=lambda row: float(np.median(row[1]))):
            figures = np.percentile(values, list(STATISTICS.values()))
            line = f"{name:24}" + "".join(f"{value:10.1f}" for value in figures)
            lines.append(line + f"{values.size:8}" + (f"{figures[0] / base:9.2f}" if base else ""))
        for key, reason in self.absent.items():
            if _in(key, group):
                lines.append(f"{key.removeprefix(f'{group}/'):24}absent: {reason}")
        return "\n".join(lines)

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(key.rpartition("/")[0] for key in (*self.samples, *self.absent)))

    def save(self, stem: str, group: str = "", *, growth: float = COARSE) -> None:
        """Write ``results/STEM.npz`` (samples, thinned) and ``STEM.json`` (figures of all of them).

        What these files hold of other groups than ``group`` stays, so that a long run adds to a
        short one; all groups if none is named. ``growth``: see ``bench.sample_files``.
        """
        before = Records()
        before.load(stem)
        chosen = {
            **{key: each for key, each in before.samples.items() if not _in(key, group)},
            **{key: each for key, each in self.samples.items() if not group or _in(key, group)},
        }
        RESULTS.mkdir(exist_ok=True)
        write_samples(RESULTS / f"{stem}.npz", chosen, growth=growth)
        record = {
            "unit": "µs",
            "facts": {**before.facts, **self.facts},
            "values": {**before.values, **self.values},
            "absent": {
                **{key: why for key, why in before.absent.items() if not _in(key, group)},
                **self.absent,
            },
            "figures": {
                key: {w: float(f"{np.percentile(each, q):.4g}") for w, q in STATISTICS.items()}
                | {"count": int(each.size)}
                for key, each in chosen.items()
            },
        }
        write_record(RESULTS / f"{stem}.json", record)

    def load(self, stem: str) -> None:
        """Add what ``save`` wrote, if anything: of its samples, those that it kept are exact."""
        thinned, figures = RESULTS / f"{stem}.npz", RESULTS / f"{stem}.json"
        if thinned.exists() and figures.exists():
            self.samples |= read_samples(thinned)
            record = json.loads(figures.read_text(encoding="utf-8"))
            self.facts |= record["facts"]
            self.values |= record["values"]
            self.absent |= record["absent"]


def _in(key: str, group: str) -> bool:
    return key.rpartition("/")[0] == group


def processor() -> str:
    """The processor's name, as the kernel has it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
