"""LeRobot's own ``LeRobotDataset`` and trainer, unmodified, on what the evaluations record; and
what it writes, read by ours.

``METRONOME_LEROBOT_PYTHON`` is a Python with lerobot 0.4.4.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from policies.checkpoint.load import load_policy
from runtime.datasets.dataset_reader import DatasetReader
from runtime.datasets.errors import DatasetError
from runtime.datasets.layout import read_info
from runtime.datasets.spooled_episode import SpooledEpisode
from runtime.eval_real.recording import Recording
from runtime.eval_sim import cli as eval_sim
from runtime.tools import train
from tests.datasets import lerobot_writer_peer, truth
from tests.datasets.episodes import psnr
from tests.runtime.command import status_of

PYTHON = os.environ.get("METRONOME_LEROBOT_PYTHON", "")
PEER = Path(__file__).with_name("lerobot_peer.py")
POLICY = "python:tests.datasets.two_camera_policy:make"
ALOHA = {"max_timesteps": "20", "shadows": "false", "msaa": "0"}
CAMERAS = ("top", "left_wrist")
EPISODES, KILLS = 10, 20

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="needs METRONOME_LEROBOT_PYTHON"),
]


def peer(tmp_path: Path, *command: str) -> str:
    """Run LeRobot's Python without a network; return what it printed."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [PYTHON, *command],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def loaded(tmp_path: Path, *roots: Path) -> list[dict[str, np.ndarray]]:
    """What LeRobot reads from each of the datasets in ``roots``."""
    pairs = [(root, tmp_path / f"read_{number}.npz") for number, root in enumerate(roots)]
    peer(tmp_path, str(PEER), *(str(path) for pair in pairs for path in pair))
    found = []
    for _, out in pairs:
        with np.load(out) as arrays:
            found.append(dict(arrays))
    return found


def evaluate(tmp_path: Path, env: str, overrides: dict[str, str], *flags: str) -> Path:
    short = [f"--env.{key}={value}" for key, value in overrides.items()]
    argv = ["-m", POLICY, "-e", env, *short, "-o", str(tmp_path / "results"), "--videos", "0"]
    assert status_of(eval_sim.main, [*argv, "--dataset", str(tmp_path / "set"), *flags]) == 0
    return tmp_path / "set"


def assert_statistics(read: dict[str, np.ndarray]) -> None:
    """Of all columns of numbers, they are those that LeRobot computes from what it reads."""
    keys = [name for name in read if name.startswith("lerobot_stats/")]
    assert len(keys) > 50
    for name in keys:
        ours, theirs = read[name.removeprefix("lerobot_")], read[name]
        column = name.rpartition("/")[0]
        spread = read[f"{column}/max"] - read[f"{column}/min"]
        # LeRobot counts quantiles in 5000 steps. It reads all as float32, also times (float64).
        near = spread / 2000 if name.rpartition("/")[2].startswith("q") else 1e-6 * np.abs(theirs)
        assert (np.abs(ours - theirs) <= near + 1e-6).all(), (name, ours, theirs)


@pytest.mark.parametrize("lossless", [False, True])
def test_lerobot_loads_what_eval_sim_records(tmp_path: Path, lossless: bool) -> None:
    flags = ["--dataset_lossless"] if lossless else []
    root = evaluate(tmp_path, "aloha", ALOHA, "-n", str(EPISODES), *flags)
    (read,) = loaded(tmp_path, root)
    expected = truth.episodes("aloha", ALOHA, EPISODES)
    start = 0
    for index, episode in enumerate(expected):
        n = len(episode["action"])
        np.testing.assert_array_equal(read[f"bounds/{index}"], [start, start + n, n])
        rows = slice(start, start + n)
        for key in ("observation.state", "action", "next.reward", "next.success"):
            np.testing.assert_array_equal(read[key][rows], episode[key], strict=True)
        np.testing.assert_array_equal(read["timestamp"][rows], np.float32(np.arange(n) / 50))
        np.testing.assert_array_equal(read["frame_index"][rows], np.arange(n))
        for camera in CAMERAS:
            key = f"observation.images.{camera}"
            if lossless:
                np.testing.assert_array_equal(read[key][rows], episode[key])
            else:
                assert min(map(psnr, read[key][rows], episode[key])) >= 35
        start += n
    assert read["total"] == start
    np.testing.assert_array_equal(read["index"], np.arange(start))
    assert set(read["tasks"]) == {DatasetReader(root).tasks[0]}
    assert_statistics(read)


