"""Checks that a policy fits a robot, before anything moves."""

from __future__ import annotations

import math

import numpy as np

from policies.types import PolicyContract
from robots.base import ActionKind, Robot
from runtime.errors import RuntimeFault
from runtime.eval_real.run_config import RobotLimits, RunConfig

POSITIVE_NUMBERS = (
    "sensing_rate",
    "near",
    "max_chunk_age_s",
    "max_sensing_age_s",
    "connect_timeout_s",
)
"""Fields of a ``RunConfig`` that must be positive, or None."""
LONGEST_STOP_ALONE_S = 2.0
"""How long a base may drive on after all processes that command it have died."""


class Incompatible(RuntimeFault):
    """The policy does not fit this robot or this rate; the message says what, got and expected."""


def check_compatible(config: RunConfig, robot: Robot) -> None:
    """Compare the policy's contract and the run's rates with the robot.

    Raises:
        Incompatible, ValueError: The first property that does not fit.
    """
    policy, robot_limits = config.contract, robot.contract
    _equal("action_dim", policy.action_dim, robot_limits.action_dim, robot)
    _equal("state_dim", policy.state_dim, robot_limits.state_dim, robot)
    control = (policy.ctrl_space, policy.ctrl_type)
    if control != (robot_limits.ctrl_space, robot_limits.ctrl_type):
        raise Incompatible(
            f"control: the policy commands {control}, {robot.name} takes "
            f"{(robot_limits.ctrl_space, robot_limits.ctrl_type)}"
        )
    _check_names(policy, robot, same_joints=config.same_joints)
    _check_actions(robot)
    _check_start(robot)
    _check_cameras(policy, robot)
    if policy.first_action_offset:
        raise Incompatible(
            f"first_action_offset: got {policy.first_action_offset}, expected 0: a rollout starts "
            "with the first observation's own tick"
        )
    if policy.n_obs_steps > 1:
        raise Incompatible(
            f"n_obs_steps: got {policy.n_obs_steps}, expected 1: a robot's pictures come when its "
            "cameras send them, so there are no observations of consecutive ticks; eval_sim has "
            "them"
        )
    _check_rates(config, robot)
    _check_stopping_alone(config, robot)
    config.make_state_machine(RobotLimits.of(robot))


def _equal(name: str, policy: int, robots: int, robot: Robot) -> None:
    if policy != robots:
        raise Incompatible(f"{name}: the policy has {policy}, {robot.name} has {robots}")


def _check_names(policy: PolicyContract, robot: Robot, *, same_joints: bool) -> None:
    """Where both sides name their numbers, the names must be the same.

    With ``same_joints`` the user asserts that different names mean the same joints. Names that both
    sides have in different places are refused all the same.
    """
    for what, policy_names, robot_names in (
        ("state", policy.state_names, robot.contract.joint_names),
        ("action", policy.action_names, robot.contract.action_names),
    ):
        if not policy_names or policy_names == robot_names:
            continue
        moved = [name for name in policy_names if name in robot_names]
        moved = [name for name in moved if policy_names.index(name) != robot_names.index(name)]
        if moved:
            raise Incompatible(
                f"{what}_names: the policy's order is {list(policy_names)}, {robot.name}'s is "
                f"{list(robot_names)}: one joint would be taken for another"
            )
        if not same_joints:
            raise Incompatible(
                f"{what}_names: the policy has {list(policy_names)}, {robot.name} has "
                f"{list(robot_names)}; "
                "where they are the same joints under other names, --same_joints says so"
            )


def _check_actions(robot: Robot) -> None:
    """Refuse a robot that is commanded by velocity and may not stop by itself."""
    contract = robot.contract
    speeds = [spec.name for spec in contract.actions if spec.kind is ActionKind.VELOCITY]
    if speeds and contract.stops_alone_after_s is None:
        raise Incompatible(
            f"{robot.name} is commanded by velocity ({', '.join(speeds)}) and does not say that it "
            "stops by itself when commands stay away, expected stops_alone_after_s: if all "
            "processes here died, it would drive on"
        )


