"""The keys of ``lerobot:<type>``, and what LeRobot says of its robot."""

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
"""By LeRobot's type: when the device's own watchdog stops it. LeKiwi's host does (its
``watchdog_timeout_ms``); the same robot on its bus does not."""
UNCOMMANDED_S = 0.25
"""Without a command for so long, the owner brings what moves by itself to rest."""
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
"""What a feature's last part means in LeRobot."""
DELTA_PREFIX = "delta_"
BASE_SPEEDS: Mapping[str, str] = {
    "x.vel": "m/s",
    "y.vel": "m/s",
    "theta.vel": "deg/s",
    "vx": "m/s",
    "vy": "m/s",
    "vtheta": "deg/s",
}
"""Units of what LeRobot's mobile robots are driven by."""
NO_UNIT = "range"


@dataclass(frozen=True)
class LeRobotLimits:
    """In the robot's own units, one number per action feature, in their order.

    For a velocity, ``position_lower`` and ``position_upper`` bound the commanded speed itself.
    """

    position_lower: tuple[float, ...]
    position_upper: tuple[float, ...]
    velocity: tuple[float, ...]
    acceleration: tuple[float, ...]

    def of(self, actions: Sequence[str], source: str) -> JointLimits:
        """As arrays. Raises ``ConfigError`` where they do not fit ``actions``."""
        return JointLimits.from_config(actions, **dataclasses.asdict(self), source=source)


@dataclass(frozen=True)
class LeRobotAction:
    """What one action feature means, where its name does not tell, or tells it wrongly.

    Attributes:
        kind: ``position``, ``gripper``, ``velocity`` or ``delta``.
        unit: As messages shall have it, e.g. ``deg`` or ``m/s``.
    """

    kind: str
    unit: str

    def __post_init__(self) -> None:
        if self.kind not in list(ActionKind):
            raise ValueError(f"kind: got {self.kind!r}, expected one of {[*map(str, ActionKind)]}")


@dataclass(frozen=True)
class LeRobotConfig:
    """Our keys; ``robot`` is LeRobot's.

    Attributes:
        type: LeRobot's name of the robot, from ``lerobot:<type>``.
        robot: Arguments of LeRobot's configuration class for it, e.g. ``port`` and ``id``.
        limits: Of its action features, in their order.
        cameras: The policy's camera name to LeRobot's. Left out: LeRobot's names.
        gripper: Part of the names of those positions that are grippers.
        actions: What an action feature means, by its name, where that does not tell.
        start_pose: One number per action feature. None: wherever it is.
        max_hz: The highest rate at which its bus takes commands.
        read_hz: How often its joints are read.
        stops_alone_after_s: How long after the last command the device itself brings its speeds to
            zero, if every process here died. None: as LeRobot has it, else not at all.
        sensor_timeout_s: After how long a silent or frozen sensor is lost.
        connect_timeout_s: For LeRobot to connect.
        repeats_pictures: Whether its cameras may show one picture again and again.
        connect_unseen: Let LeRobot connect although it cannot be seen whether the arm holds itself:
            somebody supports it.
        disconnect_at_end: Whether LeRobot's ``disconnect`` is called at the end. None: where it is
            known to leave the torque on, or was asked to switch it off.
        address: Of a running owner; None until ``companion`` starts one.
        description: What LeRobot said of the robot; see ``Description``. Filled in by us.
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
            raise ValueError(f"max_hz: got {self.max_hz}, expected more than 1")
        for name in ("read_hz", "sensor_timeout_s", "connect_timeout_s", "stops_alone_after_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value}, expected a positive number")

    @property
    def calibrate_command(self) -> str:
        """LeRobot's own, to be run by a person beforehand: it asks."""
        flags = "".join(
            f" --robot.{key}={value}"
            for key, value in self.robot.items()
            if isinstance(value, str | int) and (key == "id" or "port" in key or "dir" in key)
        )
        return f"lerobot-calibrate --robot.type={self.type}{flags}"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LeRobotConfig:
        return parse_config(cls, json.loads(text), source="lerobot")


@dataclass(frozen=True)
class Description:
    """What LeRobot says of a robot, in LeRobot's own order.

    Attributes:
        states: Observed features that are numbers: the order of ``observation.state``.
        pictures: Observed features that are pictures, (height, width).
        actions: Action features.
        units: Of positions by feature, where LeRobot knows.
    """

    states: tuple[str, ...]
    pictures: Mapping[str, tuple[int, int]]
    actions: tuple[str, ...]
    units: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Description:
        return parse_config(cls, json.loads(text), source="lerobot")


def action_specs(
    config: LeRobotConfig, description: Description, source: str
) -> tuple[ActionSpec, ...]:
    """What every action feature means.

    Raises:
        ConfigError: One is not understood, or a position that is not observed.
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
                f"not observed, expected it among {list(description.states)}: where it is has to "
                "be known"
            )
        if spec.kind is ActionKind.EFFORT:
            raise ConfigError(
                f"{source}: lerobot:{config.type}: action feature {spec.name!r} is an effort, "
                "expected positions or velocities: no effort holds an arm where it is"
            )
    return specs


def _spec(config: LeRobotConfig, description: Description, name: str, source: str) -> ActionSpec:
    if (given := config.actions.get(name)) is not None:
        return ActionSpec(name, ActionKind(given.kind), given.unit)
    last = name.rpartition(".")[2]
    kind = ActionKind.DELTA if name.startswith(DELTA_PREFIX) else KINDS.get(last)
    if kind is None:
        raise ConfigError(
            f"{source}: lerobot:{config.type}: action feature {name!r}: its name does not tell "
            f"what it means, expected one that ends in {[f'.{end}' for end in KINDS]} or begins "
            f"with {DELTA_PREFIX!r}, or 'actions: {{{name}: {{kind: position, unit: deg}}}}'"
        )
    if kind is ActionKind.POSITION and config.gripper and config.gripper in name:
        kind = ActionKind.GRIPPER
    unit = description.units.get(name, "rad" if last == "q" else NO_UNIT)
    if kind is ActionKind.VELOCITY:
        known = BASE_SPEEDS.get(name, BASE_SPEEDS.get(last))
        position = description.units.get(f"{name.removesuffix('.vel')}.pos", NO_UNIT)
        unit = known or f"{position}/s"
    return ActionSpec(name, kind, unit)
