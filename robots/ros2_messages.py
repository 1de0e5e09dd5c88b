"""Commands as ROS 2 messages, and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trajectory_msgs.msg import JointTrajectoryPoint

from robots.errors import ContractViolated
from robots.ros2_config import CommandTopic
from robots.ros2_node import MESSAGES, set_stamp


def encode_command(topic: CommandTopic, values: NDArray[np.float32], period_s: float) -> Any:
    """The message for ``values``.

    Args:
        topic: Its message and joints.
        values: One per joint of ``topic``.
        period_s: Time from this command to the next; a trajectory reaches its point in that time.
    """
    return ENCODERS[topic.message](topic, values.tolist(), period_s)


def decode_command(topic: CommandTopic, message: Any) -> NDArray[np.float32]:
    """The values of a command, one per joint of ``topic``.

    Raises:
        ContractViolated: Other joints, another number of values, one that is not finite, or a
            trajectory whose point has no time.
    """
    if topic.message == "Float64MultiArray":
        names, values = list(topic.joints), message.data
    elif topic.message == "JointTrajectory":
        names, values = list(message.joint_names), message.points[0].positions
        duration = message.points[0].time_from_start
        if duration.sec == 0 and duration.nanosec == 0:
            raise ContractViolated("got time_from_start 0, expected more")
    else:
        names, values = list(message.name), message.position or message.velocity
    if names != list(topic.joints) or len(values) != len(names) or not np.isfinite(values).all():
        raise ContractViolated(
            f"got the command {list(values)} for {names}, expected {len(topic.joints)} finite "
            f"numbers for {list(topic.joints)}"
        )
    return np.array(values, np.float32)


def _joint_state(topic: CommandTopic, values: list[float], period_s: float) -> Any:
    del period_s
    message = MESSAGES["JointState"]()
    set_stamp(message, time.time_ns())
    message.name = list(topic.joints)
    if topic.by_velocity:
        message.velocity = values
    else:
        message.position = values
    return message


def _trajectory(topic: CommandTopic, values: list[float], period_s: float) -> Any:
    """One point. A stamp of zero means from now on: a stamp in the past would be skipped."""
    message = MESSAGES["JointTrajectory"]()
    message.joint_names = list(topic.joints)
    point = JointTrajectoryPoint()
    point.positions = values
    duration = point.time_from_start
    duration.sec, duration.nanosec = divmod(max(1, round(1e9 * period_s)), 10**9)
    message.points = [point]
    return message


def _array(topic: CommandTopic, values: list[float], period_s: float) -> Any:
    del topic, period_s
    message = MESSAGES["Float64MultiArray"]()
    message.data = values
    return message


ENCODERS: dict[str, Callable[[CommandTopic, list[float], float], Any]] = {
    "JointState": _joint_state,
    "JointTrajectory": _trajectory,
    "Float64MultiArray": _array,
}
"""A message's name to the function that makes one."""
