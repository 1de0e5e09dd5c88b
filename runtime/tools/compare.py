"""``metronome compare A.json B.json ...``: compare the success rates of evaluations.

Exit status: 0 compared, whether or not there is a difference; 2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from policies.command_line import CommandLine
from policies.flag_builder import Flag, add_flags, from_flags
from policies.standard_streams import run_command
from runtime.errors import ComparisonError
from runtime.evaluation.comparison import Comparison, compare_results
from runtime.evaluation.result_file import ResultFile, read_result
from runtime.evaluation.results import wilson_95, write_atomically
from runtime.latency_stats import Percentiles

BAD_INPUT = 2
MOST_FILES = len(string.ascii_uppercase)
MOST_SEEDS = 20
"""Discordant seeds printed of each kind; the JSON file has all."""


@dataclass(frozen=True, slots=True)
class CompareCommand:
    """The arguments of ``metronome compare``."""

    results: Annotated[
        tuple[Path, ...],
        Flag(
            "result files of eval-sim or eval-real, at least two", positional=True, metavar="RESULT"
        ),
    ]
    sequential: Annotated[
        bool, Flag("use a test that may be looked at after every episode; needs the same seeds")
    ] = False
    plot: Annotated[Path | None, Flag("write the rates and their differences as a picture")] = None
    json: Annotated[Path | None, Flag("write all numbers as JSON")] = None


def parser() -> argparse.ArgumentParser:
    """Return the parser, with one argument per flag of ``CompareCommand``."""
    cli = CommandLine(
        prog="metronome compare",
        description="Compare the success rates and the timing of evaluations.",
    )
    add_flags(cli, CompareCommand)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the files and print a table; return the exit status."""
    try:
        command = from_flags(CompareCommand, parser().parse_args(argv))
        if len(command.results) > MOST_FILES:
            raise ComparisonError(
                f"result files: got {len(command.results)}, expected at most {MOST_FILES}"
            )
        results = [read_result(path) for path in command.results]
        comparisons = compare_results(results, sequential=command.sequential)
        if command.json is not None:
            content = json.dumps(as_json(results, comparisons), indent=2)
            write_atomically(command.json, content.encode())
        if command.plot is not None:
            _plot(command.plot, results, comparisons)
    except (ComparisonError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return BAD_INPUT
    print(format_comparison(results, comparisons))
    return 0


def as_json(results: Sequence[ResultFile], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return everything that was read and computed, as JSON types."""
    return {
        "results": [
            {
                "label": label(position),
                "path": str(result.path),
                "mode": result.mode,
                "failure": result.failure,
                "total": len(result.outcomes),
                "errored": result.errored,
                "total_success": result.successes,
                "success_rate": result.successes / len(result.outcomes),
                "wilson_95": wilson_95(result.successes, len(result.outcomes)),
                "timing": result.timing,
                "setting": result.setting,
            }
            for position, result in enumerate(results)
        ],
        "comparisons": [
            {
                **dataclasses.asdict(comparison),
                "differs": comparison.differs,
                "first": label(comparison.first),
                "second": label(comparison.second),
                "videos": _videos(results, comparison),
            }
            for comparison in comparisons
        ],
    }


def _videos(results: Sequence[ResultFile], comparison: Comparison) -> dict[str, list[str]]:
    """Return the videos of the discordant seeds, by seed as text."""
    seeds = sorted((*comparison.only_first_seeds, *comparison.only_second_seeds))
    pair = (results[comparison.first], results[comparison.second])
    return {
        str(seed): [str(path) for result in pair for path in result.videos(seed)] for seed in seeds
    }


def label(position: int) -> str:
    """Return the letter of a file: A is the first."""
    return string.ascii_uppercase[position]


def format_comparison(results: Sequence[ResultFile], comparisons: Sequence[Comparison]) -> str:
    """Return the table and the findings for the terminal."""
    lines = [f"{label(position)}  {result.path}" for position, result in enumerate(results)]
    lines += ["", *_table(results), ""]
    differences = _differences(results)
    lines += ["differs", *(f"  {line}" for line in differences), ""] if differences else []
    for comparison in comparisons:
        lines += _finding(results, comparison, len(comparisons))
    return "\n".join(lines)


def _table(results: Sequence[ResultFile]) -> list[str]:
    rows = [["", *(label(position) for position in range(len(results)))]]
    columns = [_column(result) for result in results]
    rows += [[name, *(column[name] for column in columns)] for name in columns[0]]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _column(result: ResultFile) -> dict[str, str]:
    """Return the cells of one file, by the row's name."""
    total, timing = len(result.outcomes), result.timing
    low, high = wilson_95(result.successes, total)
    return {
        "success": f"{result.successes}/{total} = {100 * result.successes / total:.1f} %",
        "95 % interval": f"{100 * low:.1f} to {100 * high:.1f}",
        "weights": str(result.setting.get("policy.weights_hash") or "-"),
        "no outcome": str(len(result.errored)),
        "mode": result.mode,
        **{f"{name}, ms": _in_ms(values) for name, values in result.durations.items()},
        "ticks": str(timing.get("ticks", "-")),
        "missed ticks": str(timing.get("missed_ticks", "-")),
        "starved ticks": str(timing.get("starved_ticks", "-")),
        "ended early": result.failure or "no",
    }


def _in_ms(values: Percentiles) -> str:
    return f"p50 {1e3 * values.p50:.2f}  p99 {1e3 * values.p99:.2f}" if values.count else "-"


def _differences(results: Sequence[ResultFile]) -> list[str]:
    names = dict.fromkeys(name for result in results for name in result.setting)
    found = {name: [result.setting.get(name) for result in results] for name in names}
    return [
        f"{name}: {', '.join(f'{label(i)} {value}' for i, value in enumerate(values))}"
        for name, values in found.items()
        if any(value != values[0] for value in values)
    ]


def _finding(results: Sequence[ResultFile], comparison: Comparison, among: int) -> list[str]:
    first, second = label(comparison.first), label(comparison.second)
    low, high = (100 * limit for limit in comparison.interval_95)
    verdict = "a difference" if comparison.differs else "no difference shown"
    corrected = (
        f", {comparison.adjusted_p_value:.4f} after Holm's correction for {among} comparisons"
        if among > 1
        else ""
    )
    lines = [
        f"{second} - {first}  {100 * comparison.difference:+.1f} points "
        f"(95 %: {low:+.1f} to {high:+.1f})",
        f"  {verdict} at the 5 % level: p = {comparison.p_value:.4f}{corrected}",
        f"  {comparison.test}: {comparison.reason}",
    ]
    if comparison.pairs is not None:
        counts = comparison.pairs
        lines += [
            f"  pairs {comparison.pairing}",
            f"  discordant pairs {counts.discordant} of {counts.total}: only {first} succeeded in "
            f"{counts.only_first}, only {second} in {counts.only_second}",
        ]
    lines += _sequential_lines(comparison)
    lines += _seed_lines(results, comparison)
    return lines


def _sequential_lines(comparison: Comparison) -> list[str]:
    test = comparison.sequential
    if test is None:
        return []
    after = test.decided_after
    decided = "not decided yet" if after is None else f"decided with pair {after}"
    return [
        f"  e-value {test.e_value:.3g}, {decided}; the p-value holds however often it was looked",
        "  at, the interval only for a number of episodes that was fixed before",
    ]


def _seed_lines(results: Sequence[ResultFile], comparison: Comparison) -> list[str]:
    lines, videos = [], _videos(results, comparison)
    for position, seeds in (
        (comparison.first, comparison.only_first_seeds),
        (comparison.second, comparison.only_second_seeds),
    ):
        if seeds:
            more = f" and {len(seeds) - MOST_SEEDS} more" if len(seeds) > MOST_SEEDS else ""
            shown = ", ".join(map(str, seeds[:MOST_SEEDS]))
            lines.append(f"  only {label(position)} succeeded with seeds {shown}{more}")
            lines += [f"    {path}" for s in seeds[:MOST_SEEDS] for path in videos[str(s)]]
    return lines


def _plot(path: Path, results: Sequence[ResultFile], comparisons: Sequence[Comparison]) -> None:
    from runtime.evaluation.plots import write_comparison_plot

    rates = {
        label(i): (
            result.successes / len(result.outcomes),
            *wilson_95(result.successes, len(result.outcomes)),
        )
        for i, result in enumerate(results)
    }
    differences = {
        f"{label(one.second)} - {label(one.first)}": (one.difference, *one.interval_95)
        for one in comparisons
    }
    write_comparison_plot(path, rates, differences)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
