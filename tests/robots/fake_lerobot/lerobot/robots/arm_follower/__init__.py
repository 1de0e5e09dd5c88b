"""An arm in degrees with a camera; ``fault`` breaks it in the way named."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from lerobot.robots.config import RobotConfig


@RobotConfig.register_subclass("arm_v2_follower")
@dataclass
class ArmFollowerConfig(RobotConfig):
    port: str
    id: str | None = None
    fault: str = ""

    def make(self) -> ArmFollower:
        return ArmFollower(self)


class ArmFollower:
    action_features = dict.fromkeys(("shoulder.pos", "elbow.pos", "gripper.pos"), float)

    def __init__(self, config: ArmFollowerConfig) -> None:
        self.config = config
        self.is_connected = False
        self._pose = dict.fromkeys(self.action_features, 0.0)
        self._count = 0
        if config.fault == "features":
            self.action_features = {"speed": float}

    @property
    def observation_features(self) -> dict:
        other = str if self.config.fault == "kind" else float
        return {
            "temperature": other,
            **self.action_features,
            "front": (24, 32, 3),
            "side": (8, 8, 3),
        }

    def connect(self, calibrate: bool = True) -> None:
        if self.config.port == "/dev/nothing":
            raise ConnectionError("no such port")
        if self.config.fault == "asks":
            input("Press ENTER to use the calibration file: ")
        if self.config.fault == "hangs":
            print("Switch the arm on and I shall go on")  # noqa: T201
            threading.Event().wait()
        self.is_connected = True

    def get_observation(self) -> dict:
        if self.config.fault == "bus":
            raise ConnectionError("no answer from motor 3")
        if self.config.fault == "prints":
            print('{"error": "not an answer of ours"}')  # noqa: T201
        self._count += 1
        ramp = np.arange(24 * 32 * 3, dtype=np.uint32).reshape(24, 32, 3) + self._count
        front = ramp.astype(np.uint8)
        if self.config.fault == "size":
            front = front[:12]
        seen = {**self._pose, "temperature": 30.0, "front": front, "side": front[:8, :8]}
        if self.config.fault == "missing":
            del seen["elbow.pos"]
        if self.config.fault == "nan":
            seen["elbow.pos"] = float("nan")
        return seen

    def send_action(self, action: dict) -> dict:
        if self.config.fault == "write":
            raise ConnectionError("no answer from motor 1")
        assert set(action) == set(self.action_features)
        self._pose = dict(action)
        return action

    def disconnect(self) -> None:
        if not self.is_connected:
            raise RuntimeError("not connected")
        self.is_connected = False
