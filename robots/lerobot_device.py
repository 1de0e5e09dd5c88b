"""LeRobot's own object, in the one process that owns it: made, connected, read, commanded, let go.

A raised arm must not drop. LeRobot's ``connect`` runs ``configure``, which switches the torque off
meanwhile, and its ``disconnect`` and its destructor leave the torque off by default. So:

* where any motor holds itself already, neither is called: bus and cameras are opened, no more;
* where none does, every goal is set to where its motor is before LeRobot's ``connect`` switches
  the torque on;
* the torque stays on at the end, unless the user's own ``disable_torque_on_disconnect`` says so.
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
"""Of LeRobot's ways to normalize a position; the others have no unit."""
TRIES = 3
"""Of a register, on a bus where packets get lost."""
FIRST_WITHIN_S = 1.0
"""For the first whole observation, once LeRobot is connected."""
FAILURES = (Exception, SystemExit, KeyboardInterrupt)
"""What LeRobot's code and plug-ins end a call with; none of it may end the owner in motion."""
LET_GO = "disable_torque_on_disconnect"


class Observation(NamedTuple):
    """One look.

    Attributes:
        position: (S,) float32; None where nothing came since the last look.
        pictures: (H, W, 3) uint8 by LeRobot's name, those that are new.
        stamp_ns: When it was asked for, our monotonic clock: no part of it is older.
    """

    position: NDArray[np.float32] | None
    pictures: Mapping[str, NDArray[np.uint8]]
    stamp_ns: int


