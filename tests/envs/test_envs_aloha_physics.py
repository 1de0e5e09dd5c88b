"""The simulation equals gym-aloha's, and says what is wrong with what it is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from envs.aloha_physics import ACTION_DIM, AlohaSim
from envs.aloha_tasks import LEFT_FINGER, RIGHT_FINGER, TASKS, find_task
from envs.errors import EnvError, PhysicsDiverged

ROOT = Path(__file__).resolve().parents[2]
SIDE_BY_SIDE = Path(__file__).with_name("side_by_side.py")


@pytest.mark.parametrize(
    ("task", "seed", "render"),
    [
        ("sim_transfer_cube", 3, "render"),
        ("sim_transfer_cube", 11, ""),
        ("sim_insertion", 5, "render"),
    ],
)
def test_joints_rewards_and_pictures_equal_gym_alohas(task: str, seed: int, render: str) -> None:
    environment = {"MUJOCO_GL": "egl", **os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(SIDE_BY_SIDE), task, str(seed), render],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert errors["joints"] < 1e-9
    assert errors["objects"] < 1e-9
    assert errors["rewards"] == 0
    assert errors["pixels"] == 0


def test_importing_the_simulation_brings_neither_mujoco_nor_dm_control() -> None:
    code = (
        "import sys, envs.aloha_physics, envs.factory; "
        "print([m for m in ('mujoco', 'dm_control', 'gym_aloha', 'gymnasium') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_equal_seeds_and_actions_give_equal_episodes_after_any_history() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (30, ACTION_DIM))
    with AlohaSim("sim_insertion") as fresh, AlohaSim("sim_insertion") as used:
        for action in actions[::-1]:
            used.step(action)
        for sim in (fresh, used):
            sim.reset(42)
        for action in actions:
            assert fresh.step(action) == used.step(action)
        np.testing.assert_array_equal(fresh.data.qpos, used.data.qpos)


def test_different_seeds_put_the_objects_elsewhere_within_the_range() -> None:
    poses = np.array([find_task("sim_insertion").sample(seed) for seed in range(200)])
    assert len(np.unique(poses[:, 0])) == 200
    assert (poses[:, [0, 1, 7, 8]] >= (0.1, 0.4, -0.2, 0.4)).all()
    assert (poses[:, [0, 1, 7, 8]] <= (0.2, 0.6, -0.1, 0.6)).all()


def test_a_held_start_pose_stays_and_grippers_are_normalized() -> None:
    with AlohaSim("sim_transfer_cube") as sim:
        start = sim.agent_pos
        for _ in range(20):
            sim.step(start)
        np.testing.assert_allclose(sim.agent_pos, start, atol=0.02)
        opened = start.copy()
        opened[[6, 13]] = 1.0
        for _ in range(50):
            sim.step(opened)
        assert (sim.agent_pos[[6, 13]] > 0.8).all()


@pytest.mark.parametrize(
    ("contacts", "reward"),
    [
        ([], 0),
        ([("red_box", "table")], 0),
        ([("red_box", RIGHT_FINGER), ("red_box", "table")], 1),
        ([("red_box", RIGHT_FINGER)], 2),
        ([("red_box", LEFT_FINGER), ("red_box", "table")], 3),
        ([("red_box", LEFT_FINGER), ("red_box", RIGHT_FINGER)], 4),
        ([(RIGHT_FINGER, "red_box")], 0),
    ],
)
def test_stages_of_the_transfer(contacts: list[tuple[str, str]], reward: int) -> None:
    assert TASKS["sim_transfer_cube"].reward(frozenset(contacts)) == reward


@pytest.mark.parametrize(
    ("contacts", "reward"),
    [
        ([("red_peg", RIGHT_FINGER)], 0),
        ([("red_peg", RIGHT_FINGER), ("socket-2", LEFT_FINGER), ("red_peg", "table")], 1),
        ([("red_peg", RIGHT_FINGER), ("socket-3", LEFT_FINGER)], 2),
        ([("red_peg", "socket-1")], 3),
        ([("red_peg", "socket-1"), ("socket-4", "table")], 0),
        ([("red_peg", "pin"), ("socket-4", "table")], 4),
    ],
)
def test_stages_of_the_insertion(contacts: list[tuple[str, str]], reward: int) -> None:
    assert TASKS["sim_insertion"].reward(frozenset(contacts)) == reward


def test_errors_say_got_and_expected() -> None:
    with pytest.raises(EnvError, match=r"task: got 'sim_fold', .*'sim_transfer_cube'"):
        AlohaSim("sim_fold")
    with pytest.raises(EnvError, match=r"msaa: got 3, expected one of 0, 2, 4"):
        AlohaSim("sim_insertion", msaa=3)
    with AlohaSim("sim_transfer_cube_scripted") as sim:
        with pytest.raises(EnvError, match=r"action: got shape \(7,\), expected \(14,\)"):
            sim.step(np.zeros(7))
        with pytest.raises(EnvError, match="expected finite numbers"):
            sim.step(np.full(14, np.nan))
        with pytest.raises(EnvError, match=r"seed: got -1, expected 0 to 4294967295"):
            sim.reset(-1)
        with pytest.raises(EnvError, match=r"poses: got \(3,\), expected \(7,\)"):
            sim.place_objects(np.zeros(3))


def test_a_diverged_simulation_is_an_error_and_a_reset_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT into the working folder
    with AlohaSim("sim_transfer_cube") as sim:
        sim.data.qvel[0] = 1e12
        with pytest.raises(PhysicsDiverged, match=r"invalid at .*mjWARN_BAD"):
            sim.step(sim.agent_pos)
        sim.reset(0)
        assert sim.step(sim.agent_pos) == 0