KEEPING_SPOOLS = """
import shutil, sys
from runtime.datasets.dataset_recorder import DatasetRecorder
from runtime.eval_real.cli import main

kept, add = sys.argv.pop(1), DatasetRecorder.add

def keep_and_add(recorder, folder):
    shutil.copytree(folder, f"{kept}/{folder.name}")
    add(recorder, folder)

DatasetRecorder.add = keep_and_add
sys.exit(main())
"""
"""``eval_real``, which copies what it gives to the recorder into a folder."""


@pytest.mark.parametrize("lossless", [False, True])
def test_lerobot_loads_what_eval_real_records(tmp_path: Path, lossless: bool) -> None:
    """Commands and states are those of the recordings; pictures, those of the cameras."""
    flags = ["-c", "sim_twin", "-m", POLICY, "--yes", "-n", "2", "--max_timesteps", "40"]
    flags += ["--robot.cameras", "{top: {camera: top, hw: [120, 160]}, left_wrist: {camera: "]
    flags[-1] += "left_wrist, hw: [120, 160]}}"
    flags += ["-o", str(tmp_path / "results"), "--dataset", str(tmp_path / "set")]
    flags += ["--dataset_lossless"] if lossless else []
    flags += [
        "--near",
        "10",
        "--same_joints",
        "--max_sensing_age_s",
        "5",
        "--video_fps",
        "0",
    ]
    flags += ["--robot.sensor_timeout_s", "5", "--fps", "20"]
    command = [sys.executable, "-c", KEEPING_SPOOLS, str(tmp_path / "kept"), *flags]
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    (read,) = loaded(tmp_path, tmp_path / "set")
    folder = tmp_path / "results" / "sim_twin" / "sim_transfer_cube"
    for index in range(2):
        rows = Recording.load(folder / f"rollout_{index:03d}").rows
        start, end, n = read[f"bounds/{index}"]
        sent = {row.tobytes() for row in rows["command"]}
        measured = {row.tobytes() for row in rows["state"]}
        assert n >= 35
        assert {row.tobytes() for row in read["action"][start:end]} <= sent
        assert {row.tobytes() for row in read["observation.state"][start:end]} <= measured
        np.testing.assert_array_equal(read["timestamp"][start:end], np.float32(np.arange(n) / 20))
        (spool,) = (tmp_path / "kept").glob(f"*rollout_{index}*")
        for camera in CAMERAS:
            seen = np.stack(list(SpooledEpisode.load(spool).pictures(camera, (120, 160))))
            found = read[f"observation.images.{camera}"][start:end]
            if lossless:
                np.testing.assert_array_equal(found, seen)
            else:
                assert min(map(psnr, found, seen)) >= 35
            assert len(np.unique(seen.reshape(n, -1), axis=0)) > n / 4
    assert_statistics(read)


