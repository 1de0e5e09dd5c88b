"""``eval_sim.py`` as its users run it: the same episodes wherever and however they run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import av
import pytest

from runtime.errors import RuntimeFault
from runtime.eval_sim import cli as eval_sim
from runtime.server.server_process import ServerProcess
from tests.runtime.command import status_of

TOY = "python:tests.runtime.toy_policy:make"
SHORT = ["-e", "fake", "--env.max_timesteps", "25"]
REFERENCE = Path(
    os.environ.get("METRONOME_REFERENCE", Path(__file__).parents[3] / "shared" / "fixtures")
)


def evaluate(tmp_path: Path, *flags: str, status: int = 0) -> dict[str, Any]:
    assert status_of(eval_sim.main, [*SHORT, "-o", str(tmp_path), *flags]) == status
    results = list((tmp_path / "fake").glob("*.json"))
    return json.loads(results[0].read_text()) if results else {}


def outcomes(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(e["seed"], e["success"], e["reward"], e["horizon"]) for e in result["episodes"]]


def test_the_result_file_is_complete(tmp_path: Path) -> None:
    result = evaluate(tmp_path, "-m", TOY, "-n", "3", "--seed", "10", "--videos", "2")
    assert [e["seed"] for e in result["episodes"]] == [10, 11, 12]
    assert result["total"] == result["requested"] == 3
    assert set(result) >= {
        "success_rate", "wilson_95", "total", "total_success", "episodes", "timing",
        "deterministic", "transport", "policy", "versions", "horizon", "horizon_success",
    }  # fmt: skip
    assert result["deterministic"] is True
    assert result["transport"] == "in process"
    assert result["policy"]["contract"]["chunk_size"] == 10
    assert result["timing"]["chunks"] == 9  # 25 ticks, 10 steps of each chunk
    assert result["timing"]["starved_ticks"] == 0
    assert list(result["timing"]["stages"]) == ["preprocess", "infer", "postprocess"]
    videos = sorted((tmp_path / "fake").glob("video/**/*.mp4"))
    assert len(videos) == 2
    assert all(video.with_suffix(".png").exists() for video in videos)
    with av.open(str(videos[0])) as container:
        assert (
            sum(1 for _ in container.decode(video=0)) == 14
        )  # every other of 25 ticks, and the end
    beside = {path.name for path in (tmp_path / "fake").iterdir()}
    assert beside == {
        "fake.json", "fake_episodes.jsonl", "fake_samples.npz", "fake_timing.png", "video",
    }  # fmt: skip


def test_the_same_episodes_however_many_processes(tmp_path: Path) -> None:
    one = evaluate(tmp_path / "one", "-m", TOY, "-n", "5", "--videos", "0")
    three = evaluate(tmp_path / "three", "-m", TOY, "-n", "5", "--num_envs", "3", "--videos", "0")
    assert outcomes(one) == outcomes(three)
    assert one["total"] == three["total"] == 5


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_served_equals_in_process_episode_by_episode(tmp_path: Path, transport: str) -> None:
    local = evaluate(tmp_path / "local", "-m", TOY, "-n", "4")
    with ServerProcess(["-m", TOY]) as server:
        flags = ["-m", server.address, "--transport", transport, "-n", "4"]
        served = evaluate(tmp_path / "served", *flags)
        many = evaluate(tmp_path / "many", *flags, "--num_envs", "2")
    assert outcomes(served) == outcomes(local) == outcomes(many)
    assert served["transport"] == transport
    assert served["transport_reason"]
    assert served["timing"]["stages"]["reply"]["count"] == 12


def test_real_time_counts_its_ticks(tmp_path: Path) -> None:
    result = evaluate(tmp_path, "-m", TOY, "-n", "2", "--realtime", "--n_action_steps", "5")
    assert result["deterministic"] is False
    assert result["mode"] == "realtime"
    timing = result["timing"]
    assert timing["lateness"]["count"] + timing["missed_ticks"] >= timing["ticks"] == 50
    assert timing["action_age"]["count"] > 0
    assert result["transport"] == "shm"


def test_a_lost_server_keeps_the_finished_episodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A warm-up, then three requests an episode: it dies in the third one.
    with ServerProcess(["-m", "python:tests.runtime.toy_policy:make_mortal"]) as server:
        result = evaluate(tmp_path, "-m", server.address, "-n", "5", status=eval_sim.LOST)
    assert result["total"] == 2
    assert result["requested"] == 5
    assert "is gone" in result["failure"]
    assert "2 of 5 episodes were finished and kept" in capsys.readouterr().err


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_a_server_lost_between_two_requests(tmp_path: Path, transport: str) -> None:
    # The tenth request, the first of the fourth episode, is answered; the next is never sent.
    policy = "python:tests.runtime.toy_policy:make_leaving"
    with ServerProcess(["-m", policy]) as server:
        flags = ["-m", server.address, "--transport", transport, "-n", "5", "--videos", "0"]
        result = evaluate(tmp_path, *flags, status=eval_sim.LOST)
    assert result["total"] == 3


def test_a_process_that_dies_is_replaced_and_no_episode_is_lost(tmp_path: Path) -> None:
    policy = "python:tests.runtime.toy_policy:make_mortal"  # each process dies in its third episode
    flags = ["-n", "6", "--num_envs", "2", "--videos", "0"]
    died = evaluate(tmp_path / "died", "-m", policy, *flags)
    assert outcomes(died) == outcomes(evaluate(tmp_path / "whole", "-m", TOY, *flags))
    assert died["errors"] == []


def test_an_evaluation_loads_only_what_it_needs() -> None:
    """Each worker process loads the same modules again."""
    heavy = ("numba", "scipy", "matplotlib", "torch", "mujoco", "ray", "rerun")
    code = f"import sys, runtime.eval_sim.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_private_server_does_not_outlive_its_parent() -> None:
    code = (
        "from runtime.server.server_process import ServerProcess; import os, signal\n"
        f"child = ServerProcess(['-m', {TOY!r}])\n"
        "print(child.address, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False
    )
    host, port = parent.stdout.strip().split(":")
    deadline_s = time.monotonic() + 30
    with pytest.raises(ConnectionRefusedError):
        while time.monotonic() < deadline_s:
            socket.create_connection((host, int(port))).close()


@pytest.mark.parametrize("name", ["temporal_ensemble", "latest", "overlap", "OlderFirstManager"])
def test_every_strategy_runs(tmp_path: Path, name: str) -> None:
    result = evaluate(tmp_path, "-m", TOY, "-n", "1", "--action_manager", name, "--videos", "0")
    assert result["action_manager"]["name"] == name
    asks_every_tick = name != "OlderFirstManager"
    assert result["timing"]["chunks"] == (25 if asks_every_tick else 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-m", "nowhere/at/all"], "read as a path, which does not exist"),
        (["-m", "no-such-host.invalid:5000"], "does not resolve"),
        (["-m", "localhost:abc"], "abc"),
        (["-m", "127.0.0.1:1"], "127.0.0.1:1"),
        (["-m", "python:tests.runtime.toy_policy:absent"], "absent"),
        (["-m", TOY, "-n", "0"], "-n/--num_rollout: got 0, expected 1 to 1000000"),
        (["-m", TOY, "--num_envs", "0"], "--num_envs: got 0, expected 1 to 1024"),
        (["-m", TOY, "--camera_map", "top"], "--camera_map: got 'top', expected POLICY=WORLD"),
        (["-m", TOY, "--camera_map", "nope=top"], "--camera_map: got ['nope'], expected some of"),
        (["-m", TOY, "--camera_map", "top=a", "top=b"], "--camera_map: got 'top' twice"),
        (["-m", TOY, "--videos", "-1"], "--videos: got -1, expected 0 to 1000000"),
        (["-m", TOY, "--fps", "0"], "--fps: got 0, expected 0.01 to 10000"),
        (["-m", TOY, "--fps", "nan"], "--fps: got nan"),
        (["-m", TOY, "--manager_coef", "3"], "got 3.0, expected none: sequential"),
        (["-m", "python:tests.runtime.toy_policy_broken:f"], "cannot be imported"),
        (["-m", TOY, "--env.taks", "x"], "taks"),
        (["-m", TOY, "--evn.task", "x"], "got '--evn.task'"),
        (["-m", TOY, "--env.task"], "expected a value"),
        (["-m", TOY, "--env.dt_s=1", "--env.dt_s", "2"], "--env.dt_s: got it after --env.dt_s,"),
        (
            ["-m", "127.0.0.1:1", "--chunk_size", "20", "--device", "cuda:9"],
            "note: --device, --chunk_size: ignored; they are for the server at 127.0.0.1:1,",
        ),
        (["-m", TOY, "--fps", "30"], "1/30 s apart, the world runs at 50 Hz"),
        (["-m", TOY, "--action_manager", "fastest"], "got 'fastest', expected one of"),
        (["-m", TOY, "--n_action_steps", "11"], "got 11, expected 1 to chunk_size = 10"),
        (["-m", TOY, "--realtime", "--num_envs", "2"], "--realtime with --num_envs"),
        (["-m", TOY, "--env.image_hw", "[9, 9]"], "images.top"),
    ],
)  # fmt: skip
def test_bad_input_is_one_error_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    evaluate(tmp_path, *flags, status=eval_sim.BAD_INPUT)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_an_unwritable_folder_is_an_error_before_the_first_episode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    evaluate(tmp_path / "file", "-m", TOY, status=eval_sim.BAD_INPUT)
    assert "cannot be written" in capsys.readouterr().err


def test_a_full_disk_is_an_error_line_without_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []

    def full(path: Path, *rest: object) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(eval_sim, "write_result", full)
    evaluate(tmp_path, "-m", TOY, "-n", "4", "--videos", "0", status=eval_sim.LOST)
    assert "No space left on device" in capsys.readouterr().err


def test_an_unknown_environment_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_sim.main(["-m", TOY, "-e", "mars"]) == eval_sim.BAD_INPUT
    assert "aloha" in capsys.readouterr().err


def test_any_gymnasium_environment_by_its_id(tmp_path: Path) -> None:
    policy = "python:tests.runtime.toy_policy:make_cart_pole"
    flags = ["-m", policy, "-e", "gym:CartPole-v1", "-n", "2", "--videos", "0"]
    assert eval_sim.main([*flags, "-o", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gym_CartPole-v1" / "CartPole-v1.json").read_text())
    # Pushed one way, the pole falls within a few ticks, and CartPole pays 1 a tick.
    assert all(5 < e["horizon"] < 20 and e["reward"] == 1.0 for e in result["episodes"])


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeFault, match=r"nowhere/at/all.*read as a path, which does not exist"):
        ServerProcess(["-m", "nowhere/at/all"])


def test_a_server_that_takes_too_long_is_given_up() -> None:
    with pytest.raises(RuntimeFault, match=r"^the policy server was not ready within 0.05 s"):
        ServerProcess(["-m", TOY], ready_within_s=0.05)


@pytest.mark.needs_reference
def test_ilstudios_checkpoint_runs_with_a_plain_aloha(tmp_path: Path) -> None:
    archive = REFERENCE / "act_reference_checkpoints.tar.xz"
    if not archive.exists():
        pytest.skip("the reference checkpoints are not beside this clone")
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if "ilstudio_act/checkpoint" in m.name]
        tar.extractall(tmp_path, members, filter="data")
    checkpoint = next(tmp_path.rglob("ilstudio_act/checkpoint"))
    flags = ["-m", str(checkpoint), "-e", "aloha", "-n", "1", "--env.max_timesteps", "3"]
    assert eval_sim.main([*flags, "-o", str(tmp_path / "results"), "--videos", "0"]) == 0
    result = json.loads(next((tmp_path / "results").rglob("*.json")).read_text())
    cameras = result["world"]["cameras"]
    assert cameras["primary"]["camera"] == "top"
    assert cameras["wrist_left"]["camera"] == "left_wrist"
