"""Statistics of success rates: exact tests, intervals of differences, a sequential test.

``first`` and ``second`` name the two policies that are compared. A pair is one seed that both ran.
A pair is discordant if only one of them succeeded. ``only_first`` and ``only_second`` count those.
Tests take numbers or numpy arrays of the same shape, and return the same shape.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln
from scipy.stats import binom, fisher_exact

from runtime.evaluation.results import wilson_95

LEVEL = 0.05
"""The largest share of false alarms: the level of every test."""


@dataclass(frozen=True, slots=True)
class PairCounts:
    """How many pairs had each outcome.

    Attributes:
        both: Both policies succeeded.
        only_first: The first succeeded, the second failed.
        only_second: The second succeeded, the first failed.
        neither: Both failed.
    """

    both: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> PairCounts:
        """Count the outcomes of two equally long sequences, paired by position."""
        counts = Counter(zip(first, second, strict=True))
        outcomes = ((True, True), (True, False), (False, True), (False, False))
        return cls(*(counts[outcome] for outcome in outcomes))

    @property
    def total(self) -> int:
        """The number of pairs."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def discordant(self) -> int:
        """The number of pairs with different outcomes."""
        return self.only_first + self.only_second

    @property
    def difference(self) -> float:
        """The second success rate minus the first."""
        return (self.only_second - self.only_first) / self.total


def mcnemar_exact(only_first: ArrayLike, only_second: ArrayLike) -> NDArray[np.float64]:
    """Return the two-sided p-value of McNemar's exact test; 1 without a discordant pair.

    Under equal success rates each discordant pair favours either policy with probability 1/2. The
    share of false alarms is at most the level for every number of pairs (McNemar 1947; Fagerland,
    Lydersen and Laake 2013, doi:10.1186/1471-2288-13-91, equation 4).
    """
    b, c = np.asarray(only_first), np.asarray(only_second)
    p_value: NDArray[np.float64] = np.minimum(1.0, 2 * binom.cdf(np.minimum(b, c), b + c, 0.5))
    return p_value


def detectable_difference(rate: float, pairs: int, power: float = 0.8) -> float | None:
    """Return the smallest drop from ``rate`` that McNemar's exact test finds often enough.

    The two success rates are taken as independent, which is the worst case for paired seeds: the
    more the pairs agree, the smaller a difference is found.

    Args:
        rate: Success rate of the better policy, 0 to 1.
        pairs: Number of pairs.
        power: Least probability that the drop is found.

    Returns:
        A difference of rates, in steps of 0.5 points; None if not even a drop to 0 is found.
    """
    for drop in np.arange(0.005, rate + 1e-9, 0.005):
        if _power(rate, rate - float(drop), pairs) >= power:
            return round(float(drop), 3)
    return None


def _power(first: float, second: float, pairs: int) -> float:
    """Return the probability that McNemar's exact test finds the difference of two rates."""
    only_first, only_second = first * (1 - second), second * (1 - first)
    discordance = only_first + only_second
    discordant = np.arange(pairs + 1)
    share = only_first / discordance
    # Of n discordant pairs, the largest count for one policy that is still significant.
    below = binom.ppf(LEVEL / 2, discordant, 0.5)
    below -= binom.cdf(below, discordant, 0.5) > LEVEL / 2
    found = binom.cdf(below, discordant, share) + binom.sf(
        discordant - below - 1, discordant, share
    )
    return float(np.sum(binom.pmf(discordant, pairs, discordance) * found))


def mcnemar_mid_p(only_first: ArrayLike, only_second: ArrayLike) -> NDArray[np.float64]:
    """Return the mid-p-value: the exact one less the probability of the observed table.

    Stronger than the exact test, but without its guarantee (equation 7 of the same article).
    """
    b, c = np.asarray(only_first), np.asarray(only_second)
    one_sided = binom.cdf(np.minimum(b, c), b + c, 0.5)
    observed = binom.pmf(b, b + c, 0.5)
    # With b = c the two tails meet, and the formula gives 1 - observed / 2.
    p_value: NDArray[np.float64] = np.where(b == c, 1 - observed / 2, 2 * one_sided - observed)
    return p_value


