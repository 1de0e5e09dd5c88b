"""From a configuration to a robot."""

from __future__ import annotations


def make_robot_from_config(config) -> object:
    return config.make()
