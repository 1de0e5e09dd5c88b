"""``lerobot:<type>``: any robot of LeRobot's, where that package is installed.

LeRobot's robot is a bus and cameras that one process can open. That process is the owner,
``robots.lerobot_process``, which ``companion`` runs; everybody else attaches to it. So a process
that dies or takes over never connects, configures or calibrates the device. ``connect`` outside
``companion`` starts an owner of its own, which ends with the connection.

LeRobot itself is imported in children alone, where nothing that it asks, prints or waits for holds
anybody up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.yaml_config import parse_config
from robots.attached_robot import AttachedRobot
from robots.base import ActionKind, ActionSpec, RobotContract, Role
from robots.companion import start_companion
from robots.errors import ConfigError, RobotError, RobotLost
from robots.lerobot_config import (
    STOPS_ALONE_S,
    UNCOMMANDED_S,
    Description,
    LeRobotConfig,
    action_specs,
)
from transport.child_process import ChildProcess

IMPORT_TIMEOUT_S = 180.0
"""For LeRobot to be imported, which brings torch: seconds, minutes on a machine under load."""
WHY_WITHIN_S = 0.02
LET_GO_WITHIN_S = 10.0
"""For the owner to see that nobody commands any more, and to bring what moves to rest."""


class LeRobotRobot(AttachedRobot):
    """See the module. Positions are held when it ends; see docs/lerobot-robots.md.

    Args:
        config: Its keys.
        name: What it is called in results.
        source: Where the keys come from, for errors.

    Raises:
        ConfigError: LeRobot is not installed or has no such robot, an argument that it does not
            take, an action feature that is not understood, limits that do not fit them.
    """

    owner = "the process that owns LeRobot's robot"

    def __init__(self, config: LeRobotConfig, *, name: str, source: str = "") -> None:
        if not config.description:
            config = dataclasses.replace(config, description=describe(config, source))
        self.config = config
        self._source = source
        said = Description.from_json(config.description)
        if not said.actions:
            raise ConfigError(f"{source}: lerobot:{config.type}: got no action features")
        self._actions = said.actions
        specs = action_specs(config, said, source)
        limits = config.limits.of(said.actions, source)
        stops_alone_s = config.stops_alone_after_s
        contract = RobotContract(
            joint_names=said.states,
            actions=specs,
            cameras={
                ours: said.pictures[theirs]
                for ours, theirs in chosen_cameras(config, said, source).items()
            },
            # The owner brakes what it takes for uncommanded.
            control_hz=(2 / UNCOMMANDED_S if _has_speeds(specs) else 1.0, config.max_hz),
            stops_alone_after_s=(
                STOPS_ALONE_S.get(config.type) if stops_alone_s is None else stops_alone_s
            ),
            repeats_pictures=config.repeats_pictures,
        )
        super().__init__(name, contract, limits)
        self._start_pose = self._checked_start_pose()
        self._own: ChildProcess | None = None

    @property
    def address(self) -> str | None:
        return self.config.address

    @property
    def start_pose(self) -> NDArray[np.float32] | None:
        return None if self._start_pose is None else self._start_pose.copy()

    @property
    def sensor_timeout_s(self) -> float:
        return self.config.sensor_timeout_s

    @contextlib.contextmanager
    def companion(self) -> Iterator[Mapping[str, str]]:
        """The process that owns the device, for as long as this one lives.

        Raises:
            ConnectFailed: The device cannot be reached; carries the reason.
            SensorLost, ContractViolated: It is not what it says it is.
        """
        found = {"description": self.config.description}
        if self.config.address is not None:
            yield found  # one is running already, somebody else's
            return
        before = self.config
        child = self._start_owner()
        try:
            self.config = dataclasses.replace(before, address=child.ready["address"])
            yield {**found, "address": child.ready["address"]}
        finally:
            self.config = before
            child.close(LET_GO_WITHIN_S)

    def _start_owner(self) -> ChildProcess:
        return start_companion(
            "robots.lerobot_process",
            ["--config", self.config.to_json()],
            ready_within_s=IMPORT_TIMEOUT_S + 2 * self.config.connect_timeout_s,
            name=self.name,
            outlives=True,
        )

    def _checked_start_pose(self) -> NDArray[np.float32] | None:
        if self.config.start_pose is None:
            return None
        pose = np.array(self.config.start_pose, np.float32)
        if pose.shape != (len(self._actions),):
            raise ConfigError(
                f"{self._source}: start_pose: got {len(pose)} numbers, expected "
                f"{len(self._actions)}, one for each of {list(self._actions)}"
            )
        for index in self._limits.violations(pose):
            spec = self.contract.actions[index]
            raise ConfigError(
                f"{self._source}: start_pose: got {pose[index]} for {spec.name} [{spec.unit}], "
                f"expected {self._limits.position_lower[index]} to "
                f"{self._limits.position_upper[index]}, its limits"
            )
        return pose

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self.config, self._name, self._source)

    def _connect(self, role: Role, timeout_s: float) -> None:
        if self.config.address is None:
            self._own = self._start_owner()
            self.config = dataclasses.replace(self.config, address=self._own.ready["address"])
        super()._connect(role, timeout_s)

    def _send_action(self, action: NDArray[np.float32]) -> None:
        link, sensor_memory = self._connected()
        link.send_action(action)
        if sensor_memory.refused_since_ns.load():
            raise RobotLost(f"{self.name}: commands do not reach it{self._why_silent('commands')}")

    def _why_silent(self, name: str) -> str:
        with contextlib.suppress(RobotError):
            # Control asks from within its loop, perhaps because the owner is held up.
            answer = self._connected()[0].call("why", timeout_s=WHY_WITHIN_S, what=name)
            if why := answer.get("why"):
                return f" ({why})"
        return ""

    def _disconnect(self) -> None:
        super()._disconnect()
        if self._own is not None:
            self._own.close(LET_GO_WITHIN_S)
            self._own = None
            self.config = dataclasses.replace(self.config, address=None)


def _has_speeds(specs: Sequence[ActionSpec]) -> bool:
    return any(spec.kind is ActionKind.VELOCITY for spec in specs)


def describe(config: LeRobotConfig, source: str) -> str:
    """What LeRobot says of the robot, as JSON, asked in a process of its own.

    Raises:
        ConfigError: As ``LeRobotRobot``.
    """
    try:
        with start_companion(
            "robots.lerobot_process",
            ["--describe", "--config", config.to_json()],
            ready_within_s=IMPORT_TIMEOUT_S + 10.0,
            name=f"{source}: lerobot:{config.type}",
        ) as child:
            return json.dumps(child.ready["description"])
    except ConfigError:
        raise
    except RobotError as error:
        raise ConfigError(str(error)) from error


def chosen_cameras(config: LeRobotConfig, said: Description, source: str) -> dict[str, str]:
    """The policy's camera name to LeRobot's.

    Raises:
        ConfigError: LeRobot's robot has no such camera.
    """
    if config.cameras is None:
        return {name: name for name in said.pictures}
    unknown = sorted(set(config.cameras.values()) - set(said.pictures))
    if unknown:
        raise ConfigError(
            f"{source}: cameras: got {unknown}, expected some of {list(said.pictures)}"
        )
    return dict(config.cameras)


def make(
    args: Mapping[str, Any], name: str, source: str, overrides: Mapping[str, str]
) -> LeRobotRobot:
    config = parse_config(LeRobotConfig, args, source=source, overrides=overrides)
    return LeRobotRobot(config, name=name, source=source)


def _remake(config: LeRobotConfig, name: str, source: str) -> LeRobotRobot:
    return LeRobotRobot(config, name=name, source=source)
