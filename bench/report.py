"""The tables and budgets of the last runs: ``python -m bench.report``."""

from __future__ import annotations

from bench import budgets
from bench.records import Records


def main() -> None:
    records = Records()
    records.load("transport")
    for group in records.groups:
        print(records.table(group, to="floor"), end="\n\n")
    for name, value in records.values.items():
        print(f"{name}: {value:.3g}")
    print("\n" + budgets.report(budgets.load(), records)[0])


if __name__ == "__main__":
    main()
