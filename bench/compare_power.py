"""What ``metronome compare`` gets wrong and what it finds, by simulated evaluations.

    python bench/compare_power.py

Prints the Markdown tables of ``docs/compare.md``: how often each test reports a difference between
equal policies, and how often between policies that succeed in 90 and in 95 % of all episodes.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT, SEED
from runtime.evaluation.success_statistics import (
    LEVEL,
    PairCounts,
    fisher,
    log_evidence,
    mcnemar_exact,
    mcnemar_mid_p,
    paired_difference_95,
)

EPISODES = (100, 200, 500)
DISCORDANCE = (0.02, 0.10, 0.30)
EQUAL_RATE = 0.8
LOW, HIGH = 0.90, 0.95
INDEPENDENT = LOW * (1 - HIGH) + HIGH * (1 - LOW)
"""Share of discordant pairs of policies whose successes have nothing to do with each other."""
POWER_DISCORDANCE = (0.06, 0.10, INDEPENDENT)
CHUNK = 1000
"""Simulations at a time; bounds the memory."""


def draw_pairs(
    rng: np.random.Generator, runs: int, episodes: int, difference: float, discordance: float
) -> NDArray[np.int64]:
    """(runs, 4) counts: both, only first, only second, neither; the first succeeds less often."""
    only_first, only_second = (discordance - difference) / 2, (discordance + difference) / 2
    both = (EQUAL_RATE if difference == 0 else LOW) - only_first
    rest = 1 - both - discordance
    return rng.multinomial(episodes, (both, only_first, only_second, rest), size=runs)


@functools.cache
def fisher_p(first: int, second: int, episodes: int) -> float:
    return fisher((first, second), (episodes, episodes))


def unpaired_alarms(
    rng: np.random.Generator, runs: int, episodes: int, first: float, second: float
) -> float:
    """How often Fisher's test reports a difference, of independent groups."""
    won = rng.binomial(episodes, (first, second), size=(runs, 2))
    return float(np.mean([fisher_p(int(a), int(b), episodes) <= LEVEL for a, b in won]))


def coverage(counts: NDArray[np.int64], difference: float) -> float:
    """How often the interval of the paired difference holds the true one."""
    intervals = np.array([paired_difference_95(PairCounts(*map(int, row))) for row in counts])
    return float(np.mean((intervals[:, 0] <= difference) & (difference <= intervals[:, 1])))


def sequential_alarms(
    rng: np.random.Generator, runs: int, episodes: int, difference: float, discordance: float
) -> tuple[float, float]:
    """Share of runs that are decided at any of the looks; median of the deciding episode."""
    decided = np.concatenate(
        [first_decisions(rng, size, episodes, difference, discordance) for size in chunks(runs)]
    )
    found = decided[decided <= episodes]
    return float(found.size / runs), float(np.median(found)) if found.size else math.nan


def chunks(runs: int) -> Iterator[int]:
    for start in range(0, runs, CHUNK):
        yield min(CHUNK, runs - start)


def first_decisions(
    rng: np.random.Generator, runs: int, episodes: int, difference: float, discordance: float
) -> NDArray[np.int64]:
    """(runs,) the episode after which the evidence is first enough; episodes + 1 if never."""
    drawn = rng.random((runs, episodes))
    only_first = drawn < (discordance - difference) / 2
    only_second = ~only_first & (drawn < discordance)
    evidence = log_evidence(np.cumsum(only_first, axis=1), np.cumsum(only_second, axis=1))
    enough = evidence >= -math.log(LEVEL)
    return np.where(enough.any(axis=1), enough.argmax(axis=1) + 1, episodes + 1)


def percent(*shares: float) -> str:
    return " | ".join(f"{100 * share:.2f} %" for share in shares)


def false_alarms(rng: np.random.Generator, runs: int) -> None:
    print("| episodes | discordant | exact | mid-p | Fisher, other seeds | interval holds 0 |")
    print("|---|---|---|---|---|---|")
    for episodes in EPISODES:
        unpaired = unpaired_alarms(rng, runs, episodes, EQUAL_RATE, EQUAL_RATE)
        for discordance in DISCORDANCE:
            counts = draw_pairs(rng, runs, episodes, 0.0, discordance)
            pair = counts[:, 1], counts[:, 2]
            exact, mid = (
                float(np.mean(test(*pair) <= LEVEL)) for test in (mcnemar_exact, mcnemar_mid_p)
            )
            row = percent(exact, mid, unpaired, coverage(counts, 0.0))
            print(f"| {episodes} | {100 * discordance:.0f} % | {row} |", flush=True)


def power(rng: np.random.Generator, runs: int) -> None:
    print("\n| episodes | discordant | exact | mid-p | Fisher, other seeds | interval holds 5 |")
    print("|---|---|---|---|---|---|")
    difference = HIGH - LOW
    for episodes in EPISODES:
        unpaired = unpaired_alarms(rng, runs, episodes, LOW, HIGH)
        for discordance in POWER_DISCORDANCE:
            counts = draw_pairs(rng, runs, episodes, difference, discordance)
            pair = counts[:, 1], counts[:, 2]
            exact, mid = (
                float(np.mean(test(*pair) <= LEVEL)) for test in (mcnemar_exact, mcnemar_mid_p)
            )
            row = percent(exact, mid, unpaired, coverage(counts, difference))
            print(f"| {episodes} | {100 * discordance:.0f} % | {row} |", flush=True)


def sequential(rng: np.random.Generator, runs: int) -> None:
    print("\n| policies | discordant | decided by episode 500 | half of these by episode |")
    print("|---|---|---|---|")
    cases = [("equal", 0.0, share) for share in DISCORDANCE]
    cases += [("90 and 95 %", HIGH - LOW, share) for share in POWER_DISCORDANCE]
    for name, difference, discordance in cases:
        share, median = sequential_alarms(rng, runs, EPISODES[-1], difference, discordance)
        row = f"{100 * discordance:.0f} % | {percent(share)} | {median:.0f}"
        print(f"| {name} | {row} |", flush=True)


def parser() -> CommandLine:
    cli = CommandLine(description=__doc__.splitlines()[0])
    cli.add_argument("-n", "--comparisons", type=Number(int, COUNT), default=10_000)
    cli.add_argument("-s", "--seed", type=Number(int, SEED), default=0)
    return cli


def main() -> None:
    args = parser().parse_args()
    rng = np.random.default_rng(args.seed)
    false_alarms(rng, args.comparisons)
    power(rng, args.comparisons)
    sequential(rng, args.comparisons)


if __name__ == "__main__":
    main()
