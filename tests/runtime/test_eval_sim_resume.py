"""``eval_sim --resume``: the result is that of an evaluation that was never interrupted."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.datasets.dataset_reader import DatasetReader
from runtime.eval_sim import cli as eval_sim
from runtime.eval_sim.reports import Report
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.eval_sim.runner import run
from runtime.evaluation.episode_journal import EpisodeJournal
from runtime.evaluation.episode_result import Episode, ErroredEpisode
from runtime.evaluation.repeatable_fields import repeatable_fields
from runtime.evaluation.result_file import read_result
from runtime.server.server_process import ServerProcess
from tests.runtime.command import status_of
from tests.runtime.deadly_policy import DEADLY_SEED

TOY = "python:tests.runtime.toy_policy:make"
SLOW = "python:tests.runtime.toy_policy:make_slow"
ARGS = ["-e", "fake", "--env.max_timesteps", "25"]
KILLS = 20
KILL_WITHIN_S = 4.0
"""From the start of an evaluation; it is ready after about 2 s, and takes about 30 s in all."""


@pytest.fixture(autouse=True, scope="module")
def no_plot() -> Iterator[None]:
    """A plot takes longer than the episodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_sim, "write_timing_plot", lambda *_: None)
        yield


def evaluate(out: Path, *flags: str, policy: str = TOY, status: int = 0) -> dict[str, Any]:
    argv = [*ARGS, "-m", policy, "-o", str(out), *flags]
    assert status_of(eval_sim.main, argv) == status
    return read(out)


def read(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "fake" / "fake.json").read_text()))


def journal_path(out: Path) -> Path:
    return out / "fake" / "fake_episodes.jsonl"


def assert_same_videos(got: Path, expected: Path) -> None:
    """The last pictures are equal, and so are the videos but for the encoder.

    From equal frames it does not always make the same bytes.
    """
    ours, theirs = (sorted((out / "fake" / "video").rglob("*.*")) for out in (got, expected))
    assert [path.name for path in ours] == [path.name for path in theirs]
    for one, other in zip(ours, theirs, strict=True):
        if one.suffix == ".png":
            assert one.read_bytes() == other.read_bytes()
            continue
        frames, expected_frames = decoded(one), decoded(other)
        assert frames.shape == expected_frames.shape
        assert np.abs(frames - expected_frames).mean() < 2


def decoded(video: Path) -> NDArray[np.int16]:
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames).astype(np.int16)


