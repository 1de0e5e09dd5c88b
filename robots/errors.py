"""What can go wrong with a robot, one tree."""

from __future__ import annotations

from policies import yaml_config


class RobotError(Exception):
    """Anything this package raises on purpose."""


class ConfigError(RobotError, yaml_config.InvalidConfig):
    """A robot's configuration that cannot be used; the message names the file and the key path."""


class NotConnected(RobotError):
    """Used before ``connect`` or after ``disconnect``, or in a role it was not connected in."""


class ConnectFailed(RobotError):
    """The robot cannot be reached: no master, no simulator, no bus, a package not installed."""


class ContractViolated(RobotError):
    """What the robot sends is not what its configuration says: joints, camera sizes, encodings."""


class SensorLost(RobotError):
    """A sensor that never spoke, or speaks no more; the message names it and its age."""


class StampFault(SensorLost):
    """A sensor whose stamps stand still or went back: its data cannot be put in time."""


class RobotLost(RobotError):
    """The connection to the robot is gone; commands no longer reach it."""


class UnsafeCommand(RobotError):
    """A command that must not be sent, e.g. NaN or of another length."""
