"""``sim_twin``: two simulated ViperX arms that move in real time, in a process of their own.

For everything that a real robot is good for except the wear: the same interface, cameras that run
on their own clock, commands that arrive when they arrive, and an outcome that it tells by itself.
What it does not have: a bus that fails, joint noise, a gripper that feels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.yaml_config import parse_config
from robots.base import CameraSample, JointSample, Outcome, Robot, RobotContract, Role, arm_actions
from robots.errors import ConfigError, ConnectFailed, NotConnected, SensorLost
from robots.limits import Limits
from robots.processes import Child
from robots.twin_board import WATCHING, Board, Stream
from robots.twin_config import GRIPPERS, JOINTS, SUBSTEP_HZ, TwinConfig
from robots.twin_link import Link

CALL_TIMEOUT_S = 10.0
LOOK_AGAIN_S = 0.002
START_POSE = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.1) * 2
"""Where the simulation's episodes begin, as a command."""


class SimTwin(Robot):
    """The twin, seen from one process. ``companion`` runs the simulator that others connect to.

    Args:
        config: Its keys.
        name: What it is called in results.
        source: Where the keys come from, for errors.

    Raises:
        ConfigError: Limits that cannot be.
    """

    def __init__(self, config: TwinConfig, *, name: str = "sim_twin", source: str = "") -> None:
        self.config = config
        given = config.limits
        limits = Limits.from_config(
            JOINTS,
            **{
                field.name: both_arms(getattr(given, field.name), f"{source}: limits.{field.name}")
                for field in dataclasses.fields(given)
            },
            source=source,
        )
        contract = RobotContract(
            joint_names=JOINTS,
            actions=arm_actions(JOINTS, GRIPPERS),
            cameras=config.camera_hw,
            repeats_pictures=True,
            control_hz=(1.0, float(SUBSTEP_HZ)),
        )
        super().__init__(name, contract, limits)
        self._link: Link | None = None
        self._board: Board | None = None
        self._seen: dict[str, tuple[int, CameraSample]] = {}

    @property
    def start_pose(self) -> NDArray[np.float32]:
        return np.array(START_POSE, np.float32)

    @property
    def start_velocity(self) -> NDArray[np.float64]:
        return np.array(self.config.start_velocity * 2)

    @property
    def sensor_timeout_s(self) -> float:
        return self.config.sensor_timeout_s

    @contextlib.contextmanager
    def companion(self) -> Iterator[Mapping[str, str]]:
        """The simulator. It ends with the thread that entered here, even by ``kill -9``.

        Raises:
            ConnectFailed: It did not start; carries the reason.
        """
        if self.config.address is not None:
            yield {}  # one is running already, somebody else's
            return
        before = self.config
        with Child("robots.twin_host", ["--config", before.to_json()]) as host:
            self.config = dataclasses.replace(before, address=host.said["address"])
            try:
                yield {"address": host.said["address"]}
            finally:
                self.config = before

    @property
    def host_pid(self) -> int:
        """The simulator's process id."""
        return int(self._connected()[0].hello["pid"])

    def save_record(self, path: Path) -> None:
        """Write what the arms did and were told since the record began; see ``TwinRecord``."""
        self._call("save_record", path=str(path.resolve()))

    def clear_record(self) -> None:
        """Begin the record anew."""
        self._call("clear_record")

    def _connect(self, role: Role, timeout_s: float) -> None:
        if self.config.address is None:
            raise ConnectFailed(
                f"{self.name}: no simulator to connect to; expected to be within companion(), or "
                "its address as configuration"
            )
        self._link = Link(self.config.address, role=role, timeout_s=timeout_s)
        self._board = Board(
            self._link.board_fd,
            qpos=self._link.hello["qpos"],
            joints=len(JOINTS),
            cameras=self.config.camera_hw,
            writable=False,
        )
        streams = [("joints", self._board.joints)]
        if role is not Role.CONTROL:
            streams += self._board.cameras.items()
        since_ns = time.monotonic_ns()
        self._wait_for(streams, lambda sample: bool(sample["received_ns"] >= since_ns), timeout_s)

    def _get_joints(self) -> JointSample:
        return _joint_sample(self._fresh("joints", self._connected()[1].joints))

    def _get_joints_at(self, stamp_ns: int) -> JointSample:
        stream = self._connected()[1].joints
        self._fresh("joints", stream)
        return _joint_sample(stream.nearest(stamp_ns))

    def _get_cameras(self) -> dict[str, CameraSample]:
        for name, stream in self._connected()[1].cameras.items():
            if name not in self._seen or self._seen[name][0] != stream.count:
                slot = self._fresh(name, stream)
                self._seen[name] = int(slot["number"]) + 1, _camera_sample(slot)
            else:
                self._check_age(name, self._seen[name][1].received_ns)
        return {name: sample for name, (_, sample) in self._seen.items()}

    def _send_action(self, action: NDArray[np.float32]) -> None:
        self._connected()[0].send_action(action)

    def _outcome(self) -> Outcome:
        link, board = self._connected()
        link.check_alive()
        state: Any = board.joints.newest()
        return Outcome(bool(state["success"]), float(state["reward"]), int(state["step"]))

    def _reset(self, seed: int) -> bool:
        """As in simulation with the same seed. Returns once pictures show it, if anybody looks."""
        stamp_ns = self._call("reset", seed=seed)["stamp_ns"]
        _, board = self._connected()
        if board.head[WATCHING]:
            self._wait_for(
                list(board.cameras.items()),
                lambda sample: bool(sample["stamp_ns"] >= stamp_ns),
                CALL_TIMEOUT_S,
            )
        return True

    def _disconnect(self) -> None:
        self._board = None
        self._seen = {}
        if self._link is not None:
            self._link.close()
            self._link = None

    def _connected(self) -> tuple[Link, Board]:
        if self._link is None or self._board is None:
            raise NotConnected(f"{self.name}: not connected")
        return self._link, self._board

    def _call(self, call: str, **arguments: Any) -> Mapping[str, Any]:
        return self._connected()[0].call(call, timeout_s=CALL_TIMEOUT_S, **arguments)

    def _fresh(self, name: str, stream: Stream) -> Any:
        """The newest slot of ``stream``, if it is new enough."""
        slot: Any = stream.newest()
        self._check_age(name, int(slot["received_ns"]))
        return slot

    def _check_age(self, name: str, received_ns: int) -> None:
        self._connected()[0].check_alive()
        age_s = (time.monotonic_ns() - received_ns) / 1e9
        if age_s > self.config.sensor_timeout_s:
            raise SensorLost(
                f"{self.name}: {name}: nothing new for {age_s:.2f} s, expected something within "
                f"{self.config.sensor_timeout_s:g} s"
            )

    def _wait_for(
        self,
        streams: Sequence[tuple[str, Stream]],
        arrived: Callable[[Any], bool],
        timeout_s: float,
    ) -> None:
        """Until the newest of every stream has ``arrived``."""
        deadline_s = time.monotonic() + timeout_s
        missing = list(streams)
        while missing:
            self._connected()[0].check_alive()
            for entry in list(missing):
                newest = entry[1].newest()
                if newest is not None and arrived(newest):
                    missing.remove(entry)
            if missing and time.monotonic() >= deadline_s:
                silent = [name for name, _ in missing]
                raise SensorLost(f"{self.name}: nothing from {silent} within {timeout_s:g} s")
            if missing:
                time.sleep(LOOK_AGAIN_S)


def both_arms(values: Sequence[float], source: str) -> tuple[float, ...]:
    """What holds for one arm, for two. Raises ``ConfigError`` unless it is 7 numbers."""
    if len(values) != len(JOINTS) // 2:
        raise ConfigError(
            f"{source}: got {len(values)} numbers, expected {len(JOINTS) // 2}: six joints and the "
            "gripper of one arm"
        )
    return tuple(values) * 2


def make(args: Mapping[str, Any], name: str, source: str, overrides: Mapping[str, str]) -> SimTwin:
    config = parse_config(TwinConfig, args, source=source, overrides=overrides)
    return SimTwin(config, name=name, source=source)


def _joint_sample(slot: Any) -> JointSample:
    return JointSample(slot["position"], int(slot["stamp_ns"]), int(slot["received_ns"]))


def _camera_sample(slot: Any) -> CameraSample:
    return CameraSample(slot["image"], int(slot["stamp_ns"]), int(slot["received_ns"]))
