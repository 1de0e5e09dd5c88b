"""Configuration of ``ros2``: topics, joints, limits."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from policies.number_ranges import (
    DURATION_S,
    FINITE,
    PIXELS,
    POSITIVE,
    RATE_HZ,
    Range,
    check_ranges,
)
from policies.yaml_config import parse_config
from robots.base import ActionKind, ActionSpec
from robots.command_delivery import UNCOMMANDED_S
from robots.joint_limits import JointLimits
from robots.ros_images import COLOURS

Qos = Literal["best_effort", "reliable"]
CommandMessage = Literal["JointState", "JointTrajectory", "Float64MultiArray"]
Discovery = Literal["localhost", "subnet"]
DOMAINS = Range(0, 232)
KINDS = (ActionKind.POSITION, ActionKind.GRIPPER, ActionKind.VELOCITY)
"""A delta or an effort has no known rest."""
DEFAULT_UNITS = {
    ActionKind.POSITION: "rad",
    ActionKind.GRIPPER: "range",
    ActionKind.VELOCITY: "rad/s",
}


@dataclass(frozen=True)
class StateTopic:
    """A topic of ``sensor_msgs/JointState``.

    Attributes:
        topic: Its name.
        joints: Names in its messages, in the order of the robot's state. Messages may have further
            joints, and any order.
        names: Names in the robot's contract, if they differ from ``joints``.
        prefix: Added to each name, to tell the joints of two arms apart.
        qos: Reliability of the subscription; its depth is 1.

    Raises:
        ValueError: Another number of ``names`` than of ``joints``.
    """

    topic: str
    joints: tuple[str, ...]
    names: tuple[str, ...] = ()
    prefix: str = ""
    qos: Qos = "best_effort"

    def __post_init__(self) -> None:
        if self.names and len(self.names) != len(self.joints):
            raise ValueError(
                f"names: got {len(self.names)}, expected {len(self.joints)}, one per joint"
            )

    @property
    def contract_names(self) -> tuple[str, ...]:
        """Names of the joints in the robot's contract."""
        return tuple(self.prefix + name for name in self.names or self.joints)


@dataclass(frozen=True)
class CommandTopic:
    """A topic that takes commands.

    Attributes:
        topic: Its name.
        message: ``JointState``; ``JointTrajectory`` with one point that is to be reached after one
            command period; ``Float64MultiArray``, which has no names.
        joints: Names in its messages, in the order of the robot's commands.
        prefix: As in ``StateTopic``.
        kinds: A joint to what its number means; a joint that is left out has a position.
        units: A joint to its unit, if not rad, ``range`` for a gripper, rad/s for a velocity.
        qos: Reliability of the publisher; its depth is 1.

    Raises:
        ValueError: A kind that has no known rest, kinds that one message cannot carry, or a key of
            ``kinds`` or ``units`` that is no joint.
    """

    topic: str
    message: CommandMessage
    joints: tuple[str, ...]
    prefix: str = ""
    kinds: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    qos: Qos = "reliable"

    def __post_init__(self) -> None:
        for key, given in (("kinds", self.kinds), ("units", self.units)):
            if unknown := [joint for joint in given if joint not in self.joints]:
                raise ValueError(f"{key}: got {unknown}, expected some of {list(self.joints)}")
        for joint, kind in self.kinds.items():
            if kind not in KINDS:
                raise ValueError(
                    f"kinds.{joint}: got {kind!r}, expected one of {[str(k) for k in KINDS]}: "
                    "nothing else is known to leave the robot at rest"
                )
        by_velocity = {spec.kind is ActionKind.VELOCITY for spec in self.actions}
        if self.message == "JointTrajectory" and True in by_velocity:
            raise ValueError(
                "kinds: got a velocity on a JointTrajectory, expected positions: its controller "
                "keeps the last point"
            )
        if len(by_velocity) > 1:
            raise ValueError(
                "kinds: got positions and velocities on one topic, expected one of both"
            )

    @property
    def by_velocity(self) -> bool:
        """Whether its numbers are velocities."""
        return ActionKind.VELOCITY in self.kinds.values()

    @property
    def actions(self) -> tuple[ActionSpec, ...]:
        """The numbers of its commands, named as in the robot's contract."""
        kinds = [ActionKind(self.kinds.get(joint, "position")) for joint in self.joints]
        return tuple(
            ActionSpec(self.prefix + joint, kind, self.units.get(joint, DEFAULT_UNITS[kind]))
            for joint, kind in zip(self.joints, kinds, strict=True)
        )


