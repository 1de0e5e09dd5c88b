"""Configuration of ``lerobot:<type>``, and LeRobot's description of a robot."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from policies.yaml_config import parse_config
from robots.base import ActionKind, ActionSpec
from robots.errors import ConfigError
from robots.joint_limits import JointLimits

STOPS_ALONE_S: Mapping[str, float] = {"lekiwi_client": 0.5}
"""LeRobot's type to the timeout of the device's own watchdog. LeKiwi's host has one
(``watchdog_timeout_ms``); the same robot on its bus has none."""
KINDS: Mapping[str, ActionKind] = {
    "pos": ActionKind.POSITION,
    "q": ActionKind.POSITION,
    "vel": ActionKind.VELOCITY,
    "vx": ActionKind.VELOCITY,
    "vy": ActionKind.VELOCITY,
    "vtheta": ActionKind.VELOCITY,
    "torque": ActionKind.EFFORT,
    "effort": ActionKind.EFFORT,
    "current": ActionKind.EFFORT,
}
"""Last part of a LeRobot action feature to its kind."""
DELTA_PREFIX = "delta_"
BASE_SPEEDS: Mapping[str, str] = {
    "x.vel": "m/s",
    "y.vel": "m/s",
    "theta.vel": "deg/s",
    "vx": "m/s",
    "vy": "m/s",
    "vtheta": "deg/s",
}
"""Units of the velocities of LeRobot's mobile robots."""
NO_UNIT = "range"


@dataclass(frozen=True)
class LeRobotLimits:
    """Limits in the robot's own units, one number per action feature, in their order.

    For a velocity, ``position_lower`` and ``position_upper`` bound the commanded speed itself.
    """

    position_lower: tuple[float, ...]
    position_upper: tuple[float, ...]
    velocity: tuple[float, ...]
    acceleration: tuple[float, ...]

    def of(self, actions: Sequence[str], source: str) -> JointLimits:
        """As arrays, for the features ``actions``. Raises ``ConfigError`` if they do not fit."""
        return JointLimits.from_config(actions, **dataclasses.asdict(self), source=source)


@dataclass(frozen=True)
class LeRobotAction:
    """Meaning of one action feature, if its name does not show it or is misleading.

    Attributes:
        kind: ``position``, ``gripper``, ``velocity`` or ``delta``.
        unit: Of its values, e.g. ``deg`` or ``m/s``.
    """

    kind: str
    unit: str

    def __post_init__(self) -> None:
        if self.kind not in list(ActionKind):
            raise ValueError(f"kind: got {self.kind!r}, expected one of {[*map(str, ActionKind)]}")


