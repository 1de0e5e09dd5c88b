"""What the inference benchmark says about what it measured."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.inference.arena import CACHED, COLD, Comparison, Entry
from bench.inference.contestants import CONTESTANTS, LEROBOT, PLAIN
from bench.inference.nets import FULL
from bench.inference.report import (
    BEST,
    BEST_BF16,
    BEST_FP32,
    case_name,
    goals,
    ratio,
    ratios,
    save,
    table,
)
from bench.inference.roofline import Machine
from bench.inference.worker import Started
from bench.sample_files import read_samples

OURS, OURS_BF16 = "ours, openvino fp32", "ours, openvino bf16"
PEER, PEER_BF16 = "OpenVINO of plain fp32", "OpenVINO of plain bf16"


def entry(name: str, *samples_s: float, starts: tuple[str, ...] = (COLD,)) -> Entry:
    started = Started(1.0, 2.0, 0.5, 10_000_000, 30_000_000, np.zeros((1, 1, 1), np.float32))
    made = Entry(CONTESTANTS[name], dict.fromkeys(starts, started), error=1e-6)
    made.samples_s, made.cores, made.waited = list(samples_s), [1.0], [0.0]
    return made


def comparison(*entries: Entry, absent: dict[str, str] | None = None) -> Comparison:
    return Comparison(
        net="full, 1 camera",
        config=FULL,
        threads=2,
        device="cpu",
        entries={each.contestant.name: each for each in entries},
        absent=absent or {},
        machine=Machine(flops_per_s=1e11, bytes_per_s=1e10),
    )


def test_a_ratio_is_of_medians_and_of_the_best_of_ours() -> None:
    found = comparison(
        entry(LEROBOT, 0.5, 0.5, 9.0), entry(OURS, 0.4), entry(OURS_BF16, 0.1), entry(PLAIN, 0.8)
    )
    assert ratio(found, BEST, LEROBOT) == pytest.approx(0.2)
    assert ratio(found, BEST_FP32, LEROBOT) == pytest.approx(0.8)
    assert ratio(found, BEST_FP32, PLAIN) == pytest.approx(0.5)
    assert math.isnan(ratio(found, BEST, PEER))
    ours = (BEST, BEST_FP32, BEST_BF16)
    assert set(ratios(found)) == {f"{o} / {t}" for o in ours for t in (LEROBOT, PLAIN)}


def test_a_precision_that_did_not_run_has_no_ratio() -> None:
    found = comparison(entry(LEROBOT, 0.5), entry(OURS, 0.4))
    assert set(ratios(found)) == {f"{o} / {LEROBOT}" for o in (BEST, BEST_FP32)}


def test_jitter_is_the_mean_change_between_calls() -> None:
    assert entry(OURS, 1.0, 3.0, 2.0).jitter_s == pytest.approx(1.5)
    assert entry(OURS, 1.0).jitter_s == 0.0


def test_a_goal_says_met_or_not_and_what_the_roofline_allows() -> None:
    lines = list(goals(comparison(entry(LEROBOT, 0.5), entry(OURS, 0.4))))
    # 34.65 GFLOP at 100 GFLOP/s, by half a second.
    assert f"  {BEST} / {LEROBOT} (goal 0.15): 0.800, not met, the fp32 roofline is 0.693" in lines
    lines = list(goals(comparison(entry(LEROBOT, 5.0), entry(OURS, 0.4))))
    assert f"  {BEST} / {LEROBOT} (goal 0.15): 0.080, met, the fp32 roofline is 0.069" in lines


def test_what_was_not_measured_says_why_and_what_was_instead() -> None:
    found = comparison(entry(PEER, 0.5), entry(OURS, 0.4), absent={PEER_BF16: "no units"})
    assert any(
        line.startswith(f"  {PEER_BF16}") and line.endswith("not measurable here: no units")
        for line in table(found)
    )
    [line] = [each for each in goals(found) if PEER_BF16 in each]
    assert "not measurable here: no units; bf16 reads at least" in line
    assert line.endswith("both in fp32: 0.800")


def test_percentiles_that_so_few_calls_cannot_say_are_left_out() -> None:
    rows = list(table(comparison(entry(PLAIN, *[0.1] * 99), entry(OURS, *[0.1] * 100))))
    few, more = (next(row for row in rows if name in row) for name in (PLAIN, OURS))
    assert few.split()[3:9] == ["99", "100.00", "-", "-", "100.00", "0.00"]
    assert more.split()[3:9] == ["100", "100.00", "100.00", "-", "100.00", "0.00"]


def test_a_start_without_a_cache_has_only_the_cold_one() -> None:
    rows = list(table(comparison(entry(PLAIN, 0.1), entry(OURS, 0.1, starts=(COLD, CACHED)))))
    plain, ours = (next(row for row in rows if name in row) for name in (PLAIN, OURS))
    assert "2.5s       -" in plain
    assert "2.5s    2.5s" in ours


def test_samples_come_back_in_microseconds(tmp_path) -> None:
    found = comparison(entry(PLAIN, 0.25, 0.5))
    path = save(found, tmp_path)
    assert path.name == "inference_full_1-camera_2-threads.json"
    assert case_name(found) == "full, 1 camera, 2 threads"
    samples = read_samples(path.with_suffix(".npz"))
    np.testing.assert_array_equal(samples[PLAIN], np.float32([250_000, 500_000]))
