"""``metronome compare``: which result files are compared, with which test, and what is shown."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from runtime.eval_sim import cli as eval_sim
from runtime.evaluation.results import summarize
from runtime.tools import compare
from tests.docs.test_docs import ROOT
from tests.runtime.test_runtime_results import episode

PAGE = ROOT / "docs" / "compare.md"
Edit = Callable[[dict[str, Any]], None]
TIMED = {"count": 2, "p50": 0.002, "p99": 0.009, "p999": 0.01, "max": 0.01}


def result(outcomes: Mapping[int, bool], mode: str = "lockstep") -> dict[str, Any]:
    """What an evaluation in simulation writes, as far as a comparison reads it."""
    env = {"kind": "aloha", "task": "cube", "success_reward": None, "gym": {}}
    summary = summarize([episode(seed, won) for seed, won in outcomes.items()])
    content = json.loads(json.dumps(summary))
    if mode == "real":
        for entry in content["episodes"]:
            entry["recording"] = f"anywhere/rollout_{entry['seed']:03}"
    return content | {
        "mode": mode,
        "deterministic": mode == "lockstep",
        "failure": "",
        "config": {"overrides": {}},
        "env": env | {"shadows": None, "msaa": None},
        "world": {"max_timesteps": 400, "dt_s": 0.02, "shadows": True, "msaa": 4},
        "policy": {"checkpoint": "a", "contract": {"dt_s": 0.02}},
        "action_manager": {"name": "sequential"},
        "versions": {"mujoco": "3"},
        "robot": {"name": "arm", "config": "arm"},
        "task": {"name": "cube", "max_timesteps": 400},
    }


def results_of(won: int, total: int, first_seed: int = 0) -> dict[str, Any]:
    return result({first_seed + i: i < won for i in range(total)})


@dataclasses.dataclass
class Shown:
    status: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    def run(*files: dict[str, Any], flags: tuple[str, ...] = ()) -> Shown:
        paths = []
        for name, content in zip("abcd", files, strict=False):
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps(content))
        status = compare.main([*map(str, paths), *flags])
        printed = capsys.readouterr()
        return Shown(status, printed.out, printed.err)

    return run


def test_what_the_latency_dial_said_is_a_difference(run: Callable[..., Shown]) -> None:
    one, two = results_of(10, 20), results_of(10, 20)
    one["config"] |= {"latency": {"latency_ms": 0.0, "drop": 0.0}}
    two["config"] |= {"latency": {"latency_ms": 120.0, "drop": 0.0}}
    assert "latency.latency_ms: A 0.0, B 120.0" in run(one, two).out
    assert "latency.drop" not in run(one, two).out
    two["config"]["latency"] = 120
    assert "config.latency: got 120, expected a dict" in run(one, two).err


def test_equal_seeds_are_pairs(run: Callable[..., Shown], tmp_path: Path) -> None:
    videos = tmp_path / "video" / "b"
    videos.mkdir(parents=True)
    (videos / "seed11_success.mp4").touch()
    (videos / "seed12_failure.mp4").touch()  # of an older run: here seed 12 succeeded
    one, two = results_of(10, 20), results_of(19, 20)
    two["policy"] |= {"checkpoint": "b", "weights_hash": "0b"}
    flags = ("--json", str(tmp_path / "all.json"), "--plot", str(tmp_path / "rates.png"))
    shown = run(one, two, flags=flags)
    assert shown.status == 0
    assert "10/20 = 50.0 %" in shown.out
    assert "B - A  +45.0 points (95 %: " in shown.out
    assert "a difference at the 5 % level: p = 0.0039\n" in shown.out
    assert "McNemar's exact test: seeds in both files: 20\n" in shown.out
    assert "pairs identical: the same seed is the same episode" in shown.out
    assert "only B succeeded with seeds 10, 11, 12, 13, 14, 15, 16, 17, 18\n" in shown.out
    assert "only A succeeded with" not in shown.out
    assert "policy.checkpoint: A a, B b" in shown.out
    assert "policy.weights_hash: A None, B 0b" in shown.out
    assert re.search(r"^weights +- +0b$", shown.out, re.MULTILINE)
    assert "seed11_success.mp4" in shown.out
    assert "seed12" not in shown.out
    numbers = json.loads((tmp_path / "all.json").read_text())
    (comparison,) = numbers["comparisons"]
    assert comparison["pairs"] == {"both": 10, "only_first": 0, "only_second": 9, "neither": 1}
    assert comparison["videos"]["11"] == [str(videos / "seed11_success.mp4")]
    assert comparison["differs"] is True
    assert [each["total_success"] for each in numbers["results"]] == [10, 19]
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_what_is_printed(run: Callable[..., Shown]) -> None:
    (sample,) = [part for part in PAGE.read_text().split("```") if part.startswith("\nB - A")]
    only_first = (12, 31, 77, 140, 152)
    one = {seed: seed < 180 and not 40 <= seed < 54 for seed in range(200)}
    two = {seed: seed < 180 and seed not in only_first for seed in range(200)}
    shown = run(result(one), result(two)).out
    shown += "\n    results/a/aloha/video/sim_transfer_cube/seed12_success.mp4"
    assert not [line for line in sample.splitlines() if line not in shown]


def test_unfinished_evaluations_are_compared_over_common_seeds(run: Callable[..., Shown]) -> None:
    one, two = results_of(20, 20), results_of(12, 12)
    two["failure"] = "interrupted"
    shown = run(one, two)
    assert "seeds in both files: 12; episodes left out: 8\n" in shown.out
    assert "ended early    no" in shown.out
    assert "interrupted" in shown.out


def test_other_seeds_are_independent_groups(run: Callable[..., Shown]) -> None:
    shown = run(results_of(56, 70), results_of(48, 80, first_seed=100))
    assert "Fisher's exact test: the seeds differ (0 to 69 and 100 to 179; 0 in both)" in shown.out
    assert "B - A  -20.0 points (95 %: -33.4 to -5.2)" in shown.out
    assert "pairs" not in shown.out


def test_three_files_are_corrected_for_three_comparisons(run: Callable[..., Shown]) -> None:
    shown = run(results_of(10, 20), results_of(16, 20), results_of(16, 20))
    # 6 discordant pairs that all favour one: 2 / 2**6.
    assert "no difference shown at the 5 % level: p = 0.0312, 0.0938 after Holm's" in shown.out
    assert "C - B  +0.0 points" in shown.out


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("realtime", "runs by the wall clock start alike and then depend on time"),
        ("real", "a seed sets only what the robot takes from it"),
    ],
)
def test_runs_in_real_time_are_matched(run: Callable[..., Shown], mode: str, said: str) -> None:
    outcomes = {0: True, 1: False}
    shown = run(result(outcomes, mode), result(outcomes, mode))
    assert f"pairs matched, not identical: {said}" in shown.out


def test_robots_and_their_limits_must_agree(run: Callable[..., Shown]) -> None:
    outcomes = {0: True, 1: False}
    other = result(outcomes, "real")
    other["config"]["max_timesteps"] = 400  # as the task says
    assert run(result(outcomes, "real"), other).status == 0
    other["config"]["max_timesteps"] = 300
    shown = run(result(outcomes, "real"), other)
    assert "max_timesteps: got 300, expected 400, as in" in shown.err
    other = result(outcomes, "real")
    other["robot"]["name"] = "other_arm"
    shown = run(result(outcomes, "real"), other)
    assert "robot.name: got 'other_arm', expected 'arm', as in" in shown.err


def test_the_videos_of_a_robots_rollouts_are_named(
    run: Callable[..., Shown], tmp_path: Path
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "rollout_001_top.mp4").touch()
    (tmp_path / "b" / "rollout_000_top.mp4").touch()
    shown = run(result({0: True, 1: False}, "real"), result({0: True, 1: True}, "real"))
    assert "only B succeeded with seeds 1\n" in shown.out
    assert "rollout_001_top.mp4" in shown.out
    assert "rollout_000" not in shown.out


def test_unjudged_rollouts_do_not_count(run: Callable[..., Shown]) -> None:
    one = result({0: True, 1: False, 2: False}, "real")
    one["episodes"][2]["judged"] = False
    shown = run(one, one)
    assert "1/2 = 50.0 %" in shown.out


def test_timing_stands_side_by_side(run: Callable[..., Shown]) -> None:
    one, two = results_of(2, 2), results_of(2, 2)
    two["timing"]["lateness"] = TIMED
    shown = run(one, two)
    (row,) = [line for line in shown.out.splitlines() if line.startswith("lateness, ms")]
    assert row.split() == ["lateness,", "ms", "-", "p50", "2.00", "p99", "9.00"]


def test_the_sequential_test_says_when_it_was_decided(run: Callable[..., Shown]) -> None:
    flags = ("--sequential",)
    shown = run(results_of(0, 20), results_of(20, 20), flags=flags)
    # 2**8 / 9 = 28.4 is the first above 20.
    assert "decided with pair 8;" in shown.out
    shown = run(results_of(0, 4), results_of(4, 4), flags=flags)
    assert "e-value 3.2, not decided yet;" in shown.out
    assert "p = 0.3125" in shown.out
    shown = run(results_of(4, 4), results_of(4, 4, first_seed=9), flags=flags)
    assert shown.status == 2
    assert "--sequential: got 0 seeds that are also in" in shown.err


def put(*path: str | int, value: Any) -> Edit:
    def edit(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("world", "max_timesteps", value=100), "world.max_timesteps: got 100, expected 400"),
        (put("env", "task", value="peg"), "env.task: got 'peg', expected 'cube'"),
        (put("env", "success_reward", value=3.0), "env.success_reward: got 3.0, expected None"),
        (
            lambda content: content.update(result({0: True}, "real")),
            "mode: got real, expected lockstep or realtime, as in",
        ),
        (put("episodes", 1, "seed", value=0), "got seed 0 more than once, expected each seed once"),
        (put("episodes", value=[]), "episodes: got none that was judged, expected at least one"),
        (put("episodes", 0, "success", value=1), "episodes[0].success: got 1, expected a bool"),
        (put("timing", "request", value=5), "timing: request: got 5, expected numbers count, p50"),
        (lambda content: content.pop("config"), "config: got none, expected a dict: no result"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    run: Callable[..., Shown], edit: Edit, message: str
) -> None:
    other = results_of(1, 2)
    edit(other)
    shown = run(results_of(1, 2), other)
    assert shown.status == 2
    assert shown.out == ""
    assert "b.json: " in shown.err
    assert message in shown.err


def test_rendering_may_come_from_the_policy_but_not_from_other_flags(
    run: Callable[..., Shown],
) -> None:
    other = results_of(1, 2)
    other["world"]["shadows"] = False  # its policy was trained without
    assert run(results_of(1, 2), other).status == 0
    other["env"]["shadows"] = False
    shown = run(results_of(1, 2), other)
    assert "env.shadows: got False, expected None" in shown.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file, expected a result in JSON"),
        (b'{"episodes": [', "truncated, or no JSON"),
        (b"[1]", "got list, expected an object"),
        (None, "No such file or directory, expected a result file"),
    ],
)
def test_broken_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_bytes(content)
    assert compare.main([str(path), str(path)]) == 2
    assert f"error: {path}: {message}" in capsys.readouterr().err


def test_one_file_is_not_a_comparison(run: Callable[..., Shown]) -> None:
    assert "result files: got 1, expected at least 2" in run(results_of(1, 2)).err


def test_output_that_cannot_be_written_is_an_error(
    run: Callable[..., Shown], tmp_path: Path
) -> None:
    flags = ("--json", str(tmp_path / "no" / "x.json"))
    assert run(results_of(1, 2), results_of(1, 2), flags=flags).status == 2
    shown = run(results_of(1, 2), results_of(1, 2), flags=("--plot", str(tmp_path / "x.what")))
    assert shown.status == 2
    assert "what" in shown.err


def test_the_files_that_the_evaluation_writes_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for name, strategy in (("a", "sequential"), ("b", "latest")):
        flags = ["-m", "python:tests.runtime.toy_policy:make", "-e", "fake", "-n", "2"]
        flags += ["--env.max_timesteps", "5", "--videos", "0", "-o", str(tmp_path / name)]
        assert eval_sim.main([*flags, "--action_manager", strategy]) == 0
        files.append(str(tmp_path / name / "fake" / "fake.json"))
    capsys.readouterr()
    assert compare.main(files) == 0
    shown = capsys.readouterr().out
    assert "action_manager.name: A sequential, B latest" in shown
    assert "McNemar's exact test: seeds in both files: 2\n" in shown
