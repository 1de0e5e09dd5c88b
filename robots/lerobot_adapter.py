"""``lerobot:<type>``: any robot of LeRobot's, where that package is installed.

LeRobot gives one dictionary per observation, joints and pictures together, without stamps, from a
bus that one process owns. So ``shareable`` is False, what is read is stamped when it came, and a
process that controls reads the pictures of the observation too, if the robot has cameras: give
those to a robot of their own where the control rate matters.
"""

from __future__ import annotations

import dataclasses
import importlib
import numbers
import pkgutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.yaml_config import parse_config
from robots.base import CameraSample, JointSample, Robot, RobotContract, Role, arm_actions
from robots.errors import (
    ConfigError,
    ConnectFailed,
    ContractViolated,
    NotConnected,
    RobotLost,
    SensorLost,
)
from robots.limits import Limits

KEPT = 64
"""Observations whose joints are kept for pairing."""


@dataclass(frozen=True)
class LeRobotLimits:
    """In the robot's own units, one number per action feature."""

    position_lower: tuple[float, ...]
    position_upper: tuple[float, ...]
    velocity: tuple[float, ...]
    acceleration: tuple[float, ...]


@dataclass(frozen=True)
class LeRobotConfig:
    """Our keys; ``robot`` is LeRobot's.

    Attributes:
        type: LeRobot's name of the robot, from ``lerobot:<type>``.
        robot: Arguments of LeRobot's configuration class for it, e.g. ``port`` and ``id``.
        limits: Of its action features, in their order.
        cameras: The policy's camera name to LeRobot's. Left out: LeRobot's names.
        gripper: Part of the names of those features that are grippers.
        start_pose: One number per action feature. None: wherever it is.
        max_hz: The highest rate at which its bus takes commands.
    """

    type: str
    limits: LeRobotLimits
    robot: Mapping[str, Any] = field(default_factory=dict)
    cameras: Mapping[str, str] | None = None
    gripper: str = "gripper"
    start_pose: tuple[float, ...] | None = None
    max_hz: float = 200.0

    def __post_init__(self) -> None:
        if not self.max_hz > 1:
            raise ValueError(f"max_hz: got {self.max_hz}, expected more than 1")


class LeRobotRobot(Robot):
    """See the module. Belongs to one process.

    Args:
        config: Its keys.
        name: What it is called in results.
        source: Where the keys come from, for errors.

    Raises:
        ConfigError: LeRobot is not installed or has no such robot, an argument that it does not
            take, limits that do not fit its action features.
    """

    def __init__(self, config: LeRobotConfig, *, name: str, source: str = "") -> None:
        self.config = config
        self._source = source
        self._robot: Any = make_lerobot(config.type, config.robot, source)
        states, pictures = _features(self._robot.observation_features, source)
        actions, other = _features(self._robot.action_features, source)
        if not actions or other or not set(actions) <= set(states):
            raise ConfigError(
                f"{source}: lerobot:{config.type}: got action features "
                f"{list(self._robot.action_features)}, expected numbers that are observed too, "
                f"some of {states}"
            )
        # Commands come first in a contract, in the order in which LeRobot has them.
        self._states = (*actions, *(key for key in states if key not in actions))
        self._actions = tuple(actions)
        cameras = {key: key for key in pictures} if config.cameras is None else config.cameras
        unknown = sorted(set(cameras.values()) - set(pictures))
        if unknown:
            raise ConfigError(
                f"{source}: cameras: got {unknown}, expected some of {list(pictures)}"
            )
        self._cameras = dict(cameras)
        limits = Limits.from_config(
            self._actions,
            **{
                field.name: getattr(config.limits, field.name)
                for field in dataclasses.fields(config.limits)
            },
            source=source,
        )
        contract = RobotContract(
            joint_names=self._states,
            actions=arm_actions(
                self._actions,
                [i for i, key in enumerate(self._actions) if config.gripper in key],
            ),
            cameras={ours: pictures[theirs] for ours, theirs in self._cameras.items()},
            control_hz=(1.0, config.max_hz),
        )
        super().__init__(name, contract, limits)
        self._start_pose = self._checked_start_pose()
        self._history: deque[JointSample] = deque(maxlen=KEPT)

    @property
    def start_pose(self) -> NDArray[np.float32] | None:
        return None if self._start_pose is None else self._start_pose.copy()

    @property
    def shareable(self) -> bool:
        return False

    def _checked_start_pose(self) -> NDArray[np.float32] | None:
        if self.config.start_pose is None:
            return None
        pose = np.array(self.config.start_pose, np.float32)
        if pose.shape != (len(self._actions),):
            raise ConfigError(
                f"{self._source}: start_pose: got {len(pose)} numbers, expected "
                f"{len(self._actions)}, one for each of {list(self._actions)}"
            )
        for index in self._limits.violations(pose):
            raise ConfigError(
                f"{self._source}: start_pose: got {pose[index]} for {self._actions[index]}, "
                f"expected {self._limits.position_lower[index]} to "
                f"{self._limits.position_upper[index]}, its limits"
            )
        return pose

    def __reduce__(self) -> tuple[Any, ...]:
        # LeRobot's own object holds buses and cameras: another process makes its own.
        return _remake, (self.config, self._name, self._source)

    def _connect(self, role: Role, timeout_s: float) -> None:
        del role, timeout_s  # LeRobot's connect has no timeout to hand it to
        try:
            self._robot.connect()
        except Exception as error:
            raise ConnectFailed(f"{self.name}: {type(error).__name__}: {error}") from error
        self._read()

    def _read(self) -> tuple[JointSample, dict[str, CameraSample]]:
        """One observation, stamped when it was asked for: no part of it is older."""
        if not self._robot.is_connected:
            raise NotConnected(f"{self.name}: LeRobot's robot is not connected")
        asked_ns = time.monotonic_ns()
        try:
            got: Mapping[str, Any] = self._robot.get_observation()
        except Exception as error:
            raise SensorLost(f"{self.name}: {type(error).__name__}: {error}") from error
        missing = [key for key in (*self._states, *self._cameras.values()) if key not in got]
        if missing:
            raise ContractViolated(f"{self.name}: got {sorted(got)}, expected {missing} too")
        position = np.array([float(got[key]) for key in self._states], np.float32)
        if not np.isfinite(position).all():
            raise ContractViolated(f"{self.name}: got {position.tolist()}, expected finite numbers")
        pictures = {}
        for ours, theirs in self._cameras.items():
            picture = np.asarray(got[theirs])
            expected = (*self.contract.cameras[ours], 3)
            if picture.shape != expected or picture.dtype != np.uint8:
                raise ContractViolated(
                    f"{self.name}: {theirs}: got {picture.dtype} {picture.shape}, expected uint8 "
                    f"{expected}"
                )
            pictures[ours] = CameraSample(np.array(picture), asked_ns, asked_ns)
        sample = JointSample(position, asked_ns, asked_ns)
        self._history.append(sample)
        return sample, pictures

    def _get_joints(self) -> JointSample:
        return self._read()[0]

    def _get_joints_at(self, stamp_ns: int) -> JointSample:
        if not self._history:
            self._read()
        return min(self._history, key=lambda sample: abs(sample.stamp_ns - stamp_ns))

    def _get_cameras(self) -> dict[str, CameraSample]:
        return self._read()[1]

    def _send_action(self, action: NDArray[np.float32]) -> None:
        try:
            self._robot.send_action(dict(zip(self._actions, action.tolist(), strict=True)))
        except Exception as error:
            raise RobotLost(f"{self.name}: {type(error).__name__}: {error}") from error

    def _disconnect(self) -> None:
        self._history.clear()
        if self._robot.is_connected:
            self._robot.disconnect()


