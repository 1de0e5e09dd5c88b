"""``sim_twin``: two simulated ViperX arms that move in real time, in a process of their own.

It replaces a real robot in tests: the same interface, cameras with their own clock, commands that
arrive at any time, and in addition an outcome that it computes itself. It does not simulate bus
failures, joint noise or contact sensing of the gripper.
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
from robots.companion_launcher import start_companion
from robots.errors import ConfigError
from robots.joint_limits import JointLimits
from robots.twin_config import GRIPPERS, JOINTS, SUBSTEP_HZ, TwinConfig

START_POSE = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.1) * 2
"""(14,) the start of the simulation's episodes, as a command."""


class SimTwin(AttachedRobot):
    """One process's connection to the simulator, which ``companion`` runs.

    Args:
        config: The configuration.
        name: The robot's name in results.
        source: Where the configuration comes from, for errors.

    Raises:
        ConfigError: Invalid limits.
    """

    owner_name = "the simulator"

    def __init__(self, config: TwinConfig, *, name: str = "sim_twin", source: str = "") -> None:
        self.config = config
        arm = config.limits
        limits = JointLimits.from_config(
            JOINTS,
            **{
                field.name: both_arms(getattr(arm, field.name), f"{source}: limits.{field.name}")
                for field in dataclasses.fields(arm)
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
        """Of a running simulator; None: none is known."""
        return self.config.address

    @property
    def start_pose(self) -> NDArray[np.float32]:
        """(A,) float32, ``START_POSE``."""
        return np.array(START_POSE, np.float32)

    @property
    def start_velocity(self) -> NDArray[np.float64]:
        """(A,) per second, as configured per arm."""
        return np.array(self.config.start_velocity * 2)

    @property
    def sensor_timeout_s(self) -> float:
        """As configured, seconds."""
        return self.config.sensor_timeout_s

    @contextlib.contextmanager
    def companion(self) -> Iterator[Mapping[str, str]]:
        """Run the simulator. It ends with the thread that entered here, even if that is killed.

        Raises:
            ConnectFailed: It did not start; carries the reason.
        """
        if self.config.address is not None:
            yield {}  # another program has started one
            return
        without_address = self.config
        with start_companion(
            "robots.twin_owner_process", ["--config", without_address.to_json()]
        ) as simulator:
            address = simulator.ready["address"]
            self.config = dataclasses.replace(without_address, address=address)
            try:
                yield {"address": address}
            finally:
                self.config = without_address

    def save_record(self, path: Path) -> None:
        """Write the motion and the commands of both arms to an .npz; see ``TwinMotionLog``."""
        self._call("save_record", path=str(path.resolve()))

    def clear_record(self) -> None:
        """Delete the recorded motion and commands, and go on recording."""
        self._call("clear_record")

    def _outcome(self) -> Outcome:
        return self._published_outcome()

    def _reset(self, seed: int) -> bool:
        """Begin the simulation's episode ``seed``; wait for its images if any client reads them."""
        stamp_ns = self._call("reset", seed=seed)["stamp_ns"]
        _, sensor_memory = self._connected()
        if sensor_memory.camera_clients.load():
            self._wait_for(
                list(sensor_memory.cameras.items()),
                lambda sample: sample.stamp_ns >= stamp_ns,
                CALL_TIMEOUT_S,
            )
        return True


def both_arms(values: Sequence[float], source: str) -> tuple[float, ...]:
    """The values of one arm, twice. Raises ``ConfigError`` unless they are 7 numbers."""
    if len(values) != len(JOINTS) // 2:
        raise ConfigError(
            f"{source}: got {len(values)} numbers, expected {len(JOINTS) // 2}: six joints and the "
            "gripper of one arm"
        )
    return tuple(values) * 2


def make(args: Mapping[str, Any], name: str, source: str, overrides: Mapping[str, str]) -> SimTwin:
    """Build the robot; called by ``robots.factory``, which describes the arguments."""
    config = parse_config(TwinConfig, args, source=source, overrides=overrides)
    return SimTwin(config, name=name, source=source)
