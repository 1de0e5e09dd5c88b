"""``sim_twin``: two simulated ViperX arms that move in real time, in a process of their own.

For everything that a real robot is good for except the wear: the same interface, cameras that run
on their own clock, commands that arrive when they arrive, and an outcome that it tells by itself.
What it does not have: a bus that fails, joint noise, a gripper that feels.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.yaml_config import parse_config
from robots.attached_robot import CALL_TIMEOUT_S, AttachedRobot
from robots.base import Outcome, RobotContract, arm_actions
from robots.companion import start_companion
from robots.errors import ConfigError
from robots.joint_limits import JointLimits
from robots.twin_config import GRIPPERS, JOINTS, SUBSTEP_HZ, TwinConfig

START_POSE = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.1) * 2
"""Where the simulation's episodes begin, as a command."""


class SimTwin(AttachedRobot):
    """The twin, seen from one process. ``companion`` runs the simulator that others connect to.

    Args:
        config: Its keys.
        name: What it is called in results.
        source: Where the keys come from, for errors.

    Raises:
        ConfigError: Limits that cannot be.
    """

    owner = "the simulator"

    def __init__(self, config: TwinConfig, *, name: str = "sim_twin", source: str = "") -> None:
        self.config = config
        given = config.limits
        limits = JointLimits.from_config(
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

    @property
    def address(self) -> str | None:
        return self.config.address

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
        with start_companion("robots.twin_process", ["--config", before.to_json()]) as host:
            self.config = dataclasses.replace(before, address=host.ready["address"])
            try:
                yield {"address": host.ready["address"]}
            finally:
                self.config = before

    def save_record(self, path: Path) -> None:
        """Write what the arms did and were told since the record began; see ``TwinMotionLog``."""
        self._call("save_record", path=str(path.resolve()))

    def clear_record(self) -> None:
        """Begin the record anew."""
        self._call("clear_record")

    def _outcome(self) -> Outcome:
        link, sensor_memory = self._connected()
        link.check_alive()
        state: Any = sensor_memory.joints.newest()
        success, reward, step = (state.arrays[name] for name in ("success", "reward", "step"))
        return Outcome(bool(success), float(reward), int(step))

    def _reset(self, seed: int) -> bool:
        """As in simulation with the same seed. Returns once pictures show it, if anybody looks."""
        stamp_ns = self._call("reset", seed=seed)["stamp_ns"]
        _, sensor_memory = self._connected()
        if sensor_memory.watchers.load():
            self._wait_for(
                list(sensor_memory.cameras.items()),
                lambda sample: sample.stamp_ns >= stamp_ns,
                CALL_TIMEOUT_S,
            )
        return True


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
