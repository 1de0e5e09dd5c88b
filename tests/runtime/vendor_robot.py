"""A driver whose code prints, asks, hangs or fails its own way, as vendors' code does.

``python:tests.runtime.vendor_robot``, with ``habit`` among its arguments.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from policies.yaml_config import parse_config
from robots.base import CameraSample, Robot, Role
from robots.dummy import DummyConfig, DummyRobot

RESET_S = 0.4
"""Longer than the watchdog waits for a command of an arm that moves."""


class VendorRobot(DummyRobot):
    habit = ""

    @property
    def start_pose(self) -> np.ndarray | None:
        """So that it moves right after a reset."""
        if self.habit == "resets slowly":
            return np.full(self.contract.action_dim, 0.2, np.float32)
        return super().start_pose

    def _connect(self, role: Role, timeout_s: float) -> None:
        print("Vendor SDK 1.2")  # noqa: T201
        if self.habit == "asks":
            input("Press ENTER to use the calibration file: ")
        elif self.habit == "hangs":
            print("Turn the key")  # noqa: T201
            threading.Event().wait()
        elif self.habit == "fails":
            raise LookupError("no motor 3\non this bus")
        elif self.habit == "prints":
            print('{"event": "ready"}', "is not for the parent")  # noqa: T201
        super()._connect(role, timeout_s)
        self._looks = 0

    def _send_action(self, action: np.ndarray) -> None:
        if self.habit == "asks when it is commanded":
            input("Is the area clear? ")
        super()._send_action(action)

    def _reset(self, seed: int) -> bool:
        if self.habit == "resets slowly":
            time.sleep(RESET_S)
            return True
        return super()._reset(seed)

    def _get_cameras(self) -> dict[str, CameraSample]:
        self._looks += 1
        if self.habit == "its camera hangs" and self._looks > 20:
            threading.Event().wait()
        return super()._get_cameras()


def make(args: Mapping[str, Any], name: str, source: str, overrides: Mapping[str, str]) -> Robot:
    given = dict(args)
    habit = given.pop("habit")
    if habit == "is not made":
        raise LookupError("no licence\nfor this arm")
    config = parse_config(DummyConfig, given, source=source, overrides=overrides)
    robot = VendorRobot(config, name=name, source=source)
    robot.habit = habit
    return robot


def ask() -> None:
    """A policy's factory that wants an answer."""
    input("Which adapter? ")
