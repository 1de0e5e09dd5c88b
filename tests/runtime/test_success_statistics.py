"""The tests and intervals of a comparison against published values and by simulation."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from bench import compare_power
from bench.compare_power import draw_pairs, sequential_alarms, unpaired_alarms
from runtime.evaluation.success_statistics import (
    LEVEL,
    PairCounts,
    SequentialTest,
    difference_95,
    fisher,
    holm,
    log_evidence,
    mcnemar_exact,
    mcnemar_mid_p,
    paired_difference_95,
)

RUNS = 2000
HIGHEST = 0.055
COUNTS = st.integers(0, 200)


def test_pairs_are_counted() -> None:
    first, second = [True, True, False, False, False], [True, False, True, True, False]
    counts = PairCounts.of(first, second)
    assert counts == PairCounts(both=1, only_first=1, only_second=2, neither=1)
    assert (counts.total, counts.discordant) == (5, 3)


@given(b=COUNTS, c=COUNTS)
def test_the_exact_test_is_the_binomial_test_of_discordant_pairs(b: int, c: int) -> None:
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected)
    assert mcnemar_mid_p(b, c) <= mcnemar_exact(b, c)


def test_published_examples() -> None:
    # Bentur et al. 2009, in Fagerland, Lydersen and Laake 2013: 1, 1, 7 and 12 of 21.
    airways = PairCounts(1, 1, 7, 12)
    assert mcnemar_exact(1, 7) == pytest.approx(0.0703, abs=1e-4)
    assert mcnemar_mid_p(1, 7) == pytest.approx(0.0391, abs=1e-4)
    assert paired_difference_95(airways) == pytest.approx((0.026, 0.507), abs=1e-3)
    # Newcombe 1998, table II: 56/70 less 48/80.
    assert difference_95((48, 56), (80, 70)) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert fisher((1, 8), (21, 21)) == pytest.approx(0.0205, abs=1e-4)


@given(a=COUNTS, b=COUNTS, c=COUNTS, d=COUNTS)
def test_the_interval_holds_the_difference_and_turns_with_its_sides(
    a: int, b: int, c: int, d: int
) -> None:
    total = a + b + c + d
    low, high = paired_difference_95(PairCounts(a, b, c, d))
    if not total:
        assert (low, high) == (-1, 1)
        return
    assert -1 <= low <= (c - b) / total + 1e-12
    assert (c - b) / total - 1e-12 <= high <= 1
    turned = paired_difference_95(PairCounts(a, c, b, d))
    assert turned == pytest.approx((-high, -low))


def test_holm_corrects_in_the_given_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


def test_evidence_has_mean_one_under_equal_rates() -> None:
    """So it is an e-value: over all outcomes of 12 discordant pairs."""
    wins = np.arange(13)
    chances = np.array([np.exp(-12 * np.log(2))]) * [
        np.prod(np.arange(13 - w, 13)) / max(1, np.prod(np.arange(1, w + 1))) for w in wins
    ]
    assert chances.sum() == pytest.approx(1)
    assert (chances * np.exp(log_evidence(wins, 12 - wins))).sum() == pytest.approx(1)


def test_a_decision_of_the_sequential_test_stays() -> None:
    strong, weak = [True] * 8, [False] * 8
    test = SequentialTest.of(strong + weak, weak + strong)
    assert test.decided_after == 8
    assert test.p_value == pytest.approx(9 / 2**8)
    assert test.e_value < 1
    assert SequentialTest.of([], []) == SequentialTest(1.0, 1.0, None)


@pytest.mark.parametrize("discordance", [0.02, 0.10, 0.30])
def test_equal_policies_rarely_seem_to_differ(discordance: float) -> None:
    rng = np.random.default_rng(1)
    counts = draw_pairs(rng, RUNS, 200, 0.0, discordance)
    assert np.mean(mcnemar_exact(counts[:, 1], counts[:, 2]) <= LEVEL) <= HIGHEST
    assert unpaired_alarms(rng, RUNS, 50, 0.8, 0.8) <= HIGHEST
    assert sequential_alarms(rng, RUNS, 500, 0.0, discordance)[0] <= HIGHEST


@pytest.mark.long
def test_the_pages_tables_are_what_the_simulation_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["compare_power.py"])
    compare_power.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| \w+.* %", line)]
    assert len(rows) == 24
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text().splitlines()
    assert [row for row in rows if row not in page] == []


def test_unequal_policies_are_told_apart() -> None:
    rng = np.random.default_rng(1)
    counts = draw_pairs(rng, RUNS, 500, 0.05, 0.10)
    assert np.mean(mcnemar_exact(counts[:, 1], counts[:, 2]) <= LEVEL) > 0.9
    assert unpaired_alarms(rng, RUNS, 500, 0.90, 0.95) > 0.75
    assert sequential_alarms(rng, RUNS, 500, 0.05, 0.10)[0] > 0.7
