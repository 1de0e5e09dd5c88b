"""Whether a policy and a robot belong together; asked before anything moves."""

from __future__ import annotations

import math

import numpy as np

from policies.types import PolicyContract
from robots.base import ActionKind, Robot
from runtime.errors import RuntimeFault
from runtime.mission import Body, Mission


class Unfit(RuntimeFault):
    """The policy is not for this robot, or not at this rate; says what, got and expected."""


def check_fit(mission: Mission, robot: Robot) -> None:
    """Compare the policy's contract and the mission's rates with the robot.

    Raises:
        Unfit, ValueError: The first thing that does not fit.
    """
    policy, body = mission.contract, robot.contract
    _equal("action_dim", policy.action_dim, body.action_dim, robot)
    _equal("state_dim", policy.state_dim, body.state_dim, robot)
    control = (policy.ctrl_space, policy.ctrl_type)
    if control != (body.ctrl_space, body.ctrl_type):
        raise Unfit(
            f"control: the policy commands {control}, {robot.name} takes "
            f"{(body.ctrl_space, body.ctrl_type)}"
        )
    if not mission.same_joints:
        _check_names(policy, robot)
    _check_actions(robot)
    _check_cameras(policy, robot)
    if policy.first_action_offset:
        raise Unfit(
            f"first_action_offset: got {policy.first_action_offset}, expected 0: a rollout starts "
            "with the first observation's own tick"
        )
    _check_rates(mission, robot)
    pose = robot.start_pose
    if pose is not None and (outside := robot.limits.violations(pose)):
        joint = outside[0]
        raise Unfit(
            f"start pose: joint {joint} ({body.action_names[joint]}): got {pose[joint]:g} "
            f"{body.actions[joint].unit}, expected {robot.limits.position_lower[joint]:g} to "
            f"{robot.limits.position_upper[joint]:g}"
        )
    mission.make_pilot(Body.of(robot))


def _equal(name: str, policy: int, robots: int, robot: Robot) -> None:
    if policy != robots:
        raise Unfit(f"{name}: the policy has {policy}, {robot.name} has {robots}")


def _check_names(policy: PolicyContract, robot: Robot) -> None:
    """Where both sides say what their numbers are called, they have to say the same."""
    for what, policys, robots in (
        ("state", policy.state_names, robot.contract.joint_names),
        ("action", policy.action_names, robot.contract.action_names),
    ):
        if not policys or policys == robots:
            continue
        if sorted(policys) == sorted(robots):
            raise Unfit(
                f"{what}_names: the policy's order is {list(policys)}, {robot.name}'s is "
                f"{list(robots)}: one joint would be taken for another"
            )
        raise Unfit(
            f"{what}_names: the policy has {list(policys)}, {robot.name} has {list(robots)}; where "
            "they are the same joints under other names, --same_joints says so"
        )


def _check_actions(robot: Robot) -> None:
    """What is not known to come to rest, or to stay there, does not move."""
    contract = robot.contract
    speeds = [spec.name for spec in contract.actions if spec.kind is ActionKind.VELOCITY]
    if speeds and contract.stops_alone_after_s is None:
        raise Unfit(
            f"{robot.name} is commanded by velocity ({', '.join(speeds)}) and does not say that it "
            "stops by itself when commands stay away, expected stops_alone_after_s: if all "
            "processes here died, it would drive on"
        )
    pose = robot.start_pose
    for index, spec in enumerate(contract.actions):
        if pose is not None and not spec.kind.holds_position and pose[index] != 0:
            raise Unfit(
                f"start pose: {spec.name} ({spec.kind}): got {pose[index]:g} {spec.unit}, expected "
                "0: it is where the robot rests"
            )


def _check_cameras(policy: PolicyContract, robot: Robot) -> None:
    cameras = robot.contract.cameras
    missing = [name for name in policy.camera_names if name not in cameras]
    if missing:
        raise Unfit(
            f"cameras: the policy needs {list(policy.camera_names)}, {robot.name} has "
            f"{list(cameras)}; missing: {missing}"
        )
    for camera in policy.cameras:
        if tuple(cameras[camera.name]) not in camera.accepted_hw:
            sizes = " or ".join(f"{h}x{w}" for h, w in camera.accepted_hw)
            height, width = cameras[camera.name]
            raise Unfit(
                f"camera {camera.name}: {robot.name} gives {height}x{width}, the policy takes "
                f"{sizes}"
            )


def _check_rates(mission: Mission, robot: Robot) -> None:
    ratio = mission.ratio  # says itself what is wrong with it
    rate, (lowest, highest) = ratio / mission.contract.dt_s, robot.contract.control_hz
    if not lowest <= rate <= highest:
        raise Unfit(
            f"publish rate: got {rate:g} Hz, expected {lowest:g} to {highest:g}, which "
            f"{robot.name} takes"
        )
    for name in (
        *("sensing_rate", "near", "max_chunk_age_s", "max_sensing_age_s", "connect_timeout_s"),
    ):
        value = getattr(mission, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise Unfit(f"{name}: got {value}, expected a positive number")
    if mission.max_timesteps < 1:
        raise Unfit(f"max_timesteps: got {mission.max_timesteps}, expected at least 1")
    # Without limits a stop would have no bound.
    unlimited = ~np.isfinite(robot.limits.velocity) | ~np.isfinite(robot.limits.acceleration)
    if unlimited.any():
        joint = int(np.argmax(unlimited))
        raise Unfit(
            f"limits: joint {joint} ({robot.contract.action_names[joint]}) has no velocity or no "
            "acceleration limit; expected both, or a stop could not be bounded"
        )