@dataclass(frozen=True)
class LeRobotConfig:
    """Keys of a LeRobot robot. Those below ``robot`` are LeRobot's.

    Attributes:
        type: LeRobot's name of the robot, from ``lerobot:<type>``.
        robot: Arguments of LeRobot's configuration class, e.g. ``port`` and ``id``.
        limits: Of the action features, in their order.
        cameras: The policy's camera name to LeRobot's. None: LeRobot's names.
        gripper: A position whose name contains this text is a gripper.
        actions: Action feature's name to its meaning, for names that do not show it.
        start_pose: One number per action feature. None: the current pose.
        max_hz: Highest rate of commands on its bus.
        read_hz: Readings of the joints per second.
        stops_alone_after_s: How long after the last command the device itself brings all velocities
            to zero, even if every process here has died. None: LeRobot's known value for this type,
            else never.
        sensor_timeout_s: A sensor that sends nothing, or a frozen image, for so long is lost.
        connect_timeout_s: For LeRobot to connect.
        repeats_pictures: Whether its cameras may return identical images.
        connect_unseen: Call LeRobot's ``connect`` although the motors cannot report whether their
            torque is on. The arm has to be supported by hand then.
        disconnect_at_end: Whether to call LeRobot's ``disconnect`` at the end. None: only if it is
            known to leave the torque on, or is configured to switch it off.
        address: Of a running owner process; None until ``companion`` starts one.
        description: JSON of ``Description``; filled in by the driver.
    """

    type: str
    limits: LeRobotLimits
    robot: Mapping[str, Any] = field(default_factory=dict)
    cameras: Mapping[str, str] | None = None
    gripper: str = "gripper"
    actions: Mapping[str, LeRobotAction] = field(default_factory=dict)
    start_pose: tuple[float, ...] | None = None
    max_hz: float = 200.0
    read_hz: float = 100.0
    stops_alone_after_s: float | None = None
    sensor_timeout_s: float = 1.0
    connect_timeout_s: float = 30.0
    repeats_pictures: bool = False
    connect_unseen: bool = False
    disconnect_at_end: bool | None = None
    address: str | None = None
    description: str = ""

    def __post_init__(self) -> None:
        if not 1 < self.max_hz < math.inf:
            raise ValueError(f"max_hz: got {self.max_hz}, expected a finite number above 1")
        for name in ("read_hz", "sensor_timeout_s", "connect_timeout_s", "stops_alone_after_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value}, expected a positive number")

    @property
    def calibrate_command(self) -> str:
        """LeRobot's calibration command for this robot, for a person: it is interactive."""
        flags = "".join(
            f" --robot.{key}={value}"
            for key, value in self.robot.items()
            if isinstance(value, str | int) and (key == "id" or "port" in key or "dir" in key)
        )
        return f"lerobot-calibrate --robot.type={self.type}{flags}"

    def to_json(self) -> str:
        """As text, for ``from_json`` in another process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LeRobotConfig:
        """From the text of ``to_json``."""
        return parse_config(cls, json.loads(text), source="lerobot")


@dataclass(frozen=True)
class Description:
    """LeRobot's features of a robot, in LeRobot's order.

    Attributes:
        states: Observed features that are numbers, in the order of ``observation.state``.
        pictures: Observed features that are images, with (height, width).
        actions: Action features.
        units: Position feature to its unit, if LeRobot knows it.
    """

    states: tuple[str, ...]
    pictures: Mapping[str, tuple[int, int]]
    actions: tuple[str, ...]
    units: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """As text, for ``LeRobotConfig.description``."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Description:
        """From the text of ``to_json``."""
        return parse_config(cls, json.loads(text), source="lerobot")


def action_specs(
    config: LeRobotConfig, description: Description, source: str
) -> tuple[ActionSpec, ...]:
    """The kind and unit of every action feature.

    Raises:
        ConfigError: A feature is not understood or is an effort, or a position is not observed.
    """
    unknown = sorted(set(config.actions) - set(description.actions))
    if unknown:
        raise ConfigError(
            f"{source}: actions: got {unknown}, expected some of {list(description.actions)}"
        )
    specs = tuple(_spec(config, description, name, source) for name in description.actions)
    for spec in specs:
        if spec.kind.holds_position and spec.name not in description.states:
            raise ConfigError(
                f"{source}: lerobot:{config.type}: action feature {spec.name!r} ({spec.kind}) is "
                f"not observed, expected it among {list(description.states)}: a joint that is "
                "commanded by position has to be measured"
            )
        if spec.kind is ActionKind.EFFORT:
            raise ConfigError(
                f"{source}: lerobot:{config.type}: action feature {spec.name!r} is an effort, "
                "expected positions or velocities: no effort is known to hold an arm in place"
            )
    return specs


def _spec(config: LeRobotConfig, description: Description, name: str, source: str) -> ActionSpec:
    if (configured := config.actions.get(name)) is not None:
        return ActionSpec(name, ActionKind(configured.kind), configured.unit)
    last = name.rpartition(".")[2]
    kind = ActionKind.DELTA if name.startswith(DELTA_PREFIX) else KINDS.get(last)
    if kind is None:
        raise ConfigError(
            f"{source}: lerobot:{config.type}: action feature {name!r}: its name does not show "
            f"what it means, expected one that ends in {[f'.{end}' for end in KINDS]} or begins "
            f"with {DELTA_PREFIX!r}; add e.g. 'actions: {{{name}: {{kind: position, unit: deg}}}}'"
        )
    if kind is ActionKind.POSITION and config.gripper and config.gripper in name:
        kind = ActionKind.GRIPPER
    unit = description.units.get(name, "rad" if last == "q" else NO_UNIT)
    if kind is ActionKind.VELOCITY:
        known = BASE_SPEEDS.get(name, BASE_SPEEDS.get(last))
        position = description.units.get(f"{name.removesuffix('.vel')}.pos", NO_UNIT)
        unit = known or f"{position}/s"
    return ActionSpec(name, kind, unit)
