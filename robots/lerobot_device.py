"""Wraps LeRobot's robot object in its owner process: create, connect, read, command, disconnect.

A raised arm must not drop. LeRobot's ``connect`` calls ``configure``, which switches the torque off
for a while; by default its ``disconnect`` and its destructor leave the torque off. So:

* if the torque of any motor is on, ``connect`` is not called: only bus and cameras are opened;
* if all torques are off, each motor's goal is set to its present position before LeRobot's
  ``connect`` switches the torque on;
* the torque stays on at the end, unless the user sets ``disable_torque_on_disconnect``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import logging
import numbers
import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robots.errors import ConfigError, ConnectFailed, ContractViolated, RobotError, SensorLost
from robots.lerobot_config import NO_UNIT, Description, LeRobotConfig

logger = logging.getLogger(__name__)

UNITS = {"degrees": "deg"}
"""LeRobot's normalization mode of a position to its unit; other modes have no unit."""
TRIES = 3
"""Attempts to access a register, as a bus loses packets."""
FIRST_OBSERVATION_TIMEOUT_S = 1.0
"""For the first complete observation, once LeRobot is connected."""
FAILURES = (Exception, SystemExit, KeyboardInterrupt)
"""Exceptions of LeRobot's code and plug-ins. None may end the owner while the robot moves."""
TORQUE_OFF_KEY = "disable_torque_on_disconnect"


class Observation(NamedTuple):
    """The new data of one reading.

    Attributes:
        position: (S,) float32; None without new data since the last reading.
        images: LeRobot's camera name to (H, W, 3) uint8, of cameras with a new image.
        stamp_ns: When the reading began, by this host's monotonic clock; no data are older.
    """

    position: NDArray[np.float32] | None
    images: Mapping[str, NDArray[np.uint8]]
    stamp_ns: int


