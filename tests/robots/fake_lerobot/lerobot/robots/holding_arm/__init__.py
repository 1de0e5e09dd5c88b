"""Two motors on a bus, with one camera. The motors are a file: they outlive whoever drives them."""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lerobot.robots.config import RobotConfig

MOTORS = ("lift", "gripper")


class NormMode(Enum):
    DEGREES = "degrees"
    RANGE_0_100 = "range_0_100"


@RobotConfig.register_subclass("holding_arm")
@dataclass
class HoldingArmConfig(RobotConfig):
    motors: str
    """A file: the registers of every motor, and under ``did`` what was done to them."""
    id: str = "one"
    calibrated: bool = True
    disable_torque_on_disconnect: bool = True
    cameras: dict = field(default_factory=dict)

    def make(self) -> HoldingArm:
        return HoldingArm(self)


class Bus:
    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self.is_connected = False
        modes = dict(zip(MOTORS, NormMode, strict=True))
        self.motors = {name: SimpleNamespace(norm_mode=modes[name]) for name in MOTORS}

    def connect(self) -> None:
        self.is_connected = True

    def disconnect(self, disable_torque: bool = True) -> None:
        if disable_torque:
            self.torque(MOTORS, 0)
        self.is_connected = False

    def read(self, register: str, motor: str, *, normalize: bool, num_retry: int = 0) -> int:
        assert self.is_connected
        return json.loads(self._path.read_text())[motor][register]

    def write(self, register: str, motor: str, value: int, **_: object) -> None:
        assert self.is_connected
        state = json.loads(self._path.read_text())
        state[motor][register] = int(value)
        if state[motor]["Torque_Enable"]:
            state[motor]["Present_Position"] = state[motor]["Goal_Position"]
        state["did"].append([register, motor, int(value)])
        complete = self._path.with_suffix(".new")
        complete.write_text(json.dumps(state))
        complete.replace(self._path)  # the test reads it at any time

    def torque(self, motors, value: int) -> None:
        for motor in motors:
            self.write("Torque_Enable", motor, value)

    def enable_torque(self, motors, num_retry: int = 0) -> None:
        self.torque(motors, 1)

    @contextlib.contextmanager
    def torque_disabled(self):
        self.torque(MOTORS, 0)
        yield
        self.torque(MOTORS, 1)


class Camera:
    """Its pictures come when somebody says so, or by themselves."""

    def __init__(self, rate_s: float) -> None:
        self.is_connected, self._rate_s, self._count = False, rate_s, 0

    def connect(self) -> None:
        self.is_connected = True

    def async_read(self, timeout_ms: float) -> np.ndarray:
        if self._count > 2 and self._rate_s > timeout_ms / 1e3:
            threading.Event().wait(timeout_ms / 1e3)
            raise TimeoutError("no frame")
        threading.Event().wait(min(self._rate_s, 0.01))
        self._count += 1
        return (np.arange(24 * 32 * 3).reshape(24, 32, 3) + self._count).astype(np.uint8)


class HoldingArm:
    def __init__(self, config: HoldingArmConfig) -> None:
        self.config = config
        self.bus = Bus(config.motors)
        self.cameras = {name: Camera(float(rate)) for name, rate in config.cameras.items()}
        self.action_features = {f"{motor}.pos": float for motor in MOTORS}
        self.observation_features = self.action_features | dict.fromkeys(
            config.cameras, (24, 32, 3)
        )

    @property
    def is_connected(self) -> bool:
        return self.bus.is_connected and all(c.is_connected for c in self.cameras.values())

    @property
    def is_calibrated(self) -> bool:
        return self.config.calibrated

    def connect(self, calibrate: bool = True) -> None:
        assert not self.is_connected
        assert not calibrate
        self.bus.connect()
        for camera in self.cameras.values():
            camera.connect()
        with self.bus.torque_disabled():
            pass

    def get_observation(self) -> dict:
        joints = {f"{m}.pos": self.bus.read("Present_Position", m, normalize=True) for m in MOTORS}
        return joints | {name: c.async_read(1000.0) for name, c in self.cameras.items()}

    def send_action(self, action: dict) -> dict:
        for motor in MOTORS:
            self.bus.write("Goal_Position", motor, action[f"{motor}.pos"])
        return action

    def disconnect(self) -> None:
        self.bus.disconnect(self.config.disable_torque_on_disconnect)