def files(out: Path) -> dict[str, bytes]:
    found = [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def assert_same_samples(got: Path, expected: Path) -> None:
    name = Path("fake", "fake_samples.npz")
    with np.load(got / name) as ours, np.load(expected / name) as theirs:
        assert {key: ours[key].shape for key in ours} == {key: theirs[key].shape for key in theirs}
        np.testing.assert_array_equal(ours["action_age_s"], theirs["action_age_s"])


def assert_same_result(got: Path, expected: Path) -> None:
    assert repeatable_fields(read(got)) == repeatable_fields(read(expected))
    assert_same_samples(got, expected)
    assert_same_videos(got, expected)
    assert {path.name for path in (got / "fake").iterdir()} == {
        path.name for path in (expected / "fake").iterdir()
    }


SHORT = ["-n", "4", "--videos", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation; to be copied."""
    out = tmp_path_factory.mktemp("finished")
    evaluate(out, *SHORT)
    return out


@pytest.fixture
def out(tmp_path: Path, finished: Path) -> Path:
    """A copy of the finished evaluation."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_stopped_evaluation_goes_on(out: Path, finished: Path) -> None:
    journal = journal_path(out)
    with_two = journal.read_bytes().splitlines(keepends=True)[:3]
    os.truncate(journal, len(b"".join(with_two)) + 10)  # killed while it wrote the third
    (out / "fake" / ".fake.json.1.partial").write_text("half")
    evaluate(out, *SHORT, "--resume")
    assert journal.read_bytes().splitlines(keepends=True)[:3] == with_two
    assert_same_result(out, finished)


def test_a_finished_evaluation_is_extended_and_not_shortened(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for count in ("1", "4"):  # the first one from the beginning
        evaluate(tmp_path, "-n", count, "--videos", "2", "--resume")
    assert_same_result(tmp_path, finished)
    before = files(tmp_path)
    evaluate(tmp_path, "-n", "3", "--videos", "2", "--resume", status=eval_sim.BAD_INPUT)
    assert "-n/--num_rollout: got 3, expected at least 4" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_another_run_is_refused_and_nothing_is_overwritten(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(out)
    for flags, message in [
        (["-s", "1"], "--resume: seed: got 1, expected 0, as in"),
        (["--realtime"], "--resume: realtime: got True, expected False, as in"),
        (["--action_manager", "latest"], "--resume: action_manager: got 'latest', expected None"),
        (["--env.dt_s", "0.01"], "--resume: env.dt_s: got 0.01, expected None"),
        (["--videos", "1"], "--resume: videos: got 1, expected 2"),
        (["-m", "python:tests.runtime.toy_policy:make_named"], "--resume: policy.checkpoint: got"),
    ]:
        evaluate(out, *SHORT, "--resume", *flags, status=eval_sim.BAD_INPUT)
        error = capsys.readouterr().err
        assert message in error
        assert "it is of another run" in error
    assert files(out) == before


def test_a_result_without_its_journal_is_refused(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal_path(out).unlink()
    before = files(out)
    evaluate(out, *SHORT, "--resume", status=eval_sim.BAD_INPUT)
    assert "got a result without fake_episodes.jsonl, expected both" in capsys.readouterr().err
    assert files(out) == before


def test_a_second_evaluation_of_the_same_result_is_refused(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(out)
    with EpisodeJournal(journal_path(out)):
        evaluate(out, *SHORT, status=eval_sim.BAD_INPUT)
    assert "another evaluation writes this result" in capsys.readouterr().err
    assert files(out) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--retries", "-1"], "--retries: got -1, expected 0 to 1000"),
        (["--episode_timeout_s", "0"], "--episode_timeout_s: got 0, expected more than 0"),
    ],
)
def test_numbers_out_of_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert status_of(eval_sim.main, [*ARGS, "-o", str(tmp_path), *flags]) == eval_sim.BAD_INPUT
    assert message in capsys.readouterr().err


def test_an_episode_with_an_error_is_run_again(
    out: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_an_error(config: EvalSimConfig, seeds: Sequence[int]) -> Iterator[Report]:
        for report in run(config, seeds):
            lost = isinstance(report, Episode) and report.seed == 2
            yield ErroredEpisode(2, "killed", 3) if lost else report

    monkeypatch.setattr(eval_sim, "run", with_an_error)
    result = evaluate(out, *SHORT, status=eval_sim.LOST)
    assert result["errors"] == [{"seed": 2, "error": "killed", "attempts": 3}]
    assert (result["total"], result["requested"], result["failure"]) == (3, 4, "")
    captured = capsys.readouterr()
    assert "no outcome   1 episodes, not counted above: seeds 2" in captured.out
    assert "1 of 4 episodes have no outcome" in captured.err
    compared = read_result(out / "fake" / "fake.json")
    assert compared.errored == (2,)
    assert list(compared.outcomes) == [0, 1, 3]
    monkeypatch.setattr(eval_sim, "run", run)
    evaluate(out, *SHORT, "--resume")
    assert_same_result(out, finished)


@pytest.mark.long
def test_a_run_goes_on_after_its_server_was_lost(tmp_path: Path) -> None:
    flags = ["-n", "5", "--videos", "0"]
    with ServerProcess(["-m", TOY]) as server:
        evaluate(tmp_path / "whole", *flags, policy=server.address)
    lost = tmp_path / "lost"
    with ServerProcess(["-m", "python:tests.runtime.toy_policy:make_mortal"]) as server:
        result = evaluate(lost, *flags, policy=server.address, status=eval_sim.LOST)
        assert result["total"] == 2
    with ServerProcess(["-m", TOY]) as server:
        evaluate(lost, *flags, "--resume", policy=server.address)
    assert_same_result(lost, tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "flags", "error"),
    [
        ("make_killed", ["--num_envs", "2"], "an evaluation process died (exit status -9)"),
        ("make_stopped", ["--episode_timeout_s", "3"], "the episode took longer than 3 s"),
    ],
)
def test_an_episode_that_costs_its_worker_is_an_error_and_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: str, flags: list[str], error: str
) -> None:
    policy = f"python:tests.runtime.deadly_policy:{make}"
    argv = ["-n", "5", "--videos", "0", "--retries", "1", *flags]
    for resume in ([], ["--resume"]):
        result = evaluate(tmp_path, *argv, *resume, policy=policy, status=eval_sim.LOST)
        assert result["errors"] == [{"seed": DEADLY_SEED, "error": error, "attempts": 2}]
        assert [episode["seed"] for episode in result["episodes"]] == [0, 1, 2, 4]
        assert result["total"] == 4
        captured = capsys.readouterr()
        assert f"1 episodes, not counted above: seeds {DEADLY_SEED}" in captured.out
        assert "1 of 5 episodes have no outcome" in captured.err
    compared = read_result(tmp_path / "fake" / "fake.json")
    assert compared.errored == (DEADLY_SEED,)
    assert list(compared.outcomes) == [0, 1, 2, 4]


@pytest.mark.long
def test_processes_that_never_start_end_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = "python:tests.runtime.deadly_policy:make_unborn"
    argv = [*ARGS, "-m", policy, "-o", str(tmp_path), "-n", "4", "--num_envs", "2"]
    assert status_of(eval_sim.main, argv) == eval_sim.LOST
    assert "before it was ready, the 3. in a row" in capsys.readouterr().err


def start(out: Path, dataset: Path, num_envs: int) -> subprocess.Popen[bytes]:
    flags = ["-n", "40", "--num_envs", str(num_envs), "--retries", "1000", "--videos", "20"]
    recorded = ["--dataset", str(dataset), "--dataset_lossless"]
    command = [sys.executable, "eval_sim.py", *ARGS, "-m", SLOW, "-o", str(out), *flags, *recorded]
    return subprocess.Popen([*command, "--resume"], stderr=subprocess.DEVNULL)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wait_for_an_episode(driver: subprocess.Popen[bytes], journal: Path) -> None:
    before = size(journal)
    while driver.poll() is None and size(journal) == before:
        time.sleep(0.01)


def wait_ended(driver: subprocess.Popen[bytes], within_s: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(within_s)


def workers(driver: int) -> list[int]:
    """The worker processes of an evaluation that runs."""
    try:
        children = Path(f"/proc/{driver}/task/{driver}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    except FileNotFoundError:  # one has just ended
        return []
    return [pid for pid, command in commands.items() if "spawn_main" in command]


def recorded_actions(dataset: Path) -> Iterator[bytes]:
    reader = DatasetReader(dataset)
    for index in range(len(reader)):
        yield reader.columns(index)["action"].tobytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert start(out, out / "set", 1).wait() == 0
    return out


def assert_undisturbed(out: Path, undisturbed: Path, *, ordered: bool) -> None:
    # The datasets' names differ.
    ours, theirs = (repeatable_fields(read(one)) for one in (out, undisturbed))
    for result in (ours, theirs):
        del result["config"]["recording.dataset"]
    assert ours == theirs
    assert_same_samples(out, undisturbed)
    assert_same_videos(out, undisturbed)
    actions, expected = (list(recorded_actions(one / "set")) for one in (out, undisturbed))
    assert (actions if ordered else sorted(actions)) == (expected if ordered else sorted(expected))
    assert not (out / "set" / ".recording").exists()


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_envs", [1, 2])
def test_twenty_kills_of_the_whole_evaluation(
    tmp_path: Path, undisturbed: Path, num_envs: int
) -> None:
    """A fast machine finishes an evaluation before as many: then another one begins."""
    rng, kills, hit = random.Random(num_envs), 0, set()
    for out in (tmp_path / str(number) for number in itertools.count()):
        out.mkdir()
        while True:
            with start(out, out / "set", num_envs) as driver:
                if kills % 2:
                    wait_for_an_episode(driver, journal_path(out))
                    wait_ended(driver, rng.uniform(0, 1))
                elif kills < KILLS:
                    wait_ended(driver, rng.uniform(0, KILL_WITHIN_S))
                if kills == KILLS or driver.poll() is not None:
                    assert driver.wait() == 0
                    break
                driver.kill()
            kills += 1
            hit.add((out, size(journal_path(out))))
        assert_undisturbed(out, undisturbed, ordered=num_envs == 1)
        if kills == KILLS:
            break
    assert len(hit) > KILLS // 4  # many kills hit different episodes


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_twenty_kills_of_workers_without_an_interruption(tmp_path: Path, undisturbed: Path) -> None:
    """A fast machine finishes an evaluation before as many: then another one begins."""
    rng, kills = random.Random(0), 0
    for out in (tmp_path / str(number) for number in itertools.count()):
        out.mkdir()
        with start(out, out / "set", 2) as driver:
            while kills < KILLS and driver.poll() is None:
                wait_ended(driver, rng.uniform(0, 2))
                if alive := workers(driver.pid):
                    os.kill(rng.choice(alive), signal.SIGKILL)
                    kills += 1
        assert driver.returncode == 0
        assert_undisturbed(out, undisturbed, ordered=False)
        if kills == KILLS:
            break