class LeRobotDevice:
    """LeRobot's robot. Belongs to one thread.

    Args:
        config: Our keys.

    Raises:
        ConfigError: LeRobot is not installed, has no such robot, or refuses the arguments.
    """

    def __init__(self, config: LeRobotConfig) -> None:
        self._config = config
        self._robot = make_lerobot(config.type, config.robot)
        self._parts = list(_parts(self._robot))
        self.description = self._describe()
        self._cameras: dict[str, Any] = {}
        self._answered: Any = None
        self._before: Mapping[str, Any] = {}
        self._shown: dict[str, Any] = {}

    def _describe(self) -> Description:
        kind = f"lerobot:{self._config.type}"
        states, pictures = _features(self._robot.observation_features, kind)
        actions, other = _features(self._robot.action_features, kind)
        if other:
            raise ConfigError(f"action features {list(other)}: got pictures, expected numbers")
        units = {}
        for prefix, part in self._parts:
            for bus in _buses(part):
                for motor, made in bus.motors.items():
                    mode = getattr(getattr(made, "norm_mode", None), "value", "")
                    units[f"{prefix}{motor}.pos"] = UNITS.get(mode, NO_UNIT)
        if not units and getattr(self._robot.config, "use_degrees", False):
            units = {name: "deg" for name in actions if name.endswith(".pos")}
        return Description(tuple(states), pictures, tuple(actions), units)

    # Connecting

    def connect(self) -> None:
        """Open everything; an arm that holds itself goes on holding itself.

        Raises:
            ConnectFailed: It cannot be reached, is not calibrated, or may drop; says what to do.
        """
        for prefix, part in self._parts:
            buses = list(_buses(part))
            holding = [self._open(bus) for bus in buses]
            if buses and not self._is_calibrated(part):
                raise ConnectFailed(
                    f"{prefix}{self._config.type} is not calibrated, or its motors do not agree "
                    f"with its calibration file; run {self._config.calibrate_command} first"
                )
            if any(holding):
                self._adopt(part, buses)
            else:
                self._let_lerobot_connect(part, buses)
        if not self._robot.is_connected:
            raise ConnectFailed(
                f"{self._config.type} holds itself and cannot be opened without LeRobot's "
                "connect(), during which it would drop; support it, switch it off and on again"
            )
        self._split_cameras()

    def _open(self, bus: Any) -> bool:
        """Open ``bus``; whether any of its motors holds itself."""
        if not bus.is_connected:
            bus.connect()
        try:
            return any(self._torque(bus).values())
        # Each bus of LeRobot's refuses in its own way what it has no register or argument for.
        except (KeyError, TypeError, ValueError, NotImplementedError) as error:
            if self._config.connect_unseen:
                return False
            raise ConnectFailed(
                f"{self._config.type}: its motors do not tell whether they hold themselves, and "
                "LeRobot's connect() would drop an arm that they hold; support it and set "
                "connect_unseen: true"
            ) from error

    @staticmethod
    def _torque(bus: Any) -> dict[str, int]:
        return {
            motor: int(bus.read("Torque_Enable", motor, normalize=False, num_retry=TRIES))
            for motor in bus.motors
        }

    @staticmethod
    def _is_calibrated(part: Any) -> bool:
        """As LeRobot has it, which gives up at the first packet that is lost."""
        for _ in range(TRIES):
            with contextlib.suppress(ConnectionError):
                return bool(part.is_calibrated)
        return bool(part.is_calibrated)

    def _adopt(self, part: Any, buses: list[Any]) -> None:
        """Go on with motors that hold themselves; those that do not hold where they are, too."""
        logger.warning("%s holds itself: it is left as it is", self._config.type)
        for bus in buses:
            limp = [motor for motor, on in self._torque(bus).items() if not on]
            if limp:
                self._aim_at_where_it_is(bus, limp)
                bus.enable_torque(limp, num_retry=TRIES)
        if hasattr(part, "stop_base"):
            part.stop_base()
        for camera in getattr(part, "cameras", {}).values():
            if not camera.is_connected:
                camera.connect()

    def _let_lerobot_connect(self, part: Any, buses: list[Any]) -> None:
        for bus in buses:
            if not self._config.connect_unseen:
                self._aim_at_where_it_is(bus, list(bus.motors))
            bus.disconnect(disable_torque=False)
        calibrate = "calibrate" in inspect.signature(part.connect).parameters
        part.connect(calibrate=False) if calibrate else part.connect()

    @staticmethod
    def _aim_at_where_it_is(bus: Any, motors: list[str]) -> None:
        """So that nothing jumps when the torque comes on."""
        for motor in motors:
            at = bus.read("Present_Position", motor, normalize=False, num_retry=TRIES)
            bus.write("Goal_Position", motor, at, normalize=False, num_retry=TRIES)

    def _split_cameras(self) -> None:
        """Take the cameras that read in threads of their own out of LeRobot's observations.

        A slow camera would delay the joints. Where LeRobot's robot does not work without them, it
        keeps them.
        """
        taken: dict[str, Any] = {}
        kept: dict[str, dict[str, Any]] = {}
        for prefix, part in self._parts:
            cameras = getattr(part, "cameras", None)
            if not isinstance(cameras, dict) or not cameras:
                continue
            named = {f"{prefix}{name}": camera for name, camera in cameras.items()}
            if set(named) <= set(self.description.pictures) and all(
                callable(getattr(camera, "async_read", None)) for camera in named.values()
            ):
                taken |= named
                kept[prefix] = cameras
                part.cameras = {}
        if not taken:
            return
        try:
            got = self._robot.get_observation()
        except Exception as error:
            logger.debug("cameras stay in the observation: %r", error)
            got = dict.fromkeys(taken)
        if any(name in got for name in taken):
            for prefix, part in self._parts:
                part.cameras = kept.get(prefix, part.cameras)
            return
        self._cameras = taken

    @property
    def cameras(self) -> Mapping[str, Any]:
        """LeRobot's camera objects, by LeRobot's name, that ``look`` leaves out."""
        return self._cameras

    # Reading

    def first_look(self) -> Observation:
        """One that is whole.

        Raises:
            SensorLost: Nothing came in time.
            ContractViolated: It is not what was declared.
        """
        deadline_s = time.monotonic() + FIRST_WITHIN_S
        while True:
            try:
                seen = self.look()
                missing = set(self.description.pictures) - set(self._cameras) - set(self._shown)
                if seen.position is None or missing:
                    raise SensorLost(f"nothing from {sorted(missing) or 'the joints'}")
                return seen
            except RobotError:
                if time.monotonic() > deadline_s:
                    raise
            time.sleep(0.01)

    def look(self) -> Observation:
        """What there is now.

        Raises:
            SensorLost: LeRobot cannot read it.
            ContractViolated: It is not what was declared.
        """
        asked_ns = time.monotonic_ns()
        try:
            got: Mapping[str, Any] = self._robot.get_observation()
            values = dict(got)
        except FAILURES as error:
            raise SensorLost(f"{type(error).__name__}: {error}") from error
        # A client of a robot elsewhere answers what it had when nothing came.
        if got is self._answered and all(
            value is self._before.get(key) for key, value in values.items()
        ):
            return Observation(None, {}, asked_ns)
        missing = [name for name in self.description.states if name not in values]
        if missing:
            raise ContractViolated(f"got {sorted(values)}, expected {missing} too")
        try:
            numbers = [float(values[key]) for key in self.description.states]
        except (TypeError, ValueError) as error:
            raise ContractViolated(f"got a state that is no number: {error}") from error
        position = np.array(numbers, np.float32)
        if not np.isfinite(position).all():
            raise ContractViolated(f"got {position.tolist()}, expected finite numbers")
        self._answered, self._before = got, values
        pictures = {}
        for name in self.description.pictures:
            picture = values.get(name)
            if picture is not None and picture is not self._shown.get(name):
                pictures[name] = self.checked(name, picture)
                self._shown[name] = picture
        return Observation(position, pictures, asked_ns)

    def checked(self, name: str, picture: Any) -> NDArray[np.uint8]:
        """``picture`` of camera ``name``.

        Raises:
            ContractViolated: It is not of the declared size, or no picture.
        """
        array = np.asarray(picture)
        expected = (*self.description.pictures[name], 3)
        if array.shape != expected or array.dtype != np.uint8:
            raise ContractViolated(
                f"{name}: got {array.dtype} {array.shape}, expected uint8 {expected}"
            )
        return array

    # Commanding

    def send(self, action: NDArray[np.float32]) -> None:
        """Command it: (A,) in the order of the action features. Raises whatever LeRobot raises."""
        self._robot.send_action(dict(zip(self.description.actions, action.tolist(), strict=True)))

    def end(self) -> None:
        """Disconnect, where that leaves the torque on or somebody wanted it off."""
        wanted = self._config.disconnect_at_end
        configs = list(_configs(self._robot.config))
        if wanted is None:
            wanted = bool(configs) and all(hasattr(config, LET_GO) for config in configs)
        if not wanted:
            return  # the bus is closed by the end of this process, which tells the motors nothing
        try:
            self._robot.disconnect()
        except FAILURES:
            logger.exception("LeRobot's disconnect failed")