class LeRobotDevice:
    """LeRobot's robot. Used by one thread.

    Args:
        config: The configuration.

    Attributes:
        description: LeRobot's features of the robot.

    Raises:
        ConfigError: LeRobot is not installed, has no such robot, or rejects the arguments.
    """

    def __init__(self, config: LeRobotConfig) -> None:
        self._config = config
        self._robot = make_lerobot(config.type, config.robot)
        self._parts = list(_parts(self._robot))
        self.description = self._describe()
        self._cameras: dict[str, Any] = {}
        self._last_result: Any = None
        self._last_values: Mapping[str, Any] = {}
        self._last_images: dict[str, Any] = {}

    def _describe(self) -> Description:
        kind = f"lerobot:{self._config.type}"
        states, pictures = _features(self._robot.observation_features, kind)
        actions, other = _features(self._robot.action_features, kind)
        if other:
            raise ConfigError(f"action features {list(other)}: got pictures, expected numbers")
        units = {}
        for prefix, part in self._parts:
            for bus in _buses(part):
                for motor, settings in bus.motors.items():
                    mode = getattr(getattr(settings, "norm_mode", None), "value", "")
                    units[f"{prefix}{motor}.pos"] = UNITS.get(mode, NO_UNIT)
        if not units and getattr(self._robot.config, "use_degrees", False):
            units = {name: "deg" for name in actions if name.endswith(".pos")}
        return Description(tuple(states), pictures, tuple(actions), units)

    # Connecting

    def connect(self) -> None:
        """Open bus and cameras. An arm whose torque is on keeps it on.

        Raises:
            ConnectFailed: It cannot be reached, is not calibrated, or could drop; says what to do.
        """
        for prefix, part in self._parts:
            buses = list(_buses(part))
            torque_on = [self._open(bus) for bus in buses]
            if buses and not self._is_calibrated(part):
                raise ConnectFailed(
                    f"{prefix}{self._config.type} is not calibrated, or its motors do not agree "
                    f"with its calibration file; run {self._config.calibrate_command} first"
                )
            if any(torque_on):
                self._keep_torque(part, buses)
            else:
                self._call_connect(part, buses)
        if not self._robot.is_connected:
            raise ConnectFailed(
                f"{self._config.type}: its torque is on, and it cannot be opened without LeRobot's "
                "connect(), during which the arm would drop; support it by hand, switch its power "
                "off and on, then connect again"
            )
        self._separate_cameras()

    def _open(self, bus: Any) -> bool:
        """Open ``bus``; returns whether the torque of any of its motors is on."""
        if not bus.is_connected:
            bus.connect()
        try:
            return any(self._torque(bus).values())
        # Each bus class of LeRobot raises another error for a missing register or argument.
        except (KeyError, TypeError, ValueError, NotImplementedError) as error:
            if self._config.connect_unseen:
                return False
            raise ConnectFailed(
                f"{self._config.type}: its motors do not report whether their torque is on, and "
                "LeRobot's connect() would drop an arm whose torque is on; support it by hand and "
                "set connect_unseen: true"
            ) from error

    @staticmethod
    def _torque(bus: Any) -> dict[str, int]:
        return {
            motor: int(bus.read("Torque_Enable", motor, normalize=False, num_retry=TRIES))
            for motor in bus.motors
        }

    @staticmethod
    def _is_calibrated(part: Any) -> bool:
        """LeRobot's ``is_calibrated``, repeated because it fails when a packet is lost."""
        for _ in range(TRIES):
            with contextlib.suppress(ConnectionError):
                return bool(part.is_calibrated)
        return bool(part.is_calibrated)

    def _keep_torque(self, part: Any, buses: list[Any]) -> None:
        """Open without LeRobot's ``connect``; switch on torques that are off, where they are."""
        logger.warning(
            "%s: its torque is on already: it stays on, and LeRobot's connect() is not called",
            self._config.type,
        )
        for bus in buses:
            torque_off = [motor for motor, on in self._torque(bus).items() if not on]
            if torque_off:
                self._set_goals_to_present(bus, torque_off)
                bus.enable_torque(torque_off, num_retry=TRIES)
        if hasattr(part, "stop_base"):
            part.stop_base()
        for camera in getattr(part, "cameras", {}).values():
            if not camera.is_connected:
                camera.connect()

    def _call_connect(self, part: Any, buses: list[Any]) -> None:
        for bus in buses:
            if not self._config.connect_unseen:
                self._set_goals_to_present(bus, list(bus.motors))
            bus.disconnect(disable_torque=False)
        calibrate = "calibrate" in inspect.signature(part.connect).parameters
        part.connect(calibrate=False) if calibrate else part.connect()

    @staticmethod
    def _set_goals_to_present(bus: Any, motors: list[str]) -> None:
        """Set each goal to the present position, so that nothing jumps when the torque comes on."""
        for motor in motors:
            present = bus.read("Present_Position", motor, normalize=False, num_retry=TRIES)
            bus.write("Goal_Position", motor, present, normalize=False, num_retry=TRIES)

    def _separate_cameras(self) -> None:
        """Remove cameras that have their own reading thread from LeRobot's observations.

        A slow camera would delay the joints. If LeRobot's robot does not work without its cameras,
        it keeps them.
        """
        separated: dict[str, Any] = {}
        original: dict[str, dict[str, Any]] = {}
        for prefix, part in self._parts:
            cameras = getattr(part, "cameras", None)
            if not isinstance(cameras, dict) or not cameras:
                continue
            named = {f"{prefix}{name}": camera for name, camera in cameras.items()}
            if set(named) <= set(self.description.pictures) and all(
                callable(getattr(camera, "async_read", None)) for camera in named.values()
            ):
                separated |= named
                original[prefix] = cameras
                part.cameras = {}
        if not separated:
            return
        try:
            observation = self._robot.get_observation()
        except Exception as error:
            logger.debug("cameras stay in the observation: %r", error)
            observation = dict.fromkeys(separated)
        if any(name in observation for name in separated):
            for prefix, part in self._parts:
                part.cameras = original.get(prefix, part.cameras)
            return
        self._cameras = separated

    @property
    def cameras(self) -> Mapping[str, Any]:
        """LeRobot's camera name to its camera object, of cameras that ``read`` leaves out."""
        return self._cameras

    # Reading

    def read_first(self) -> Observation:
        """Wait for a complete observation.

        Raises:
            SensorLost: None came within ``FIRST_OBSERVATION_TIMEOUT_S``.
            ContractViolated: It does not fit ``description``.
        """
        deadline_s = time.monotonic() + FIRST_OBSERVATION_TIMEOUT_S
        while True:
            try:
                observation = self.read()
                missing = set(self.description.pictures) - set(self._cameras)
                missing -= set(self._last_images)
                if observation.position is None or missing:
                    raise SensorLost(
                        f"got nothing from {sorted(missing) or 'the joints'} within "
                        f"{FIRST_OBSERVATION_TIMEOUT_S:g} s"
                    )
                return observation
            except RobotError:
                if time.monotonic() > deadline_s:
                    raise
            time.sleep(0.01)

    def read(self) -> Observation:
        """Read LeRobot's observation.

        Raises:
            SensorLost: LeRobot cannot read it.
            ContractViolated: It does not fit ``description``.
        """
        began_ns = time.monotonic_ns()
        try:
            result: Mapping[str, Any] = self._robot.get_observation()
            values = dict(result)
        except FAILURES as error:
            raise SensorLost(f"{type(error).__name__}: {error}") from error
        # A client of a remote robot returns its last observation when nothing new arrived.
        if result is self._last_result and all(
            value is self._last_values.get(key) for key, value in values.items()
        ):
            return Observation(None, {}, began_ns)
        missing = [name for name in self.description.states if name not in values]
        if missing:
            raise ContractViolated(f"got {sorted(values)}, expected {missing} too")
        try:
            state = [float(values[key]) for key in self.description.states]
        except (TypeError, ValueError) as error:
            raise ContractViolated(f"got a state that is not a number: {error}") from error
        position = np.array(state, np.float32)
        if not np.isfinite(position).all():
            raise ContractViolated(f"got {position.tolist()}, expected finite numbers")
        self._last_result, self._last_values = result, values
        images = {}
        for name in self.description.pictures:
            image = values.get(name)
            if image is not None and image is not self._last_images.get(name):
                images[name] = self.checked(name, image)
                self._last_images[name] = image
        return Observation(position, images, began_ns)

    def checked(self, name: str, image: Any) -> NDArray[np.uint8]:
        """``image`` of LeRobot's camera ``name`` as (H, W, 3) uint8.

        Raises:
            ContractViolated: It has another shape or dtype.
        """
        array = np.asarray(image)
        expected = (*self.description.pictures[name], 3)
        if array.shape != expected or array.dtype != np.uint8:
            raise ContractViolated(
                f"{name}: got {array.dtype} {array.shape}, expected uint8 {expected}"
            )
        return array

    # Commanding

    def send(self, action: NDArray[np.float32]) -> None:
        """Send a command, (A,) in the order of the action features. Raises LeRobot's errors."""
        self._robot.send_action(dict(zip(self.description.actions, action.tolist(), strict=True)))

    def end(self) -> None:
        """Disconnect, if that leaves the torque on or the configuration asks for it."""
        disconnect = self._config.disconnect_at_end
        configs = list(_configs(self._robot.config))
        if disconnect is None:
            disconnect = bool(configs) and all(
                hasattr(config, TORQUE_OFF_KEY) for config in configs
            )
        if not disconnect:
            return  # the end of this process closes the bus and sends nothing to the motors
        try:
            self._robot.disconnect()
        except FAILURES:
            logger.exception("LeRobot's disconnect failed")