def _check_start(robot: Robot) -> None:
    """Check the pose at which a rollout begins, and the speed of the move to it."""
    contract, limits = robot.contract, robot.limits
    for what, given in (("start pose", robot.start_pose), ("start velocity", robot.start_velocity)):
        if given is None:
            continue
        if np.shape(given) != (contract.action_dim,):
            raise Incompatible(
                f"{what}: got shape {np.shape(given)}, expected ({contract.action_dim},), one "
                f"number for each of {list(contract.action_names)}"
            )
        for spec, value, lower, upper in zip(
            contract.actions, given, limits.position_lower, limits.position_upper, strict=True
        ):
            if what == "start velocity":
                right, expected = not spec.kind.holds_position or value > 0, "more than 0"
            elif spec.kind.holds_position:
                right, expected = lower <= value <= upper, f"{lower:g} to {upper:g}"
            else:
                right, expected = value == 0, "0: it is where the robot rests"
            if not (right and np.isfinite(value)):
                raise Incompatible(
                    f"{what}: {spec.name} ({spec.kind}): got {value:g} {spec.unit}, expected "
                    f"{expected}"
                )


def _check_stopping_alone(config: RunConfig, robot: Robot) -> None:
    """Check that the robot stops alone soon enough, but not between two commands."""
    stops_s, shortest_s = robot.contract.stops_alone_after_s, 2 * config.period_s
    if stops_s is not None and not shortest_s <= stops_s <= LONGEST_STOP_ALONE_S:
        raise Incompatible(
            f"stops_alone_after_s: got {stops_s:g} s, expected {shortest_s:g} (two commands at "
            f"this rate) to {LONGEST_STOP_ALONE_S:g} s"
        )


def _check_cameras(policy: PolicyContract, robot: Robot) -> None:
    cameras = robot.contract.cameras
    missing = [name for name in policy.camera_names if name not in cameras]
    if missing:
        raise Incompatible(
            f"cameras: the policy needs {list(policy.camera_names)}, {robot.name} has "
            f"{list(cameras)}; missing: {missing}"
        )
    for camera in policy.cameras:
        if tuple(cameras[camera.name]) not in camera.accepted_hw:
            sizes = " or ".join(f"{h}x{w}" for h, w in camera.accepted_hw)
            height, width = cameras[camera.name]
            raise Incompatible(
                f"camera {camera.name}: {robot.name} gives {height}x{width}, the policy takes "
                f"{sizes}"
            )


def _check_rates(config: RunConfig, robot: Robot) -> None:
    ratio = config.ratio  # raises ValueError, with a message
    rate, (lowest, highest) = ratio / config.contract.dt_s, robot.contract.control_hz
    if not lowest <= rate <= highest:
        raise Incompatible(
            f"publish rate: got {rate:g} Hz, expected {lowest:g} to {highest:g}, which "
            f"{robot.name} takes"
        )
    for name in POSITIVE_NUMBERS:
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise Incompatible(f"{name}: got {value}, expected a positive number")
    if config.max_timesteps < 1:
        raise Incompatible(f"max_timesteps: got {config.max_timesteps}, expected at least 1")
    if 1 / config.sensing_rate >= config.max_sensing_age_s:
        raise Incompatible(
            f"--sensing_rate: got {config.sensing_rate:g} Hz, a picture every "
            f"{1 / config.sensing_rate:g} s, expected more often than --max_sensing_age_s = "
            f"{config.max_sensing_age_s:g} s"
        )
    # Without these limits the duration of a stop has no bound.
    unlimited = ~np.isfinite(robot.limits.velocity) | ~np.isfinite(robot.limits.acceleration)
    if unlimited.any():
        joint = int(np.argmax(unlimited))
        raise Incompatible(
            f"limits: joint {joint} ({robot.contract.action_names[joint]}) has no velocity or no "
            "acceleration limit; expected both, or a stop could not be bounded"
        )