def test_lerobot_trains_on_it(tmp_path: Path) -> None:
    root = evaluate(tmp_path, "fake", {"max_timesteps": "20"}, "-n", "3")
    small = {
        "dim_model": 32, "n_heads": 2, "dim_feedforward": 32, "n_encoder_layers": 1,
        "n_vae_encoder_layers": 1, "latent_dim": 8, "chunk_size": 5, "n_action_steps": 5,
        "pretrained_backbone_weights": "null", "device": "cpu", "push_to_hub": "false",
    }  # fmt: skip
    printed = peer(
        tmp_path, "-m", "lerobot.scripts.lerobot_train", "--dataset.repo_id=metronome/test",
        f"--dataset.root={root}", "--dataset.video_backend=pyav", "--policy.type=act",
        *(f"--policy.{key}={value}" for key, value in small.items()),
        "--steps=5", "--batch_size=2", "--num_workers=0", "--log_freq=1", "--wandb.enable=false",
        "--save_checkpoint=false", "--eval_freq=0", f"--output_dir={tmp_path / 'train'}",
    )  # fmt: skip
    assert "step:5" in printed
    assert "nan" not in printed.partition("step:5")[2].splitlines()[0]


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_what_lerobot_writes_is_read_and_trained_on(tmp_path: Path, kind: str) -> None:
    """Several episodes in a file, several files, several chunks."""
    root = tmp_path / "set"
    peer(tmp_path, lerobot_writer_peer.__file__, str(root), kind)
    files = "videos/*top" if kind == "videos" else "data"
    assert 1 < len(list(root.glob(f"{files}/*"))) < len(list(root.glob(f"{files}/*/*"))) < 7
    (read,) = loaded(tmp_path, root)
    reader = DatasetReader(root)
    assert len(reader) == lerobot_writer_peer.EPISODES
    assert reader.cameras == dict.fromkeys(lerobot_writer_peer.CAMERAS, lerobot_writer_peer.HW)
    for index in range(len(reader)):
        start, end, _ = read[f"bounds/{index}"]
        written, columns = lerobot_writer_peer.episode(index), reader.columns(index)
        for key in ("observation.state", "action", "observation.environment_state"):
            np.testing.assert_array_equal(columns[key], written[key], strict=True)
        assert reader.tasks[columns["task_index"][0]] == f"task {index % 2}"
        for camera, key in lerobot_writer_peer.KEYS.items():
            ours = np.stack(list(reader.pictures(index, camera)))
            if kind == "images":
                np.testing.assert_array_equal(ours, written[key])
            else:  # two builds of the decoder and of the conversion of colours
                assert min(map(psnr, ours, read[key][start:end])) >= 45
                assert min(map(psnr, ours, written[key])) >= 25
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(output=tmp_path / "run"))
    assert train.main(["--config", str(recipe), "--data", f"lerobot:{root}"]) == 0
    policy = load_policy(str(tmp_path / "run" / "policy"), device="cpu", threads=1)
    assert (policy.contract.state_dim, policy.contract.action_dim) == (3, 2)
    assert policy.contract.dt_s == 1 / 30


RECIPE = """
task: toy
demonstrations: nowhere
output: {output}
cameras:
- {{name: top, source_hw: [64, 96], model_hw: [32, 48], resize: area}}
- {{name: hand, source_hw: [64, 96], model_hw: [32, 48], resize: area}}
dataset_columns: {{cameras: {{hand: observation.images.wrist}}}}
chunk_size: 5
width: 16
n_heads: 2
feedforward: 16
n_encoder_layers: 1
steps: 3
batch_size: 2
threads: 1
evaluate_episodes: 0
"""


def test_killed_while_it_records_lerobot_loads_the_finished_episodes(tmp_path: Path) -> None:
    """SIGKILL for the evaluation and its recorder at once, 20 times, while it goes on."""
    root, finished, generator = tmp_path / "set", 0, random.Random(1)
    out = tmp_path / "results"
    command = [sys.executable, "-m", "runtime.eval_sim", "-m", POLICY, "-e", "fake", "-n", "1000"]
    command += ["--env.max_timesteps", "8", "--videos", "0", "-o", str(out), "--dataset", str(root)]
    for _ in range(KILLS):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for_episodes(root, finished + 1, process)
            time.sleep(generator.uniform(0, 0.5))
        finally:
            _kill_with_children(process)
        finished = _finished(root)
        shutil.copytree(root, tmp_path / f"killed_{finished}")
    copies = sorted(tmp_path.glob("killed_*"))
    assert len(copies) == KILLS
    for copy, read in zip(copies, loaded(tmp_path, *copies), strict=True):
        finished = int(copy.name.partition("_")[2])
        for index in range(finished):
            start, end, n = read[f"bounds/{index}"]
            assert end - start == n == 8
            assert (read["episode_index"][start:end] == index).all()
        assert read["total"] == 8 * finished
        assert set(np.diff(read["index"])) <= {1}


def _finished(root: Path) -> int:
    with contextlib.suppress(DatasetError):
        return int(read_info(root)["total_episodes"])
    return 0


def _wait_for_episodes(root: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        if _finished(root) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"the evaluation ended: {process.returncode}")


def _kill_with_children(process: subprocess.Popen[bytes]) -> None:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = [int(pid) for pid in path.read_text().split()] if path.exists() else []
    for pid in (*children, process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    for pid in children:
        while Path(f"/proc/{pid}").exists() and "zombie" not in _state(pid):
            time.sleep(0.01)


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/status").read_text().split("State:")[1].splitlines()[0]
    return "zombie"
