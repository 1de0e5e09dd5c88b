"""Build a ``Robot`` from its configuration. Imports only the driver in use.

``configs/robot/*.yaml`` have ILStudio's layout: the driver's name and the driver's own arguments.
ILStudio's class paths and its newer key names (``target``, ``config``) are accepted.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from policies import yaml_config
from robots.base import Robot
from robots.errors import ConfigError

DRIVERS = {
    "dummy": "robots.dummy",
    "sim_twin": "robots.sim_twin",
    "agilex_aloha": "robots.agilex_aloha",
    "ros2": "robots.ros2_robot",
}
"""Driver's name to the module whose ``make(args, name, source, overrides)`` builds it."""
ILSTUDIO = {
    "deploy.robot.dummy_robot.DummyRobot": "dummy",
    "deploy.robot.dummy.DummyRobot": "dummy",
    "deploy.robot.agilex_aloha.AgilexAloha": "agilex_aloha",
}
LEROBOT_PREFIX = "lerobot:"
PYTHON_PREFIX = "python:"
"""``python:package.module``: a user's own driver, a module with a function ``make``."""

Make = Callable[[Mapping[str, Any], str, str, Mapping[str, str]], Robot]
"""``make(args, name, source, overrides)`` of a driver's module: the robot, not connected."""


@dataclass(frozen=True)
class RobotFile:
    """The layout of ``configs/robot/*.yaml``.

    Attributes:
        type, target: The driver: one of ``DRIVERS``, ``lerobot:<type>``, ``python:<module>``, or
            one of the classes of ILStudio in ``ILSTUDIO``. Exactly one of the two keys.
        name: The robot's name in results; the name of the file if empty.
        args, config: The driver's own keys. At most one of the two.
    """

    type: str = ""
    target: str = ""
    name: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.type) == bool(self.target):
            raise ValueError(f"type: got {self.type or self.target!r}, expected either the key "
                             "'type' or 'target'")  # fmt: skip
        if self.args and self.config:
            raise ValueError("args: got both 'args' and 'config', expected one of them")


def make_robot(name: str, overrides: Mapping[str, str] | None = None) -> Robot:
    """Build the robot of the configuration ``name``. It is not connected.

    Args:
        name: A name in ``configs/robot``, or a path to a YAML file.
        overrides: Dotted keys below ``args`` to YAML text.

    Raises:
        ConfigError: No such configuration or driver, an unknown key, limits that are inverted or of
            the wrong count. It is also a ``policies.yaml_config.InvalidConfig``.
    """
    try:
        path = yaml_config.find_config(name, kind="robot")
        file = yaml_config.load_config(RobotFile, str(path), kind="robot")
        requested = file.type or file.target
        driver = ILSTUDIO.get(requested, requested)
        kind, _, rest = driver.partition(":")
        args = dict(file.args or file.config)
        if kind + ":" == LEROBOT_PREFIX and rest:
            make, args = _import_make("robots.lerobot_robot"), {**args, "type": rest}
        elif kind + ":" == PYTHON_PREFIX and rest:
            make = _user_make(rest, f"{path}: type")
        elif driver in DRIVERS:
            make = _import_make(DRIVERS[driver])
        else:
            raise ConfigError(
                f"{path}: type: got {requested!r}, expected one of {list(DRIVERS)}, "
                f"'{LEROBOT_PREFIX}<type>', '{PYTHON_PREFIX}<module>', or ILStudio's "
                f"{list(ILSTUDIO)}"
            )
        return make(args, file.name or path.stem, f"{path}: args", overrides or {})
    except ConfigError:
        raise
    except yaml_config.InvalidConfig as error:
        raise ConfigError(str(error)) from error


def _import_make(module: str) -> Make:
    make: Make = importlib.import_module(module).make
    return make


def _user_make(module: str, source: str) -> Make:
    """``make`` of a user's module. Every failure becomes a ``ConfigError`` that names the file."""
    try:
        make = _import_make(module)
    except AttributeError as error:
        raise ConfigError(
            f"{source}: {module} has no make(args, name, source, overrides), expected that "
            "function in it; see docs/add-a-robot.md"
        ) from error
    except Exception as error:
        raise ConfigError(f"{source}: {module} cannot be imported: {error!r}") from error

    def checked_make(*args: Any) -> Robot:
        try:
            return make(*args)
        except (ConfigError, yaml_config.InvalidConfig):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{source}: {module}.make: {type(error).__name__}: {reason}"
            ) from error

    return checked_make