def fisher(successes: tuple[int, int], totals: tuple[int, int]) -> float:
    """Return the two-sided p-value of Fisher's exact test of two independent groups."""
    table = [[won, total - won] for won, total in zip(successes, totals, strict=True)]
    return float(fisher_exact(table).pvalue)


def paired_difference_95(counts: PairCounts) -> tuple[float, float]:
    """Return the 95 % interval of the second success rate minus the first, of paired episodes.

    Newcombe's square-and-add interval: Wilson's limits of both rates, with a correction for the
    correlation of the pairs (Newcombe 1998, Statistics in Medicine 17, 2635 to 2650, method 10).
    The whole range (-1, 1) without pairs.
    """
    total = counts.total
    first, second = counts.both + counts.only_first, counts.both + counts.only_second
    return _square_and_add((first, second), (total, total), _correlation(counts))


def difference_95(successes: tuple[int, int], totals: tuple[int, int]) -> tuple[float, float]:
    """Return the 95 % interval of the second success rate minus the first, of independent groups.

    Newcombe 1998, Statistics in Medicine 17, 873 to 890, method 10. The whole range (-1, 1) if a
    group is empty.
    """
    return _square_and_add(successes, totals, 0.0)


def _square_and_add(
    successes: tuple[int, int], totals: tuple[int, int], correlation: float
) -> tuple[float, float]:
    if 0 in totals:
        return -1.0, 1.0
    p1, p2 = (won / total for won, total in zip(successes, totals, strict=True))
    (l1, u1), (l2, u2) = map(wilson_95, successes, totals)

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    difference = p2 - p1
    low = difference - distance(p2 - l2, u1 - p1)
    high = difference + distance(u2 - p2, p1 - l1)
    return max(-1.0, low), min(1.0, high)


def _correlation(counts: PairCounts) -> float:
    """Return the pairs' correlation, towards 0 by Newcombe's continuity correction."""
    a, b, c, d = counts.both, counts.only_first, counts.only_second, counts.neither
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    excess: float = a * d - b * c
    if excess > 0:
        excess = max(0.0, excess - counts.total / 2)
    return excess / math.sqrt(margins)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number, in the given order.

    With them the share of families with any false alarm is at most the level (Holm 1979,
    Scandinavian Journal of Statistics 6, 65 to 70).
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def log_evidence(only_first: ArrayLike, only_second: ArrayLike) -> NDArray[np.float64]:
    """Return the natural logarithm of the e-value against equal success rates.

    The likelihood of the discordant pairs, averaged over every chance that a pair favours the first
    policy (a uniform prior), divided by their likelihood at 1/2. Over the episodes it is a
    martingale with mean 1 if the rates are equal, so it exceeds 1 / level at any time with at most
    the level's probability (Ville's inequality; Ramdas, Gruenwald, Vovk and Shafer 2023,
    doi:10.1214/23-STS894).
    """
    b, c = np.asarray(only_first, np.float64), np.asarray(only_second, np.float64)
    log_mixture = gammaln(b + 1) + gammaln(c + 1) - gammaln(b + c + 2)
    evidence: NDArray[np.float64] = log_mixture + (b + c) * math.log(2)
    return evidence


@dataclass(frozen=True, slots=True)
class SequentialTest:
    """A test that may be looked at after every episode.

    Attributes:
        p_value: 1 divided by the largest e-value so far, at most 1.
        e_value: The e-value after the last pair.
        decided_after: Pairs after which ``p_value`` first was at most ``LEVEL``; None: not yet.
    """

    p_value: float
    e_value: float
    decided_after: int | None

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> SequentialTest:
        """Test two equally long sequences of outcomes, paired and in the order of the episodes."""
        one, two = np.array(first, bool), np.array(second, bool)
        logs = log_evidence(np.cumsum(one & ~two), np.cumsum(two & ~one))
        largest: NDArray[Any] = np.maximum.accumulate(np.concatenate(([0.0], logs)))
        decided = np.flatnonzero(largest >= -math.log(LEVEL))
        return cls(
            p_value=math.exp(-largest[-1]),
            e_value=math.exp(logs[-1]) if logs.size else 1.0,
            decided_after=int(decided[0]) if decided.size else None,
        )
