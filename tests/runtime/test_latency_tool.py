"""``metronome latency``: which points are run, which are kept, and what is shown of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime.eval_sim import cli as eval_sim
from runtime.evaluation.success_statistics import LEVEL, detectable_difference, mcnemar_exact
from runtime.tools import latency

TOY = "python:tests.runtime.toy_policy:make"
Run = Callable[..., list[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command in ``tmp_path``; returns the folders of the points that were evaluated."""
    folders: list[str] = []
    evaluate = eval_sim.main

    def main(argv: tuple[str, ...]) -> int:
        folders.append(Path(argv[argv.index("--output_dir") + 1]).name)
        return evaluate(argv)

    def run(*flags: str, status: int = 0, latencies: tuple[str, ...] = ("100", "0")) -> list[str]:
        folders.clear()
        fake = ["-m", TOY, "-e", "fake", "--env.max_timesteps", "40", "-n", "2", "--num_envs", "1"]
        argv = [*fake, "-o", str(tmp_path), "--latencies_ms", *latencies, *flags]
        assert latency.main(argv) == status
        return list(folders)

    monkeypatch.setattr(eval_sim, "main", main)
    return run


def test_points_are_run_once_and_shown(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strategies = ("--strategies", "sequential", "temporal_ensemble:5")
    numbers, picture = tmp_path / "all.json", tmp_path / "curves.png"
    flags = (*strategies, "--json", str(numbers), "--plot", str(picture))
    points = [
        "sequential_0ms", "sequential_100ms",
        "temporal_ensemble_every_5_0ms", "temporal_ensemble_every_5_100ms",
    ]  # fmt: skip
    assert run(*flags) == points
    shown = capsys.readouterr().out
    assert "| temporal_ensemble:5 | 100 | 0/2 |" in shown
    assert run(*flags) == []
    assert capsys.readouterr().out == shown
    first, second = json.loads(numbers.read_text())["curves"]
    assert [point["latency_ms"] for point in first["points"]] == [0, 100]
    assert first["points"][1]["delay_p50_s"] == pytest.approx(0.1)
    assert first["points"][1]["starved_share"] > first["points"][0]["starved_share"] == 0
    assert second["points"][0]["chunks_per_s"] == pytest.approx(10)
    assert second["points"][0]["jerk"] > 0
    assert picture.stat().st_size > 10_000


@pytest.mark.long
def test_a_point_is_run_again_if_it_is_not_the_one_that_is_wanted(run: Run, tmp_path: Path) -> None:
    cheap: tuple[str, ...] = ("--strategies", "sequential")
    assert run(*cheap, latencies=("0",)) == ["sequential_0ms"]
    assert run(*cheap) == ["sequential_100ms"]  # another latency beside it
    assert run(*cheap, "-s", "7", latencies=("0",)) == ["sequential_0ms"]
    assert run(*cheap, "-s", "7", "--num_envs", "2", latencies=("0",)) == []  # changes no result
    result = tmp_path / "sequential_0ms" / "fake" / "fake.json"
    content = json.loads(result.read_text())
    result.write_text(json.dumps({**content, "failure": "interrupted"}))
    assert run(*cheap, "-s", "7", latencies=("0",)) == ["sequential_0ms"]
    result.write_text("{")
    assert run(*cheap, "-s", "7", latencies=("0",)) == ["sequential_0ms"]


def test_another_checkpoint_needs_another_folder(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.joinpath("model.json").write_text(
        json.dumps({"model_name_or_path": "ckpt/other", "sha256": "0123456789abcdef"})
    )
    assert run(status=latency.BAD_INPUT) == []
    assert "has points of another checkpoint, ckpt/other" in capsys.readouterr().err


def test_the_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    def digest(**files: str) -> str:
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        return latency._digest(tmp_path)

    assert digest(a="1", b="2") == digest(a="1") != digest(a="2")
    assert digest(a="1") != digest(c="")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--strategies", "fastest"), "action_manager: got 'fastest', expected one of"),
        (("--strategies", "latest:x"), "--strategies: got 'latest:x', expected NAME or NAME:STR"),
        (("--strategies", "latest:0"), "--strategies: got 'latest:0', expected NAME or NAME:STR"),
    ],
)
def test_an_invalid_strategy_is_refused_before_any_point(
    run: Run, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags, status=latency.BAD_INPUT) == []
    assert message in capsys.readouterr().err


def test_a_failed_point_ends_the_command(run: Run) -> None:
    flags = ("--strategies", "temporal_ensemble:11", "sequential")
    assert run(*flags, status=eval_sim.BAD_INPUT) == ["temporal_ensemble_every_11_0ms"]


@pytest.mark.parametrize(("rate", "pairs"), [(0.95, 100), (0.8, 60)])
def test_a_detectable_drop_is_found_in_four_of_five_cases(rate: float, pairs: int) -> None:
    drop = detectable_difference(rate, pairs)
    assert drop is not None
    rng, found = np.random.default_rng(1), {}
    for tried in (drop, drop - 0.03):
        first = rng.random((20_000, pairs)) < rate
        second = rng.random((20_000, pairs)) < rate - tried
        counts = (first & ~second).sum(axis=1), (second & ~first).sum(axis=1)
        found[tried] = np.mean(mcnemar_exact(*counts) <= LEVEL)
    assert found[drop] > 0.79
    assert found[drop - 0.03] < 0.78


def test_too_few_pairs_detect_nothing() -> None:
    assert detectable_difference(1.0, 5) is None
    assert detectable_difference(0.0, 100) is None
