"""``lerobot:<type>``: any robot that LeRobot supports. Needs the package ``lerobot``.

A LeRobot robot is a bus and cameras that only one process can open: the owner process,
``robots.lerobot_owner_process``, which ``companion`` runs. All other processes attach to it. So a
process that dies or takes over never connects, configures or calibrates the device. ``connect``
outside ``companion`` starts its own owner process, which ends with the connection.

LeRobot is imported only in child processes, so its prompts, output and waiting do not block the
callers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.yaml_config import parse_config
from robots.base import ActionKind, ActionSpec, RobotContract
from robots.command_delivery import UNCOMMANDED_S
from robots.companion_launcher import start_companion
from robots.errors import ConfigError, RobotError
from robots.lerobot_config import STOPS_ALONE_S, Description, LeRobotConfig, action_specs
from robots.owned_robot import OwnedRobot
from transport.child_process import ChildProcess

IMPORT_TIMEOUT_S = 180.0
"""For importing LeRobot, which imports torch: seconds, or minutes on a loaded machine."""


class LeRobotRobot(OwnedRobot):
    """One process's connection to a LeRobot robot; see the module.

    The robot holds its positions when the connection ends; see docs/lerobot-robots.md.

    Args:
        config: The configuration.
        name: The robot's name in results.
        source: Where the configuration comes from, for errors.

    Raises:
        ConfigError: LeRobot is not installed, has no such robot or rejects its arguments; an action
            feature is not understood; limits do not fit the action features.
    """

    owner_name = "the process that owns LeRobot's robot"

    def __init__(self, config: LeRobotConfig, *, name: str, source: str = "") -> None:
        if not config.description:
            config = dataclasses.replace(config, description=describe(config, source))
        self.config = config
        self._source = source
        description = Description.from_json(config.description)
        if not description.actions:
            raise ConfigError(
                f"{source}: lerobot:{config.type}: got no action features, expected at least one"
            )
        self._actions = description.actions
        specs = action_specs(config, description, source)
        limits = config.limits.of(description.actions, source)
        stops_alone_s = config.stops_alone_after_s
        contract = RobotContract(
            joint_names=description.states,
            actions=specs,
            cameras={
                policy_name: description.pictures[lerobot_name]
                for policy_name, lerobot_name in chosen_cameras(config, description, source).items()
            },
            # The owner stops velocities that have no command for UNCOMMANDED_S.
            control_hz=(2 / UNCOMMANDED_S if _has_velocities(specs) else 1.0, config.max_hz),
            stops_alone_after_s=(
                STOPS_ALONE_S.get(config.type) if stops_alone_s is None else stops_alone_s
            ),
            repeats_pictures=config.repeats_pictures,
        )
        super().__init__(name, contract, limits)
        self._start_pose = self._checked_start_pose()

    @property
    def address(self) -> str | None:
        """Of a running owner process; None: none is known."""
        return self.config.address

    @property
    def start_pose(self) -> NDArray[np.float32] | None:
        """(A,) float32, as configured; None: the current pose."""
        return None if self._start_pose is None else self._start_pose.copy()

    @property
    def sensor_timeout_s(self) -> float:
        """As configured, seconds."""
        return self.config.sensor_timeout_s

    @property
    def _overrides(self) -> Mapping[str, str]:
        return {"description": self.config.description}

    def _set_address(self, address: str | None) -> None:
        self.config = dataclasses.replace(self.config, address=address)

    def _start_owner(self) -> ChildProcess:
        return start_companion(
            "robots.lerobot_owner_process",
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


def _has_velocities(specs: Sequence[ActionSpec]) -> bool:
    return any(spec.kind is ActionKind.VELOCITY for spec in specs)


def describe(config: LeRobotConfig, source: str) -> str:
    """Get LeRobot's description of the robot from a child process, as JSON of ``Description``.

    Raises:
        ConfigError: As ``LeRobotRobot``.
    """
    try:
        with start_companion(
            "robots.lerobot_owner_process",
            ["--describe", "--config", config.to_json()],
            ready_within_s=IMPORT_TIMEOUT_S + 10.0,
            name=f"{source}: lerobot:{config.type}",
        ) as child:
            return json.dumps(child.ready["description"])
    except ConfigError:
        raise
    except RobotError as error:
        raise ConfigError(str(error)) from error


def chosen_cameras(config: LeRobotConfig, description: Description, source: str) -> dict[str, str]:
    """The policy's camera name to LeRobot's camera name.

    Raises:
        ConfigError: LeRobot's robot has no such camera.
    """
    if config.cameras is None:
        return {name: name for name in description.pictures}
    unknown = sorted(set(config.cameras.values()) - set(description.pictures))
    if unknown:
        raise ConfigError(
            f"{source}: cameras: got {unknown}, expected some of {list(description.pictures)}"
        )
    return dict(config.cameras)


def make(
    args: Mapping[str, Any], name: str, source: str, overrides: Mapping[str, str]
) -> LeRobotRobot:
    """Build the robot; called by ``robots.factory``, which describes the arguments."""
    config = parse_config(LeRobotConfig, args, source=source, overrides=overrides)
    return LeRobotRobot(config, name=name, source=source)


def _remake(config: LeRobotConfig, name: str, source: str) -> LeRobotRobot:
    return LeRobotRobot(config, name=name, source=source)
