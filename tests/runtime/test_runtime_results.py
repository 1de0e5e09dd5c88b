"""Percentiles, the interval of a success rate, what a result file says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.control.chunk_executor import ExecutorStatistics
from runtime.evaluation.episode_result import Episode
from runtime.evaluation.results import summarize, wilson_95, write_result
from runtime.latency_stats import Percentiles, StageTimes


def episode(seed: int, success: bool) -> Episode:
    return Episode(
        seed=seed,
        success=success,
        reward=4.0 if success else 1.0,
        horizon=100 + seed,
        missed_ticks=1,
        executor=ExecutorStatistics(2, 0, 3, 4, 0.5 * seed, 7),
        action_age_s=np.array([0.1, 0.2]),
        lateness_s=np.empty(0),
        stages_ns={"infer": [100, 200], "postprocess": [1, 2], "request": [111, 222]},
        wall_s=1.0,
    )


def test_wilson_agrees_with_published_values() -> None:
    # Newcombe 1998, table I, method 3.
    assert wilson_95(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_95(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_95(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_95(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert wilson_95(0, 0) == (0.0, 1.0)


@given(total=st.integers(1, 1000), data=st.data())
def test_the_interval_holds_the_proportion(total: int, data: st.DataObject) -> None:
    won = data.draw(st.integers(0, total))
    low, high = wilson_95(won, total)
    assert 0 <= low <= won / total + 1e-12
    assert won / total - 1e-12 <= high <= 1


def test_percentiles_of_known_samples() -> None:
    p = Percentiles.of(np.arange(1001))
    assert p.count == 1001
    assert (p.p50, p.p99, p.p999, p.max) == pytest.approx((500, 990, 999, 1000))
    assert Percentiles.of([]) == Percentiles(0, 0.0, 0.0, 0.0, 0.0)
    assert Percentiles.of([]).in_ms() == "none"


def test_only_stages_that_occurred_are_reported() -> None:
    times = StageTimes()
    times.add({"infer": 5})
    times.add({"infer": 7, "tokenize": 3})  # somebody's own stage
    assert times.samples_ns() == {"infer": [5, 7], "request": [5, 10]}
    assert list(times.percentiles()) == ["infer", "request"]


def test_a_summary_is_ordered_by_seed_and_counts_everything() -> None:
    result = summarize([episode(2, False), episode(1, True)])
    assert result["total"] == 2
    assert result["total_success"] == 1
    assert result["success_rate"] == 0.5
    assert result["horizon"] == [101, 102]
    assert result["horizon_success"] == 101
    assert [e["seed"] for e in result["episodes"]] == [1, 2]
    timing = result["timing"]
    assert (timing["missed_ticks"], timing["starved_ticks"], timing["chunks"]) == (2, 8, 4)
    assert timing["request"]["max"] == pytest.approx(222e-9)
    assert timing["seam_jump"] == 1.0
    assert timing["action_age"]["count"] == 4


def test_nothing_finished_is_still_a_summary() -> None:
    result = summarize([])
    assert (result["success_rate"], result["total"], result["horizon_success"]) == (0.0, 0, None)
    json.dumps(result)


def test_files_are_written_whole_with_raw_samples(tmp_path: Path) -> None:
    path = tmp_path / "aloha" / "task.json"
    episodes = [episode(1, True)]
    write_result(path, summarize(episodes), episodes)
    assert json.loads(path.read_text())["total"] == 1
    with np.load(path.with_name("task_samples.npz")) as samples:
        assert samples["stage_infer_ns"].tolist() == [100, 200]
        assert samples["action_age_s"].tolist() == [0.1, 0.2]
    assert {p.name for p in path.parent.iterdir()} == {"task.json", "task_samples.npz"}