def make_lerobot(kind: str, arguments: Mapping[str, Any]) -> Any:
    """Create LeRobot's robot ``kind``, not connected.

    Its ``disconnect`` leaves the torque on unless ``arguments`` say otherwise. A configuration
    class registers itself when its module is imported, and the module's name may differ from the
    robot's (``so101_follower`` is in ``so_follower``). So modules are imported until the name is
    registered, plug-ins (``lerobot_robot_*``) last.

    Args:
        kind: LeRobot's name of the robot.
        arguments: Of LeRobot's configuration class.

    Raises:
        ConfigError: LeRobot is not installed, has no such robot, or rejects the arguments.
    """
    try:
        package = importlib.import_module("lerobot.robots")
        base = importlib.import_module("lerobot.robots.config").RobotConfig
        build = importlib.import_module("lerobot.robots.utils").make_robot_from_config
        decode = importlib.import_module("draccus").decode
    except Exception as error:  # an incomplete installation raises various errors
        raise ConfigError(
            f"the package lerobot cannot be imported ({type(error).__name__}: {error}): pip "
            "install lerobot, with the extra that the robot needs"
        ) from error
    missing = _import_until(lambda: kind in base.get_known_choices(), package, kind)
    choices: Mapping[str, Any] = base.get_known_choices()
    if kind not in choices:
        raise ConfigError(
            f"no such robot, expected one of {sorted(choices)}"
            + (f"; modules that cannot be imported: {missing}" if missing else "")
        )
    try:
        config = decode(choices[kind], dict(arguments))
        _keep_torque_at_end(config, arguments)
        return build(config)
    except EOFError:
        raise
    except Exception as error:
        raise ConfigError(f"robot: {type(error).__name__}: {error}") from error