def make_lerobot(kind: str, arguments: Mapping[str, Any]) -> Any:
    """LeRobot's own robot ``kind``, not connected; it leaves the torque on unless asked not to.

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
            f"the package lerobot cannot be imported ({type(error).__name__}: {error}): pip "
            "install lerobot, with the extra that the robot needs"
        ) from error
    missing = _import_until(lambda: kind in base.get_known_choices(), package, kind)
    choices: Mapping[str, Any] = base.get_known_choices()
    if kind not in choices:
        raise ConfigError(
            f"no such robot, expected one of {sorted(choices)}"
            + (f"; not importable here: {missing}" if missing else "")
        )
    try:
        config = decode(choices[kind], dict(arguments))
        _hold_at_the_end(config, arguments)
        return build(config)
    except EOFError:
        raise
    except Exception as error:
        raise ConfigError(f"robot: {type(error).__name__}: {error}") from error


def _hold_at_the_end(config: Any, arguments: Mapping[str, Any]) -> None:
    """Switch LeRobot's default off, by which the arm drops, also in each arm of two."""
    if hasattr(config, LET_GO) and LET_GO not in arguments:
        setattr(config, LET_GO, False)
    for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
        if dataclasses.is_dataclass(value) and hasattr(value, LET_GO):
            inner = arguments.get(name)
            _hold_at_the_end(value, inner if isinstance(inner, Mapping) else {})


def _configs(config: Any) -> Iterator[Any]:
    """Of the parts of a robot that have motors: the configuration itself, or those of its arms."""
    inner = [value for name, value in vars(config).items() if name.endswith("_arm_config")]
    yield from inner or [config]


def _import_until(known: Callable[[], bool], package: Any, kind: str) -> dict[str, str]:
    """Import LeRobot's robots, and the kinds of cameras, until ``known``; what failed and why.

    Those whose names are like ``kind`` come first.
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
    """The keys that are numbers, and those that are pictures with their (height, width)."""
    values, pictures = [], {}
    for key, feature in features.items():
        if isinstance(feature, type) and issubclass(feature, numbers.Real):
            values.append(key)
        elif isinstance(feature, tuple) and len(feature) == 3 and feature[2] == 3:
            pictures[key] = (int(feature[0]), int(feature[1]))
        else:
            raise ConfigError(
                f"{kind}: feature {key!r}: got {feature}, expected float or (height, width, 3)"
            )
    return values, pictures
