"""What may cost how much: ``budgets.yaml``, held against the records of one run.

A budget is a ratio to something measured in the same run, or a distance from it; a machine's speed
cancels out. What was not measured is neither met nor missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from bench.records import STATISTICS, Records

PATH = Path(__file__).with_name("budgets.yaml")


@dataclass(frozen=True)
class Budget:
    """``of`` ÷ the smallest of ``over`` is to be at most ``at_most``.

    Attributes:
        what: In words.
        of, over: ``group/name`` of the records; without ``over``, ``of`` alone.
        statistic, over_statistic: Which figure of each.
        minus: The difference is meant instead of the ratio.
        unit: Of the figure, for the table.
    """

    what: str
    of: str
    at_most: float
    over: tuple[str, ...] = ()
    statistic: str = "p50"
    over_statistic: str = "p50"
    minus: bool = False
    unit: str = ""

    def __post_init__(self) -> None:
        for name in (self.statistic, self.over_statistic):
            if name not in STATISTICS:
                raise ValueError(
                    f"{self.what}: got statistic {name!r}, expected one of {tuple(STATISTICS)}"
                )

    def value(self, records: Records) -> float | None:
        """What it came to; None when one side of it was not measured."""
        if not records.has(self.of):
            return None
        value = records.statistic(self.of, self.statistic)
        if not self.over:
            return value
        others = [
            records.statistic(key, self.over_statistic) for key in self.over if records.has(key)
        ]
        if not others:
            return None
        return value - min(others) if self.minus else value / min(others)


def load(path: Path = PATH) -> list[Budget]:
    """The budgets of a file.

    Raises:
        TypeError, ValueError: An entry that is not one; names it.
    """
    budgets = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        try:
            budgets.append(Budget(**{**entry, "over": tuple(entry.get("over", ()))}))
        except TypeError as error:
            raise TypeError(f"{path.name}: {entry}: {error}") from error
    return budgets


def report(budgets: list[Budget], records: Records) -> tuple[str, list[str]]:
    """(the table, what was exceeded)."""
    lines, exceeded = [f"{'budget':68}{'got':>10}{'at most':>10}"], []
    for budget in budgets:
        value = budget.value(records)
        if value is None:
            lines.append(f"{budget.what:68}{'-':>10}{budget.at_most:10.3g}{budget.unit:>3}")
            continue
        over = value > budget.at_most
        line = f"{budget.what:68}{value:10.3g}{budget.at_most:10.3g}{budget.unit:>3}"
        lines.append(line + ("  EXCEEDED" if over else ""))
        if over:
            exceeded.append(f"{budget.what}: got {value:.3g}, at most {budget.at_most:g}")
    return "\n".join(lines), exceeded
