"""Compares the success rates of evaluations, by their result files."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import ComparisonError
from runtime.evaluation import success_statistics as statistics
from runtime.evaluation.result_file import REAL, ResultFile, check_same_task
from runtime.evaluation.success_statistics import PairCounts, SequentialTest

LEAST_SHARED = 0.5
"""Pairs are formed if this share of the smaller file's seeds is also in the other file."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two evaluations compared. ``first`` and ``second`` are positions among the files.

    Attributes:
        first, second: The two files.
        test: The test's name.
        reason: Why this test.
        pairing: What a pair has in common; empty without pairs.
        difference: The second success rate minus the first, of the episodes compared.
        interval_95: Its 95 % interval.
        p_value: The probability of a difference at least as large under equal success rates.
        adjusted_p_value: After Holm's correction for all comparisons of the run.
        pairs: Counts of the pairs' outcomes; None without pairs.
        mid_p_value: McNemar's mid-p-value, which decides nothing; None without pairs.
        only_first_seeds, only_second_seeds: Seeds with which only one of the two succeeded.
        sequential: The test over the episodes; None if it was not asked for.
    """

    first: int
    second: int
    test: str
    reason: str
    pairing: str
    difference: float
    interval_95: tuple[float, float]
    p_value: float
    adjusted_p_value: float
    pairs: PairCounts | None = None
    mid_p_value: float | None = None
    only_first_seeds: tuple[int, ...] = ()
    only_second_seeds: tuple[int, ...] = ()
    sequential: SequentialTest | None = None

    @property
    def differs(self) -> bool:
        """Whether the test finds a difference at the level of 5 %."""
        return self.adjusted_p_value <= statistics.LEVEL


def compare_results(
    results: Sequence[ResultFile], *, sequential: bool = False
) -> tuple[Comparison, ...]:
    """Compare each pair of ``results``, in their order.

    Args:
        results: At least two.
        sequential: Use the test that may be looked at after every episode.

    Raises:
        ComparisonError: Fewer than two results, different tasks, or ``sequential`` without common
            seeds.
    """
    if len(results) < 2:
        raise ComparisonError(f"result files: got {len(results)}, expected at least 2")
    for result in results[1:]:
        check_same_task(results[0], result)
    found = [
        _compare(results, first, second, sequential)
        for first, second in itertools.combinations(range(len(results)), 2)
    ]
    adjusted = statistics.holm([comparison.p_value for comparison in found])
    return tuple(
        dataclasses.replace(comparison, adjusted_p_value=p)
        for comparison, p in zip(found, adjusted, strict=True)
    )


def _compare(
    results: Sequence[ResultFile], first: int, second: int, sequential: bool
) -> Comparison:
    one, two = results[first], results[second]
    shared = [seed for seed in one.outcomes if seed in two.outcomes]
    fewest = min(len(one.outcomes), len(two.outcomes))
    if len(shared) >= LEAST_SHARED * fewest:
        return _compare_pairs(one, two, (first, second), shared, sequential)
    if sequential:
        raise ComparisonError(
            f"{two.path}: --sequential: got {len(shared)} seeds that are also in {one.path}, "
            f"expected at least {LEAST_SHARED:.0%} of {fewest}: the test needs pairs"
        )
    return _compare_groups(one, two, (first, second), len(shared))


def _compare_pairs(
    one: ResultFile,
    two: ResultFile,
    positions: tuple[int, int],
    shared: Sequence[int],
    sequential: bool,
) -> Comparison:
    first, second = ([result.outcomes[seed] for seed in shared] for result in (one, two))
    pairs = PairCounts.of(first, second)
    p_value = float(statistics.mcnemar_exact(pairs.only_first, pairs.only_second))
    over_time = SequentialTest.of(first, second) if sequential else None
    if over_time is not None:
        p_value = over_time.p_value
    left_out = len(one.outcomes.keys() ^ two.outcomes.keys())
    discordant = [(seed, a) for seed, a, b in zip(shared, first, second, strict=True) if a != b]
    return Comparison(
        *positions,
        test="sequential test" if sequential else "McNemar's exact test",
        reason=(
            f"seeds in both files: {len(shared)}"
            + (f"; episodes left out: {left_out}" if left_out else "")
        ),
        pairing=_pairing(one, two),
        difference=pairs.difference,
        interval_95=statistics.paired_difference_95(pairs),
        p_value=p_value,
        adjusted_p_value=p_value,
        pairs=pairs,
        mid_p_value=float(statistics.mcnemar_mid_p(pairs.only_first, pairs.only_second)),
        only_first_seeds=tuple(seed for seed, won in discordant if won),
        only_second_seeds=tuple(seed for seed, won in discordant if not won),
        sequential=over_time,
    )


def _compare_groups(
    one: ResultFile, two: ResultFile, positions: tuple[int, int], shared: int
) -> Comparison:
    successes = (one.successes, two.successes)
    totals = (len(one.outcomes), len(two.outcomes))
    p_value = statistics.fisher(successes, totals)
    return Comparison(
        *positions,
        test="Fisher's exact test",
        reason=f"the seeds differ ({_seeds(one)} and {_seeds(two)}; {shared} in both), so the "
        "episodes are independent groups",
        pairing="",
        difference=successes[1] / totals[1] - successes[0] / totals[0],
        interval_95=statistics.difference_95(successes, totals),
        p_value=p_value,
        adjusted_p_value=p_value,
    )


def _seeds(result: ResultFile) -> str:
    return f"{min(result.outcomes)} to {max(result.outcomes)}"


def _pairing(one: ResultFile, two: ResultFile) -> str:
    if one.repeatable and two.repeatable:
        return "identical: the same seed is the same episode"
    if REAL in (one.mode, two.mode):
        return "matched, not identical: a seed sets only what the robot takes from it"
    if "realtime" in (one.mode, two.mode):
        return "matched, not identical: runs by the wall clock start alike and then depend on time"
    return "matched, not identical: a policy's answers are not deterministic"
