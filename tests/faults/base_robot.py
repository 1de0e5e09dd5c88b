"""A lift on a mobile base: the device as a process of its own, its driver, and a policy for it.

The device takes (lift in mm, forward velocity in m/s) and does what a robot's own computer does:
when no command comes for ``STOPS_ALONE_AFTER_S`` it stops the base. It writes down every change of
its velocity and every command, so that a test sees what it was told and what it did.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.types import ActionChunk, MetaObs, PolicyContract, PolicyInfo
from policies.yaml_config import parse_config
from robots.base import (
    ActionKind,
    ActionSpec,
    CameraSample,
    JointSample,
    Robot,
    RobotContract,
    Role,
)
from robots.errors import ConnectFailed, RobotLost
from robots.joint_limits import JointLimits

STOPS_ALONE_AFTER_S = 0.5
COMMAND = struct.Struct("<2d")
STATE = struct.Struct("<2dq")
PERIOD_S = 0.005
ROW = struct.Struct("<q2dq")
"""Of the record: time (ns), lift (mm), velocity (m/s), and 1 for a command, 0 for a stop alone."""
ACCELERATION = 0.8


def run_device(folder: Path) -> None:
    """Until its standard input ends, whoever else lives or dies."""
    state_fd = os.open(folder / "state", os.O_RDWR | os.O_CREAT)
    os.ftruncate(state_fd, STATE.size)
    state = mmap.mmap(state_fd, STATE.size)
    inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    inbox.bind(str(folder / "inbox"))
    lift = velocity = 0.0
    commanded_ns = time.monotonic_ns()
    with (folder / "record").open("ab", buffering=0) as record:
        print("ready", flush=True)  # noqa: T201
        while True:
            readable, _, _ = select.select([inbox, sys.stdin], [], [], PERIOD_S)
            now_ns = time.monotonic_ns()
            if inbox in readable:
                lift, velocity = COMMAND.unpack(inbox.recv(COMMAND.size))
                commanded_ns = now_ns
                record.write(ROW.pack(now_ns, lift, velocity, 1))
            elif sys.stdin in readable:
                return
            elif velocity and now_ns - commanded_ns > STOPS_ALONE_AFTER_S * 1e9:
                velocity = 0.0
                record.write(ROW.pack(now_ns, lift, velocity, 0))
            state[:] = STATE.pack(lift, velocity, now_ns)


def read_record(folder: Path) -> np.ndarray:
    """Rows of (time in s, lift in mm, velocity in m/s, whether commanded)."""
    rows = list(ROW.iter_unpack((folder / "record").read_bytes()))
    return np.array([(stamp_ns / 1e9, *rest) for stamp_ns, *rest in rows], np.float64)


@dataclass(frozen=True)
class Config:
    """Keys of the driver.

    Attributes:
        folder: The device's.
        stops_alone: Whether to say that the device does.
    """

    folder: str
    stops_alone: bool = True


class BaseRobot(Robot):
    """Speaks to the device in ``folder``."""

    def __init__(self, config: Config, name: str) -> None:
        self._folder = Path(config.folder)
        contract = RobotContract(
            ("x.vel", "lift"),
            (
                ActionSpec("lift", ActionKind.POSITION, "mm"),
                ActionSpec("x.vel", ActionKind.VELOCITY, "m/s"),
            ),
            {},
            stops_alone_after_s=STOPS_ALONE_AFTER_S if config.stops_alone else None,
        )
        limits = JointLimits.from_config(
            contract.action_names,
            position_lower=(0.0, -0.5),
            position_upper=(400.0, 0.5),
            velocity=(200.0, 0.5),
            acceleration=(2000.0, ACCELERATION),
            source="base",
        )
        super().__init__(name, contract, limits)
        self._socket: socket.socket | None = None
        self._state: mmap.mmap | None = None

    def _connect(self, role: Role, timeout_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.connect(str(self._folder / "inbox"))
            with (self._folder / "state").open("rb") as file:
                self._state = mmap.mmap(file.fileno(), STATE.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ConnectFailed(f"{self.name}: {error}") from error

    def _get_joints(self) -> JointSample:
        lift, velocity, stamp_ns = STATE.unpack(self._state[:])
        return JointSample(np.array([velocity, lift], np.float32), stamp_ns, stamp_ns)

    def _get_joints_at(self, stamp_ns: int) -> JointSample:
        return self._get_joints()

    def _get_cameras(self) -> dict[str, CameraSample]:
        return {}

    def _send_action(self, action: np.ndarray) -> None:
        try:
            self._socket.send(COMMAND.pack(*action.tolist()))
        except OSError as error:
            raise RobotLost(f"{self.name}: {error}") from error

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = self._state = None


def make(args: Mapping[str, Any], name: str, source: str, overrides: Mapping[str, str]) -> Robot:
    return BaseRobot(parse_config(Config, args, source=source, overrides=overrides), name)


class Drive:
    """The lift goes up slowly, the base forward at 0.3 m/s."""

    contract = PolicyContract(
        "drive", (), 2, 2, chunk_size=50, n_action_steps=10,
        state_names=("x.vel", "lift"), action_names=("lift", "x.vel"),
        dt_s=0.02,
    )  # fmt: skip
    info = PolicyInfo("drive", engine="numpy", trained=False)

    def infer(self, obs: MetaObs) -> ActionChunk:
        ticks = obs.timestep + np.arange(self.contract.chunk_size)
        actions = np.stack([np.minimum(0.5 * ticks, 300.0), np.full(len(ticks), 0.3)], axis=1)
        return ActionChunk(actions.astype(np.float32), obs.timestep, obs.t_capture_ns)

    def reset(self) -> None:
        pass

    def fork(self) -> Drive:
        return self

    def close(self) -> None:
        pass


def make_policy() -> Drive:
    return Drive()


if __name__ == "__main__":
    run_device(Path(sys.argv[1]))
