"""A lift on wheels that is elsewhere: what LeRobot's client of it last heard, it answers again."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from lerobot.robots.config import RobotConfig


@RobotConfig.register_subclass("rover")
@dataclass
class RoverConfig(RobotConfig):
    log: str
    """A file: every command with when it came; nothing is heard once a file beside it exists."""
    feature: str = "x.vel"

    def make(self) -> Rover:
        return Rover(self)


class Rover:
    def __init__(self, config: RoverConfig) -> None:
        self.config = config
        self.is_connected = False
        self.action_features = {"lift.pos": float, config.feature: float}
        self.observation_features = self.action_features
        self._log = Path(config.log)
        self._at = 0.0
        self._heard: dict = {}

    def connect(self) -> None:
        self.is_connected = True

    def get_observation(self) -> dict:
        if not self._log.with_suffix(".silent").exists():
            self._heard = {"lift.pos": float(self._at), self.config.feature: float("0.5")}
        return self._heard

    def send_action(self, action: dict) -> dict:
        self._at = action["lift.pos"]
        with self._log.open("a") as file:
            file.write(json.dumps([time.monotonic(), *action.values()]) + "\n")
        return action
