"""From a configuration to a robot."""

from __future__ import annotations

from lerobot.robots.arm_follower import ArmFollower


def make_robot_from_config(config) -> ArmFollower:
    return ArmFollower(config)
