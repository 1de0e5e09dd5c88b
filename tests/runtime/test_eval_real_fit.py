"""A policy and a robot that do not belong together are told apart before anything moves."""

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
from robots.errors import ContractViolated
from robots.limits import Limits
from runtime.fitting import Unfit, check_fit
from runtime.mission import Mission

LIMITS = Limits(np.full(3, -2.0), np.full(3, 2.0), np.full(3, 1.0), np.full(3, 5.0))
NAMES = ("shoulder", "elbow", "x.vel")
ARM = RobotContract(NAMES, tuple(map(ActionSpec, NAMES)), {})
BASE = dataclasses.replace(
    ARM, actions=(*ARM.actions[:2], ActionSpec("x.vel", ActionKind.VELOCITY, "m/s"))
)
POLICY = PolicyContract("toy", (), 3, 3, chunk_size=20, n_action_steps=10)


class Statue(Robot):
    """Says what it is and does nothing."""

    start: np.ndarray | None = None

    @property
    def start_pose(self) -> np.ndarray | None:
        return self.start

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
    contract: RobotContract = ARM, *, start: Any = None, mission: Any = None, **policy: Any
) -> None:
    robot = Statue("statue", contract, LIMITS)
    robot.start = None if start is None else np.array(start, np.float32)
    made = Mission(
        "statue",
        {},
        dataclasses.replace(POLICY, **policy).to_json(),
        "127.0.0.1:1",
        **mission or {},
    )
    check_fit(made, robot)


def test_what_belongs_together_fits() -> None:
    fit()
    fit(state_names=NAMES, action_names=NAMES)
    fit(dataclasses.replace(BASE, stops_alone_after_s=0.5), start=[1, 1, 0])


def test_joints_in_another_order_are_noticed() -> None:
    other = ("elbow", "shoulder", "x.vel")
    for what in ("state", "action"):
        with pytest.raises(Unfit, match=rf"{what}_names: the policy's order is \['elbow', 'should"):
            fit(**{f"{what}_names": other})


def test_other_joints_are_noticed_unless_a_person_says_that_they_are_the_same() -> None:
    other = ("left_shoulder", "left_elbow", "base")
    with pytest.raises(Unfit, match=r"state_names: the policy has .*statue has .*--same_joints"):
        fit(state_names=other)
    fit(state_names=other, mission={"same_joints": True})


def test_a_base_that_would_drive_on_is_refused() -> None:
    with pytest.raises(Unfit, match=r"by velocity \(x.vel\).*expected stops_alone_after_s"):
        fit(BASE)


def test_a_start_pose_that_drives_is_refused() -> None:
    with pytest.raises(Unfit, match=r"start pose: x.vel \(velocity\): got 0.1 m/s, expected 0"):
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
