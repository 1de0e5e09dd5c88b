"""Exceptions of robots, in one tree."""

from __future__ import annotations

from policies import yaml_config


class RobotError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(RobotError, yaml_config.InvalidConfig):
    """A robot's configuration is invalid; the message names the file and the key path."""


class NotConnected(RobotError):
    """A method was called without a connection, or in a role that does not allow it."""


class ConnectFailed(RobotError):
    """The robot cannot be reached: no ROS master, simulator or bus, or a missing package."""


class ContractViolated(RobotError):
    """The robot's data do not fit its configuration: joints, camera sizes, encodings."""


class SensorLost(RobotError):
    """A sensor sent no data, or none for too long; the message names it and the age of its data."""


class StampFault(SensorLost):
    """A sensor's stamps are frozen or went back, so its data cannot be paired with others."""


class RobotLost(RobotError):
    """The connection to the robot has ended; commands no longer reach it."""


class UnsafeCommand(RobotError):
    """A command that must not be sent: NaN, infinity or the wrong length."""