def make_lerobot(kind: str, arguments: Mapping[str, Any], source: str) -> Any:
    """LeRobot's own robot ``kind``, not connected.

    A configuration class registers itself when its module is imported, and the module's name is not
    always the robot's (``so101_follower`` lies in ``so_follower``); so they are imported until the
    name is known, those of plug-ins (``lerobot_robot_*``) last.

    Raises:
        ConfigError: It is not installed, has no such robot, or refuses the arguments.
    """
    try:
        package = importlib.import_module("lerobot.robots")
        base = importlib.import_module("lerobot.robots.config").RobotConfig
        build = importlib.import_module("lerobot.robots.utils").make_robot_from_config
        decode = importlib.import_module("draccus").decode
    except Exception as error:  # a half-installed LeRobot fails in ways of its own
        raise ConfigError(
            f"{source}: lerobot:{kind}: the package lerobot cannot be imported "
            f"({type(error).__name__}: {error}): pip install lerobot, with the extra that the "
            "robot needs"
        ) from error
    missing = _import_until(lambda: kind in base.get_known_choices(), package)
    choices: Mapping[str, Any] = base.get_known_choices()
    if kind not in choices:
        raise ConfigError(
            f"{source}: lerobot:{kind}: no such robot, expected one of {sorted(choices)}"
            + (f"; not importable here: {missing}" if missing else "")
        )
    try:
        return build(decode(choices[kind], dict(arguments)))
    except Exception as error:
        raise ConfigError(
            f"{source}: lerobot:{kind}: robot: {type(error).__name__}: {error}"
        ) from error


def _import_until(known: Callable[[], bool], package: Any) -> dict[str, str]:
    """Import LeRobot's robots, and the kinds of cameras, until ``known``; what failed and why."""
    failed = {}
    cameras = ("lerobot.cameras.opencv", "lerobot.cameras.realsense")
    robots = [f"lerobot.robots.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    plugins = [m.name for m in pkgutil.iter_modules() if m.name.startswith("lerobot_robot_")]
    for name in (*cameras, *robots, *plugins):
        if name in robots + plugins and known():
            break
        try:
            importlib.import_module(name)
        except ImportError as error:
            if name not in cameras:
                failed[name] = str(error)
    return failed


def make(
    args: Mapping[str, Any], name: str, source: str, overrides: Mapping[str, str]
) -> LeRobotRobot:
    config = parse_config(LeRobotConfig, args, source=source, overrides=overrides)
    return LeRobotRobot(config, name=name, source=source)


def _remake(config: LeRobotConfig, name: str, source: str) -> LeRobotRobot:
    return LeRobotRobot(config, name=name, source=source)


def _features(
    features: Mapping[str, Any], source: str
) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The keys that are numbers, and those that are pictures with their (height, width)."""
    values, pictures = [], {}
    for key, kind in features.items():
        if isinstance(kind, type) and issubclass(kind, numbers.Real):
            values.append(key)
        elif isinstance(kind, tuple) and len(kind) == 3 and kind[2] == 3:
            pictures[key] = (int(kind[0]), int(kind[1]))
        else:
            raise ConfigError(
                f"{source}: feature {key!r}: got {kind}, expected float or (height, width, 3)"
            )
    return values, pictures
