"""Kinematics and the scripted expert: the plan does the job in the physics it was made for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.aloha_physics import AlohaSim
from envs.kinematics import ArmKinematics, Unreachable, pointing
from envs.scripted_expert import EPISODE_TICKS, plan_episode

RANGE_CORNERS = [(x, y) for x in (0.0, 0.2) for y in (0.4, 0.6)]


@pytest.fixture(scope="module")
def sim():
    with AlohaSim("sim_transfer_cube") as simulation:
        yield simulation


@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=25, deadline=None)
@given(
    reach=st.floats(0.25, 0.45),
    across=st.floats(-0.1, 0.1),
    height=st.floats(0.02, 0.25),
    pitch=st.floats(0.9, 1.3),
)
def test_forward_undoes_inverse_within_the_limits(sim: AlohaSim, side: str, **pose: float) -> None:
    arm = ArmKinematics(sim.model, side)
    x = pose["reach"] - 0.469 if side == "left" else 0.469 - pose["reach"]
    position = np.array([x, 0.5 + pose["across"], pose["height"]])
    rotation = pointing(side, pose["pitch"])
    joints = arm.inverse(position, rotation, arm.start + np.eye(6)[4] * pose["pitch"])
    at, turned = arm.forward(joints)
    np.testing.assert_allclose(at, position, atol=2e-4)
    np.testing.assert_allclose(turned, rotation, atol=3e-4)
    limits = sim.model.jnt_range[:6]
    assert (joints >= limits[:, 0]).all()
    assert (joints <= limits[:, 1]).all()


def test_a_pose_out_of_reach_names_arm_and_pose(sim: AlohaSim) -> None:
    arm = ArmKinematics(sim.model, "left")
    with pytest.raises(Unreachable, match=r"left arm: got \[2\.  0\.5 0\.2\] m, off by"):
        arm.inverse(np.array([2.0, 0.5, 0.2]), pointing("left", 0.0), arm.start)


@given(st.floats(-1.5, 1.5), st.floats(-3.1, 3.1), st.sampled_from(["left", "right"]))
def test_pointing_gives_rotations(pitch: float, roll: float, side: str) -> None:
    rotation = pointing(side, pitch, roll)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    assert rotation[0, 0] * (1 if side == "left" else -1) >= 0


def test_planning_does_not_touch_the_simulation(sim: AlohaSim) -> None:
    sim.reset(1)
    before = np.array(sim.data.qpos), np.array(sim.data.ctrl), sim.data.time
    actions = plan_episode(sim)
    assert actions.shape == (EPISODE_TICKS, 14)
    assert actions.dtype == np.float32
    np.testing.assert_array_equal(sim.data.qpos, before[0])
    np.testing.assert_array_equal(sim.data.ctrl, before[1])
    assert sim.data.time == before[2]


def test_commands_begin_at_the_start_pose_and_never_jump(sim: AlohaSim) -> None:
    for seed in range(5):
        sim.reset(seed)
        actions = plan_episode(sim)
        np.testing.assert_allclose(actions[0], sim.agent_pos, atol=0.03)
        arms = np.delete(actions, (6, 13), axis=1)
        # 0.05 rad in 20 ms is 2.5 rad/s, which the real arm's joints can do.
        assert np.abs(np.diff(arms, axis=0)).max() < 0.05


def test_neighbouring_cubes_get_neighbouring_plans(sim: AlohaSim) -> None:
    """What a policy needs in order to imitate: no branch is chosen by a hair's breadth."""

    def plan(x: float, y: float) -> np.ndarray:
        sim.place_objects(np.array([x, y, 0.05, 1.0, 0.0, 0.0, 0.0]))
        return plan_episode(sim)

    for x in (0.0, 0.1, 0.2):
        for y in (0.4, 0.499, 0.599):
            assert np.abs(plan(x, y) - plan(x, y + 0.002)).max() < 0.03


def play(sim: AlohaSim) -> list[int]:
    return [sim.step(action) for action in plan_episode(sim)]


@pytest.mark.parametrize("corner", RANGE_CORNERS)
def test_the_cube_is_handed_over_from_every_corner_of_the_range(
    sim: AlohaSim, corner: tuple[float, float]
) -> None:
    sim.place_objects(np.array([*corner, 0.05, 1.0, 0.0, 0.0, 0.0]))
    rewards = play(sim)
    assert {1, 2, 4} <= set(rewards)
    assert rewards[-50:] == [4] * 50  # held, not merely touched


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_peg_is_inserted_and_stays(seed: int) -> None:
    with AlohaSim("sim_insertion") as insertion:
        insertion.reset(seed)
        rewards = play(insertion)
    # Pressed against the pin, the contact may part for a tick.
    assert rewards[-1] == 4
    assert rewards[-60:].count(4) > 50
