"""The ``Robot`` interface of a driver, its contract and its sensor samples.

Stamps and clocks: ``stamp_ns`` is the sensor's own clock (a ROS header's, a simulator's). It only
pairs images of one robot with its joint states, by differences. ``received_ns`` is this host's
monotonic clock; ages are computed from it alone. The two are never subtracted from each other.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from policies.types import CtrlSpace, CtrlType, MetaObs
from robots.errors import (
    ContractViolated,
    NotConnected,
    RobotError,
    SensorLost,
    UnsafeCommand,
)
from robots.frozen_image_check import FrozenImageCheck
from robots.joint_limits import JointLimits

DEFAULT_TIMEOUT_S = 10.0
DEFAULT_SENSOR_TIMEOUT_S = 0.5


class Role(StrEnum):
    """What a process uses the robot for.

    ``CONTROL`` sends commands and reads joints. ``SENSING`` reads cameras, and also joints if the
    robot is ``shareable``. ``BOTH`` is one process that does everything.
    """

    CONTROL = "control"
    SENSING = "sensing"
    BOTH = "both"


ANGLES: Mapping[str, float] = {"rad": 1.0, "deg": math.pi / 180}
"""Units of angles: their size in rad."""
ANGLES_MISSPELT = ("degree", "degrees", "°", "radian", "radians", "rads", "degs")


class ActionKind(StrEnum):
    """What one number of a command means. Rest, limits and braking depend on it."""

    POSITION = "position"  # target position of a joint; at rest it is repeated
    GRIPPER = "gripper"  # as position, but not interpolated: steps at the policy's tick
    VELOCITY = "velocity"  # target speed; zero at rest
    DELTA = "delta"  # distance to move from here; zero at rest
    EFFORT = "effort"  # a force or torque; no effort is known to hold a joint at rest

    @property
    def holds_position(self) -> bool:
        """Whether repeating the last command keeps the joint where it is."""
        return self in (ActionKind.POSITION, ActionKind.GRIPPER)


@dataclass(frozen=True, slots=True)
class ActionSpec:
    """One number of a command.

    Attributes:
        name: Name of the number; of a position or gripper command, the joint's name.
        kind: What the number means.
        unit: Unit of the number, e.g. ``rad``, ``deg``, ``mm``, ``ticks``, ``m/s``; ``range`` for a
            number without a unit, such as LeRobot's -100 to 100 or a gripper's 0 to 1.
    """

    name: str
    kind: ActionKind = ActionKind.POSITION
    unit: str = "rad"


class JointSample(NamedTuple):
    """One joint state.

    Attributes:
        position: (S,) float32 in the order of the contract's joints, each in its own unit.
        stamp_ns: The sensor's own clock.
        received_ns: This host's monotonic clock.
    """

    position: NDArray[np.float32]
    stamp_ns: int
    received_ns: int


class CameraSample(NamedTuple):
    """One camera image.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        stamp_ns: The sensor's own clock, which also stamps the joint states.
        received_ns: This host's monotonic clock.
        depth: (H', W') uint16 millimetres or float32 metres; None without a depth camera.
    """

    image: NDArray[np.uint8]
    stamp_ns: int
    received_ns: int
    depth: NDArray[np.uint16] | NDArray[np.float32] | None = None


class Outcome(NamedTuple):
    """State of the task, as reported by a robot that can judge it, e.g. a simulated one.

    Attributes:
        success: Whether the task was done at any time since the reset.
        reward: Highest reward since the reset.
        steps: The robot's own control steps from the reset to success; to now without success.
    """

    success: bool
    reward: float
    steps: int


@dataclass(frozen=True, slots=True)
class RobotContract:
    """The commands that a robot accepts and the observations that it returns.

    Attributes:
        joint_names: S names, in the order of a state.
        actions: A dimensions, in the order of a command. The joints of ``position`` and ``gripper``
            commands are measured too: their names are among ``joint_names``.
        cameras: The policy's camera name to (height, width).
        ctrl_space, ctrl_type: Of the commands.
        control_hz: Lowest and highest command rate.
        depth_cameras: The names in ``cameras`` that also have depth.
        stops_alone_after_s: How long after the last command the device itself sets all velocities
            to zero, even if every process that commands it has died. None: it does not, and such a
            robot may not be commanded by velocity.
        repeats_pictures: Whether a working camera may return identical images, as a simulator
            without noise does. Otherwise a repeated image means a frozen camera.

    Raises:
        ContractViolated: A name appears twice, a unit of an angle is misspelt, or a commanded
            position is not measured.
    """

    joint_names: tuple[str, ...]
    actions: tuple[ActionSpec, ...]
    cameras: Mapping[str, tuple[int, int]]
    ctrl_space: CtrlSpace = "joint"
    ctrl_type: CtrlType = "abs"
    control_hz: tuple[float, float] = (1.0, 1000.0)
    depth_cameras: tuple[str, ...] = field(default=())
    stops_alone_after_s: float | None = None
    repeats_pictures: bool = False

    def __post_init__(self) -> None:
        for what, names in (("joints", self.joint_names), ("actions", self.action_names)):
            if len(set(names)) != len(names):
                raise ContractViolated(f"{what}: got {list(names)}, expected different names")
        for spec in self.actions:
            if spec.unit not in ANGLES and spec.unit.lower() in (*ANGLES, *ANGLES_MISSPELT):
                raise ContractViolated(
                    f"action {spec.name!r}: unit: got {spec.unit!r}, expected one of "
                    f"{list(ANGLES)} for an angle"
                )
            if spec.kind.holds_position and spec.name not in self.joint_names:
                raise ContractViolated(
                    f"action {spec.name!r} ({spec.kind}): got no such joint among "
                    f"{list(self.joint_names)}, expected one: a joint that is commanded by "
                    "position has to be measured"
                )

    @property
    def state_dim(self) -> int:
        """S, the number of measured joints."""
        return len(self.joint_names)

    @property
    def action_dim(self) -> int:
        """A, the number of values in a command."""
        return len(self.actions)

    @property
    def action_names(self) -> tuple[str, ...]:
        """A names, in the order of a command."""
        return tuple(spec.name for spec in self.actions)

    def rest_command(self, state: NDArray[np.float32]) -> NDArray[np.float32]:
        """(A,) float32: the command that keeps the robot where it is in ``state``, (S,).

        Measured values for positions and grippers; zero for velocities, deltas and efforts.
        """
        return rest_command(self.joint_names, self.actions, state)


class Robot(ABC):
    """One process's connection to a robot. To be used by one thread.

    A driver implements the underscored methods. The public methods check arguments and the role, so
    that every driver rejects the same calls with the same messages. A robot that is not connected
    can be pickled. Several processes each create their own object and connect in their own role.

    Args:
        name: The robot's name in results.
        contract: The commands that it accepts and the observations that it returns.
        limits: Limits of the contract's A actuators.
    """

    _role: Role | None = None
    _frozen_image_check: FrozenImageCheck | None = None

    def __init__(self, name: str, contract: RobotContract, limits: JointLimits) -> None:
        self._name, self._contract, self._limits = name, contract, limits

    @property
    def name(self) -> str:
        """The robot's name in results."""
        return self._name

    @property
    def contract(self) -> RobotContract:
        """The commands that it accepts and the observations that it returns."""
        return self._contract

    @property
    def limits(self) -> JointLimits:
        """Limits of the contract's A actuators."""
        return self._limits

    @property
    def start_pose(self) -> NDArray[np.float32] | None:
        """(A,) float32 inside the limits, where an episode begins; None: the current pose."""
        return None

    @property
    def start_velocity(self) -> NDArray[np.float64] | None:
        """(A,) per second: speed limit of the move to the start pose. None: that of ``limits``."""
        return None

    @property
    def shareable(self) -> bool:
        """Whether two processes may be connected at once. If not, only CONTROL reads joints."""
        return True

    @property
    def sensor_timeout_s(self) -> float:
        """A camera without a new image for so long is lost, seconds."""
        return DEFAULT_SENSOR_TIMEOUT_S

    def companion(self) -> AbstractContextManager[Mapping[str, str]]:
        """Run the process that the robot needs beside it, e.g. a simulator.

        Entered by the parent process. Yields configuration overrides with which ``make_robot``
        finds that process in other processes; this object already uses them.
        """
        return contextlib.nullcontext({})

    def connect(self, role: Role = Role.BOTH, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Connect and wait for a sample of every sensor of ``role``. Moves nothing.

        Raises:
            ConnectFailed: The robot cannot be reached.
            SensorLost: A sensor sent nothing within ``timeout_s``; names all such sensors.
            ContractViolated: A sensor sends data that do not fit the contract.
            RobotError: The robot is connected already.
        """
        if self._role is not None:
            raise RobotError(
                f"{self.name}: connected already, as {self._role}; call disconnect() first"
            )
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: got {timeout_s}, expected a positive number of seconds")
        try:
            self._connect(Role(role), timeout_s)
        except BaseException:
            self._disconnect()
            raise
        self._role = Role(role)
        self._frozen_image_check = FrozenImageCheck(
            round(self.sensor_timeout_s * 1e9), repeats=self.contract.repeats_pictures
        )

    @property
    def role(self) -> Role | None:
        """The role of the connection; None before ``connect`` and after ``disconnect``."""
        return self._role

    @property
    def reads_joints(self) -> bool:
        """Whether the present role may read joint states."""
        return self._role is not None and (self.shareable or self._role is not Role.SENSING)

    def get_joints(self) -> JointSample:
        """The newest joint state, without waiting; its stamp shows whether it is new.

        Raises:
            NotConnected: Not connected, or in a role that does not read joints.
            SensorLost: No joint state for the configured time, or its stamps are frozen or went
                back (``StampFault``).
            RobotLost: The connection has ended.
        """
        if not self.reads_joints:
            raise self._wrong_role("get_joints", "control or both, or any where shareable")
        return self._get_joints()

    def get_cameras(self) -> dict[str, CameraSample]:
        """The newest image of every camera, without waiting; stamps show which are new.

        The images belong to the caller: the driver does not write into them afterwards.

        Raises:
            NotConnected, SensorLost, RobotLost: As ``get_joints``. A camera that repeats one
                image for longer than ``sensor_timeout_s`` is lost too, even if its stamps advance.
        """
        if self._role not in (Role.SENSING, Role.BOTH) or self._frozen_image_check is None:
            raise self._wrong_role("get_cameras", "sensing or both")
        cameras = self._get_cameras()
        if missing := [name for name in self.contract.cameras if name not in cameras]:
            raise SensorLost(
                f"{self.name}: got no picture of {missing}, expected all of "
                f"{list(self.contract.cameras)}"
            )
        self._frozen_image_check.check(self.name, cameras)
        return cameras

    def get_observation(self) -> MetaObs:
        """The newest images, and the joint state whose stamp is nearest to the oldest of them.

        ``t_capture_ns`` is when the first of these samples was received: a joint state takes less
        time to arrive than the image that it is paired with. The caller fills in ``timestep``.

        Raises:
            NotConnected, SensorLost, RobotLost: As ``get_joints``.
        """
        cameras = self.get_cameras()
        oldest = min(cameras.values(), key=lambda sample: sample.stamp_ns, default=None)
        joints = self.get_joints() if oldest is None else self.get_joints_at(oldest.stamp_ns)
        received_ns = min([joints.received_ns, *(s.received_ns for s in cameras.values())])
        return MetaObs(
            images={name: sample.image for name, sample in cameras.items()},
            state=joints.position,
            depth={name: s.depth for name, s in cameras.items() if s.depth is not None},
            t_capture_ns=received_ns,
        )

    def get_joints_at(self, stamp_ns: int) -> JointSample:
        """The recent joint state whose stamp is nearest to ``stamp_ns``.

        Raises:
            NotConnected, SensorLost, RobotLost: As ``get_joints``.
        """
        if not self.reads_joints:
            raise self._wrong_role("get_joints_at", "control or both, or any where shareable")
        return self._get_joints_at(stamp_ns)

    def send_action(self, action: NDArray[np.float32]) -> None:
        """Command the actuators. The caller may reuse the array afterwards.

        The caller keeps the limits; only commands that are never valid are rejected here.

        Args:
            action: (A,) float32.

        Raises:
            UnsafeCommand: Wrong shape, or a value that is not finite. Nothing was sent.
            NotConnected: Not connected, or connected for sensing.
            RobotLost: The command could not be sent.
        """
        if self._role not in (Role.CONTROL, Role.BOTH):
            raise self._wrong_role("send_action", "control or both")
        if action.shape != (self.contract.action_dim,):
            raise UnsafeCommand(
                f"action: got shape {action.shape}, expected ({self.contract.action_dim},)"
            )
        if not np.isfinite(action).all():
            index = int(np.flatnonzero(~np.isfinite(action))[0])
            raise UnsafeCommand(
                f"action: got {action[index]} for joint {index} "
                f"({self.contract.action_names[index]}), expected a finite number"
            )
        self._send_action(action)

    def outcome(self) -> Outcome | None:
        """State of the task; None if the robot cannot judge it. Allowed in any role.

        Raises:
            NotConnected, RobotLost: As ``get_joints``.
        """
        if self._role is None:
            raise self._wrong_role("outcome", "any role")
        return self._outcome()

    def reset(self, seed: int) -> bool:
        """Move arms and objects to the start of the episode with ``seed``. Allowed in any role.

        Returns:
            Whether the robot can do that; False: a person has to.

        Raises:
            NotConnected, RobotLost: As ``get_joints``.
        """
        if self._role is None:
            raise self._wrong_role("reset", "any role")
        return self._reset(seed)

    def disconnect(self) -> None:
        """Release the robot, which goes on holding its last command. Idempotent."""
        self._role = None
        self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def _wrong_role(self, method: str, roles: str) -> NotConnected:
        state = "not connected" if self._role is None else f"connected as {self._role}"
        return NotConnected(f"{self.name}: {method}: {state}, expected to be connected as {roles}")

    @abstractmethod
    def _connect(self, role: Role, timeout_s: float) -> None:
        """As ``connect``. If it raises, ``_disconnect`` is called."""

    @abstractmethod
    def _get_joints(self) -> JointSample: ...

    @abstractmethod
    def _get_joints_at(self, stamp_ns: int) -> JointSample: ...

    @abstractmethod
    def _get_cameras(self) -> dict[str, CameraSample]: ...

    @abstractmethod
    def _send_action(self, action: NDArray[np.float32]) -> None: ...

    def _outcome(self) -> Outcome | None:
        return None

    def _reset(self, seed: int) -> bool:
        del seed
        return False

    @abstractmethod
    def _disconnect(self) -> None:
        """Release everything. May be called at any time and repeatedly."""


def rest_command(
    joint_names: Sequence[str], actions: Sequence[ActionSpec], state: NDArray[np.float32]
) -> NDArray[np.float32]:
    """``RobotContract.rest_command`` for callers without a contract."""
    command = np.zeros(len(actions), np.float32)
    for index, spec in enumerate(actions):
        if spec.kind.holds_position:
            command[index] = state[joint_names.index(spec.name)]
    return command


def arm_actions(names: Sequence[str], grippers: Collection[int]) -> tuple[ActionSpec, ...]:
    """Position commands in rad for ``names``; at the indices ``grippers``, unitless grippers."""
    return tuple(
        ActionSpec(name, ActionKind.GRIPPER, "range") if index in grippers else ActionSpec(name)
        for index, name in enumerate(names)
    )
