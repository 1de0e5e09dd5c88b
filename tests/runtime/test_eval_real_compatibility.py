"""A policy that does not fit the robot is refused before anything moves."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from policies.types import PolicyContract
from robots.base import (
    ActionKind,
    ActionSpec,
    CameraSample,
    JointSample,
    Robot,
    RobotContract,
    Role,
)
from robots.errors import ContractViolated, SensorLost
from robots.joint_limits import JointLimits
from runtime.eval_real.compatibility import Incompatible, check_compatible
from runtime.eval_real.run_config import RunConfig

LIMITS = JointLimits(np.full(3, -2.0), np.full(3, 2.0), np.full(3, 1.0), np.full(3, 5.0))
NAMES = ("shoulder", "elbow", "x.vel")
ARM = RobotContract(NAMES, tuple(map(ActionSpec, NAMES)), {})
BASE = dataclasses.replace(
    ARM, actions=(*ARM.actions[:2], ActionSpec("x.vel", ActionKind.VELOCITY, "m/s"))
)
POLICY = PolicyContract("toy", (), 3, 3, chunk_size=20, n_action_steps=10)


class Statue(Robot):
    """A robot with a contract that does nothing."""

    start: np.ndarray | None = None
    speed: np.ndarray | None = None

    @property
    def start_pose(self) -> np.ndarray | None:
        return self.start

    @property
    def start_velocity(self) -> np.ndarray | None:
        return self.speed

    def _connect(self, role: Role, timeout_s: float) -> None: ...
    def _disconnect(self) -> None: ...
    def _send_action(self, action: np.ndarray) -> None: ...

    def _get_joints(self) -> JointSample:
        return JointSample(np.zeros(3, np.float32), 0, 0)

    def _get_joints_at(self, stamp_ns: int) -> JointSample:
        return self._get_joints()

    def _get_cameras(self) -> dict[str, CameraSample]:
        return {}


def fit(
    contract: RobotContract = ARM,
    *,
    start: Any = None,
    speed: Any = None,
    config: Any = None,
    **policy: Any,
) -> None:
    robot = Statue("statue", contract, LIMITS)
    robot.start = None if start is None else np.array(start, np.float32)
    robot.speed = None if speed is None else np.array(speed, np.float64)
    made = RunConfig(
        robot="statue",
        contract_json=dataclasses.replace(POLICY, **policy).to_json(),
        address="127.0.0.1:1",
        **config or {},
    )
    check_compatible(made, robot)


def test_a_fitting_policy_and_robot_pass() -> None:
    fit()
    fit(state_names=NAMES, action_names=NAMES)
    fit(dataclasses.replace(BASE, stops_alone_after_s=0.5), start=[1, 1, 0])


def test_joints_in_another_order_are_refused() -> None:
    other = ("elbow", "shoulder", "x.vel")
    for what in ("state", "action"):
        with pytest.raises(
            Incompatible, match=rf"{what}_names: the policy's order is \['elbow', 'should"
        ):
            fit(**{f"{what}_names": other})


def test_other_joint_names_are_refused_without_same_joints() -> None:
    other = ("left_shoulder", "left_elbow", "base")
    with pytest.raises(
        Incompatible, match=r"state_names: the policy has .*statue has .*--same_joints"
    ):
        fit(state_names=other)
    fit(state_names=other, config={"same_joints": True})


def test_a_policy_of_several_ticks_is_refused() -> None:
    with pytest.raises(Incompatible, match="n_obs_steps: got 2, expected 1: a robot's pictures"):
        fit(n_obs_steps=2)


@pytest.mark.parametrize("names", [("elbow", "shoulder", "x.vel"), ("base", "shoulder", "x.vel")])
def test_same_joints_does_not_allow_another_order(names: tuple[str, ...]) -> None:
    with pytest.raises(Incompatible, match="one joint would be taken for another"):
        fit(action_names=names, config={"same_joints": True})


@pytest.mark.parametrize("stops_s", [np.inf, np.nan, -1.0, 0.0, 0.005, 3600.0])
def test_stops_alone_after_s_out_of_range_is_refused(stops_s: float) -> None:
    with pytest.raises(
        Incompatible, match=r"stops_alone_after_s: got \S+ s, expected 0.04 \(two comm"
    ):
        fit(dataclasses.replace(BASE, stops_alone_after_s=stops_s))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speed": [0.5, 0, 0.5]}, r"start velocity: elbow \(position\): got 0 rad, expected more"),
        ({"speed": [0.5, -1, 0.5]}, r"start velocity: elbow .*got -1 rad"),
        ({"speed": [0.5, np.nan, 0.5]}, r"start velocity: elbow .*got nan rad"),
        ({"speed": [0.5, 0.5]}, r"start velocity: got shape \(2,\), expected \(3,\)"),
        ({"start": [0.5]}, r"start pose: got shape \(1,\), expected \(3,\)"),
        ({"start": [0.5, 9, 0]}, r"start pose: elbow .*got 9 rad, expected -2 to 2"),
        ({"start": [0.5, np.nan, 0]}, r"start pose: elbow .*got nan rad"),
    ],
)
def test_an_invalid_start_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Incompatible, match=message):
        fit(**given)


def test_a_velocity_needs_no_start_velocity() -> None:
    fit(dataclasses.replace(BASE, stops_alone_after_s=0.5), start=[1, 1, 0], speed=[1, 1, 0])


def test_a_sensing_rate_below_the_allowed_picture_age_is_refused() -> None:
    with pytest.raises(
        Incompatible, match=r"--sensing_rate: got 1 Hz.*--max_sensing_age_s = 0.5 s"
    ):
        fit(config={"sensing_rate": 1.0})


@pytest.mark.parametrize("unit", ["degrees", "Deg", "°", "radians", "RAD"])
def test_an_angle_has_one_name(unit: str) -> None:
    with pytest.raises(ContractViolated, match=r"action 'a': unit: got .* \['rad', 'deg'\] for an"):
        RobotContract(("a",), (ActionSpec("a", unit=unit),), {})


def test_a_camera_that_is_missing_among_the_pictures_is_lost() -> None:
    robot = Statue("statue", dataclasses.replace(ARM, cameras={"top": (4, 4)}), LIMITS)
    robot.connect()
    with pytest.raises(SensorLost, match=r"statue: got no picture of \['top'\], expected all of"):
        robot.get_cameras()


def test_a_base_that_may_not_stop_alone_is_refused() -> None:
    with pytest.raises(Incompatible, match=r"by velocity \(x.vel\).*expected stops_alone_after_s"):
        fit(BASE)


def test_a_start_pose_that_drives_is_refused() -> None:
    with pytest.raises(
        Incompatible, match=r"start pose: x.vel \(velocity\): got 0.1 m/s, expected 0"
    ):
        fit(dataclasses.replace(BASE, stops_alone_after_s=0.5), start=[0, 0, 0.1])


@pytest.mark.parametrize("kind", [ActionKind.EFFORT, ActionKind.DELTA])
def test_a_kind_without_a_known_rest_is_refused(kind: ActionKind) -> None:
    actions = (*ARM.actions[:2], ActionSpec("x.vel", kind, "N"))
    with pytest.raises(ValueError, match=rf"joint 2 \(x.vel\): got a command of kind {kind}"):
        fit(dataclasses.replace(ARM, actions=actions))


def test_a_contract_knows_its_names() -> None:
    with pytest.raises(ContractViolated, match=r"joints: got .*, expected different names"):
        dataclasses.replace(ARM, joint_names=("a", "a", "x.vel"))
    with pytest.raises(ContractViolated, match=r"action 'wrist' \(position\): got no such joint"):
        dataclasses.replace(ARM, actions=(ActionSpec("wrist"),))


def test_the_command_at_rest_is_what_is_measured_and_zero_for_velocities() -> None:
    contract = RobotContract(
        ("a.pos", "a.vel", "b.pos", "x.vel"),
        (ActionSpec("b.pos"), ActionSpec("x.vel", ActionKind.VELOCITY), ActionSpec("a.pos")),
        {},
    )
    state = np.array([1, 2, 3, 4], np.float32)
    np.testing.assert_array_equal(contract.rest_command(state), [3, 0, 1])