@dataclass(frozen=True)
class CameraTopic:
    """A topic of ``sensor_msgs/Image`` or ``CompressedImage``, whichever is published.

    Attributes:
        topic: Its name.
        hw: (height, width) of its images.
        encoding: As in ``agilex_config.AgilexCamera``.
        qos: Reliability of the subscription; its depth is 1.
    """

    topic: str
    hw: tuple[Annotated[int, PIXELS], Annotated[int, PIXELS]]
    encoding: str = ""
    qos: Qos = "best_effort"

    def __post_init__(self) -> None:
        if self.encoding not in ("", *COLOURS):
            raise ValueError(f"encoding: got {self.encoding!r}, expected one of {list(COLOURS)}")
        check_ranges(self)


@dataclass(frozen=True)
class CommandLimits:
    """One number per command, in its unit; per second, per second squared."""

    position_lower: tuple[Annotated[float, FINITE], ...]
    position_upper: tuple[Annotated[float, FINITE], ...]
    velocity: tuple[Annotated[float, POSITIVE], ...]
    acceleration: tuple[Annotated[float, POSITIVE], ...]

    def of(self, actions: Sequence[ActionSpec], source: str) -> JointLimits:
        """The limits of ``actions``. Raises ``ConfigError`` if they do not fit them."""
        return JointLimits.from_config(
            [spec.name for spec in actions], **dataclasses.asdict(self), source=source
        )


@dataclass(frozen=True)
class SimulatedRobot:
    """Topics on which a simulated robot reports its outcome and accepts resets.

    Attributes:
        simulator: Configuration of the ``sim_twin`` that is published while the robot is used;
            empty: another process publishes it.
    """

    outcome: str
    reset: str
    simulator: str = ""


@dataclass(frozen=True)
class Ros2Config:
    """Keys of ``type: ros2``.

    Attributes:
        states: Topics of the joint states; their joints, one after the other, are the state.
        commands: Topics of the commands; their joints, one after the other, are a command.
        limits: Of the commands.
        cameras: The policy's camera name to its topic.
        start_pose: One number per command; None: the current pose.
        start_velocity: One number per command: speed limits of the move to the start pose; None:
            those of ``limits``.
        control_hz: Lowest and highest rate of commands.
        stops_alone_after_s: See ``RobotContract``.
        repeats_pictures: See ``RobotContract``.
        sensor_timeout_s: A topic that sends nothing, or the same stamp, for so long is lost.
        connect_timeout_s: For all topics to be found and to send messages.
        discovery: Where other nodes are looked for: on this host, or in its subnet.
        domain_id: ROS domain; None: ``ROS_DOMAIN_ID``.
        python: A Python that has ``rclpy``; empty: see ``robots.ros2_environment``.
        twin: Of a simulated robot; None for a real one.
        address: Of a running owner process; None until ``companion`` starts one.

    Raises:
        ValueError: A number is out of range, no state or no command, or a velocity at a rate below
            which the owner process would stop it.
    """

    states: tuple[StateTopic, ...]
    commands: tuple[CommandTopic, ...]
    limits: CommandLimits
    cameras: Mapping[str, CameraTopic] = field(default_factory=dict)
    start_pose: tuple[Annotated[float, FINITE], ...] | None = None
    start_velocity: tuple[Annotated[float, POSITIVE], ...] | None = None
    control_hz: tuple[Annotated[float, RATE_HZ], Annotated[float, RATE_HZ]] = (10.0, 500.0)
    stops_alone_after_s: Annotated[float, DURATION_S] | None = None
    repeats_pictures: bool = False
    sensor_timeout_s: Annotated[float, DURATION_S] = 0.5
    connect_timeout_s: Annotated[float, DURATION_S] = 10.0
    discovery: Discovery = "localhost"
    domain_id: Annotated[int, DOMAINS] | None = None
    python: str = ""
    twin: SimulatedRobot | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        for key, topics in (("states", self.states), ("commands", self.commands)):
            if not any(topic.joints for topic in topics):
                raise ValueError(f"{key}: got no joints, expected at least one")
        low, high = self.control_hz
        if not low < high:
            raise ValueError(f"control_hz: got {low:g} to {high:g}, expected a lower one first")
        if any(topic.by_velocity for topic in self.commands) and low < 2 / UNCOMMANDED_S:
            raise ValueError(
                f"control_hz: got {low:g} or more, expected {2 / UNCOMMANDED_S:g} or more: "
                f"velocities without a command for {UNCOMMANDED_S:g} s are brought to zero"
            )

    @property
    def joint_names(self) -> tuple[str, ...]:
        """S names, in the order of a state."""
        return tuple(itertools.chain.from_iterable(topic.contract_names for topic in self.states))

    @property
    def actions(self) -> tuple[ActionSpec, ...]:
        """The A numbers of a command."""
        return tuple(itertools.chain.from_iterable(topic.actions for topic in self.commands))

    def to_json(self) -> str:
        """As text, for ``from_json`` in another process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Ros2Config:
        """From the text of ``to_json``."""
        return parse_config(cls, json.loads(text), source="ros2")