def _keep_torque_at_end(config: Any, arguments: Mapping[str, Any]) -> None:
    """Change LeRobot's default, with which the arm drops; also in each arm of two."""
    if hasattr(config, TORQUE_OFF_KEY) and TORQUE_OFF_KEY not in arguments:
        setattr(config, TORQUE_OFF_KEY, False)
    for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
        if dataclasses.is_dataclass(value) and hasattr(value, TORQUE_OFF_KEY):
            inner = arguments.get(name)
            _keep_torque_at_end(value, inner if isinstance(inner, Mapping) else {})


def _configs(config: Any) -> Iterator[Any]:
    """The configurations of all parts with motors: ``config`` itself, or those of its arms."""
    inner = [value for name, value in vars(config).items() if name.endswith("_arm_config")]
    yield from inner or [config]


def _import_until(known: Callable[[], bool], package: Any, kind: str) -> dict[str, str]:
    """Import LeRobot's cameras and robots until ``known``; returns failed modules with the reason.

    Modules with names similar to ``kind`` come first.
    """
    failed = {}
    cameras = ("lerobot.cameras.opencv", "lerobot.cameras.realsense")
    robots = [f"lerobot.robots.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    robots.sort(key=lambda name: -SequenceMatcher(None, kind, name).ratio())
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


def _parts(robot: Any) -> Iterator[tuple[str, Any]]:
    """The robot, or each arm of two with the prefix of its features."""
    arms = [
        (name, value)
        for name, value in vars(robot).items()
        if all(hasattr(value, need) for need in ("get_observation", "send_action", "connect"))
    ]
    if not arms:
        yield "", robot
    for name, arm in arms:
        yield name.removesuffix("arm"), arm


def _buses(part: Any) -> Iterator[Any]:
    """LeRobot's motor buses."""
    for value in vars(part).values():
        if isinstance(getattr(value, "motors", None), dict) and hasattr(value, "enable_torque"):
            yield value


def _features(
    features: Mapping[str, Any], kind: str
) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The keys of features that are numbers, and those that are images with (height, width)."""
    values, images = [], {}
    for key, feature in features.items():
        if isinstance(feature, type) and issubclass(feature, numbers.Real):
            values.append(key)
        elif isinstance(feature, tuple) and len(feature) == 3 and feature[2] == 3:
            images[key] = (int(feature[0]), int(feature[1]))
        else:
            raise ConfigError(
                f"{kind}: feature {key!r}: got {feature}, expected float or (height, width, 3)"
            )
    return values, images
