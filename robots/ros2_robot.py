"""``ros2``: any robot that speaks ROS 2, as its configuration describes.

One process, the owner process (``robots.ros2_owner_process``), is a ROS 2 node. It runs under a
Python that has ``rclpy``; the processes that use the robot attach to it and never import it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.yaml_config import parse_config
from robots.attached_robot import CALL_TIMEOUT_S, POLL_PERIOD_S
from robots.base import Outcome, RobotContract
from robots.companion_launcher import start_companion
from robots.errors import ConfigError, RobotLost
from robots.factory import make_robot
from robots.owned_robot import OwnedRobot
from robots.ros2_config import Ros2Config
from robots.ros2_environment import find_interpreter
from robots.sensor_memory import JOINTS
from robots.sim_twin import SimTwin
from robots.twin_config import JOINTS as TWIN_JOINTS
from transport.child_process import ChildProcess

START_TIMEOUT_S = 60.0
"""For the node to start, beside the time for its topics."""


class Ros2Robot(OwnedRobot):
    """One process's connection to a robot over ROS 2; see the module.

    Args:
        config: The configuration.
        name: The robot's name in results.
        source: Where the configuration comes from, for errors.

    Raises:
        ConfigError: Invalid limits, or a start pose outside them or of another length.
    """

    owner_name = "the robot's ROS 2 node"

    def __init__(self, config: Ros2Config, *, name: str = "ros2", source: str = "") -> None:
        self.config = config
        actions = config.actions
        contract = RobotContract(
            joint_names=config.joint_names,
            actions=actions,
            cameras={camera: topic.hw for camera, topic in config.cameras.items()},
            control_hz=config.control_hz,
            stops_alone_after_s=config.stops_alone_after_s,
            repeats_pictures=config.repeats_pictures,
        )
        names = [spec.name for spec in actions]
        limits = config.limits.of(actions, f"{source}: limits")
        super().__init__(name, contract, limits)
        given = (("start_pose", config.start_pose), ("start_velocity", config.start_velocity))
        for key, values in given:
            if values is not None and len(values) != len(names):
                raise ConfigError(
                    f"{source}: {key}: got {len(values)} numbers, expected {len(names)}, one for "
                    f"each of {names}"
                )
        if config.start_pose is not None and (outside := limits.violations(config.start_pose)):
            raise ConfigError(
                f"{source}: start_pose: got {[names[index] for index in outside]} outside the "
                "position limits, expected all inside"
            )

    @property
    def address(self) -> str | None:
        """Of a running owner process; None: none is known."""
        return self.config.address

    @property
    def start_pose(self) -> NDArray[np.float32] | None:
        """(A,) float32, as configured; None: the current pose."""
        pose = self.config.start_pose
        return None if pose is None else np.array(pose, np.float32)

    @property
    def start_velocity(self) -> NDArray[np.float64] | None:
        """(A,) per second, as configured; None: that of the limits."""
        velocity = self.config.start_velocity
        return None if velocity is None else np.array(velocity)

    @property
    def sensor_timeout_s(self) -> float:
        """As configured, seconds."""
        return self.config.sensor_timeout_s

    @contextlib.contextmanager
    def companion(self) -> Iterator[Mapping[str, str]]:
        """Run the owner process, and before it the simulated robot if the configuration has one.

        Raises:
            ConnectFailed: No Python with ROS 2, or nobody takes the commands.
            SensorLost, ContractViolated: A topic sends nothing, or what does not fit.
        """
        with contextlib.ExitStack() as stack:
            twin = self.config.twin
            if twin is not None and twin.simulator and self.address is None:
                stack.enter_context(self._simulated(twin.simulator))
            yield stack.enter_context(super().companion())

    @contextlib.contextmanager
    def _simulated(self, simulator: str) -> Iterator[None]:
        """Run the simulator and the node that publishes it."""
        cameras = {
            name: {"camera": name, "hw": list(topic.hw)}
            for name, topic in self.config.cameras.items()
        }
        twin = make_robot(simulator, {"cameras": json.dumps(cameras)})
        if not isinstance(twin, SimTwin) or self.config.joint_names != TWIN_JOINTS:
            raise ConfigError(
                f"{self.name}: twin.simulator: got {simulator} for the joints "
                f"{list(self.config.joint_names)}, expected a sim_twin and {list(TWIN_JOINTS)}"
            )
        interpreter = find_interpreter(self.config.python)
        with (
            twin.companion(),
            start_companion(
                "robots.twin_ros2_node",
                ["--config", self.config.to_json(), "--twin", twin.config.to_json()],
                name=f"{self.name}: the node of the simulated robot",
                interpreter=interpreter,
            ),
        ):
            yield

    def _start_owner(self) -> ChildProcess:
        return start_companion(
            "robots.ros2_owner_process",
            ["--config", self.config.to_json()],
            ready_within_s=START_TIMEOUT_S + self.config.connect_timeout_s,
            name=self.name,
            outlives=True,
            interpreter=find_interpreter(self.config.python),
        )

    def _set_address(self, address: str | None) -> None:
        self.config = dataclasses.replace(self.config, address=address)

    def _outcome(self) -> Outcome | None:
        return None if self.config.twin is None else self._published_outcome()

    def _reset(self, seed: int) -> bool:
        """Begin the simulation's episode ``seed``, and wait for its first samples."""
        if self.config.twin is None:
            return False
        request = self._call("reset", seed=seed)["request"]
        deadline_s = time.monotonic() + CALL_TIMEOUT_S
        while (stamp_ns := self._call("reset_answer", request=request)["stamp_ns"]) is None:
            if time.monotonic() >= deadline_s:
                raise RobotLost(
                    f"{self.name}: no answer to a reset on {self.config.twin.reset} within "
                    f"{CALL_TIMEOUT_S:g} s: is the simulated robot still running?"
                )
            time.sleep(POLL_PERIOD_S)
        now_ns = time.monotonic_ns()
        _, sensor_memory = self._connected()
        self._wait_for(
            [(JOINTS, sensor_memory.joints), *sensor_memory.cameras.items()],
            lambda sample: sample.stamp_ns >= stamp_ns and sample.received_ns >= now_ns,
            CALL_TIMEOUT_S,
        )
        self._call("restart")
        return True


def make(
    args: Mapping[str, Any], name: str, source: str, overrides: Mapping[str, str]
) -> Ros2Robot:
    """Build the robot; called by ``robots.factory``, which describes the arguments."""
    config = parse_config(Ros2Config, args, source=source, overrides=overrides)
    return Ros2Robot(config, name=name, source=source)
