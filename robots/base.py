"""What every robot is: ``Robot``, and what its sensors give.

Stamps and clocks: ``stamp_ns`` is the sensor's own clock (a ROS header's, a simulator's) and serves
to pair one robot's frames with its joint states, by differences only. ``received_ns`` is this
host's monotonic clock; ages come from it alone. The two are never subtracted from each other.
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
    """What a process wants of the robot.

    ``CONTROL`` sends commands and reads joints. ``SENSING`` reads cameras, and joints too where the
    robot is ``shareable``. ``BOTH`` is one process that does everything.
    """

    CONTROL = "control"
    SENSING = "sensing"
    BOTH = "both"


ANGLES: Mapping[str, float] = {"rad": 1.0, "deg": math.pi / 180}
"""Units that are angles, in rad."""
ANGLES_MISSPELT = ("degree", "degrees", "°", "radian", "radians", "rads", "degs")


class ActionKind(StrEnum):
    """What a number of a command means: what rest, limits and braking are follows from it."""

    POSITION = "position"  # where a joint shall be; at rest it stays there
    GRIPPER = "gripper"  # as position; steps at the policy's tick, is not interpolated
    VELOCITY = "velocity"  # how fast it shall move; at rest zero
    DELTA = "delta"  # how far to move from here; at rest zero
    EFFORT = "effort"  # a force or torque; there is no rest that holds anything

    @property
    def holds_position(self) -> bool:
        """Whether repeating the last command keeps the robot where it is."""
        return self in (ActionKind.POSITION, ActionKind.GRIPPER)


@dataclass(frozen=True, slots=True)
class ActionSpec:
    """One number of a command.

    Attributes:
        name: A joint's, where its position is commanded.
        kind: See ``ActionKind``.
        unit: Of the number, e.g. ``rad``, ``deg``, ``mm``, ``ticks``, ``m/s``; ``range`` for a
            number without a unit, such as LeRobot's -100 to 100 or a gripper's 0 to 1.
    """

    name: str
    kind: ActionKind = ActionKind.POSITION
    unit: str = "rad"


class JointSample(NamedTuple):
    """One joint state.

    Attributes:
        position: (S,) float32, each in its own unit, in the order of the contract's joints.
        stamp_ns: The sensor's own clock.
        received_ns: Our monotonic clock.
    """

    position: NDArray[np.float32]
    stamp_ns: int
    received_ns: int


class CameraSample(NamedTuple):
    """One picture.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        stamp_ns: The sensor's own clock, the one that stamps joint states too.
        received_ns: Our monotonic clock.
        depth: (H', W') uint16 millimetres or float32 metres; None without a depth camera.
    """

    image: NDArray[np.uint8]
    stamp_ns: int
    received_ns: int
    depth: NDArray[np.uint16] | NDArray[np.float32] | None = None


class Outcome(NamedTuple):
    """How the job stands, where the robot can tell.

    Attributes:
        success: Done at some moment since the reset.
        reward: Highest since the reset.
        steps: Of the robot's own control steps since the reset until success or, without it, now.
    """

    success: bool
    reward: float
    steps: int


@dataclass(frozen=True, slots=True)
class RobotContract:
    """What a robot takes and gives.

    Attributes:
        joint_names: S names, the order of states.
        actions: A dimensions, the order of commands. Those that hold a position (``position`` and
            ``gripper``) are measured too: their names are among ``joint_names``.
        cameras: By the policy's camera name, (height, width).
        ctrl_space, ctrl_type: Of the commands it takes.
        control_hz: Lowest and highest rate at which it takes commands.
        depth_cameras: Of ``cameras``, those with depth.
        stops_alone_after_s: How long after the last command the device itself brings all velocities
            to zero, whatever became of the processes that command it. None: it does not; such a
            robot may not be commanded by velocity.
        repeats_pictures: Whether a working camera may give the same picture again and again, as a
            simulator without noise does. Otherwise that is a frozen camera.

    Raises:
        ContractViolated: Names that are not different, or a position that is not measured.
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
                    f"{list(self.joint_names)}, expected one: where it is has to be known"
                )

    @property
    def state_dim(self) -> int:
        return len(self.joint_names)

    @property
    def action_dim(self) -> int:
        return len(self.actions)

    @property
    def action_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.actions)

    def rest_command(self, state: NDArray[np.float32]) -> NDArray[np.float32]:
        """(A,) float32: the command that keeps the robot as it is in ``state``, (S,).

        Positions and grippers where they are measured; zero for everything that is a rate.
        """
        return rest_command(self.joint_names, self.actions, state)


class Robot(ABC):
    """One robot, seen from one process. Belongs to one thread.

    Subclasses implement the underscored methods; what is public here checks and tracks state, so
    that every driver refuses the same things in the same words. Not connected, a robot can be
    pickled. Several processes each make their own and connect in their own role.

    Args:
        name: What it is called in results.
        contract: What it takes and gives.
        limits: Of the contract's A actuators.
    """

    _role: Role | None = None
    _picture_watch: FrozenImageCheck | None = None

    def __init__(self, name: str, contract: RobotContract, limits: JointLimits) -> None:
        self._name, self._contract, self._limits = name, contract, limits

    @property
    def name(self) -> str:
        """What it is called in results."""
        return self._name

    @property
    def contract(self) -> RobotContract:
        return self._contract

    @property
    def limits(self) -> JointLimits:
        """Of the contract's A actuators."""
        return self._limits

    @property
    def start_pose(self) -> NDArray[np.float32] | None:
        """(A,) float32 inside the limits, where an episode begins; None: wherever it is."""
        return None

    @property
    def start_velocity(self) -> NDArray[np.float64] | None:
        """(A,) per second, the most that the move to the start pose may use. None: the limits."""
        return None

    @property
    def shareable(self) -> bool:
        """Whether two processes may talk to it at once. If not, CONTROL alone reads joints."""
        return True

    @property
    def sensor_timeout_s(self) -> float:
        """After how long without a new picture a camera is lost."""
        return DEFAULT_SENSOR_TIMEOUT_S

    def companion(self) -> AbstractContextManager[Mapping[str, str]]:
        """What the parent process runs beside the robot, e.g. a simulator.

        Yields configuration overrides for ``make_robot`` in the processes that shall use it (their
        way to find it); this object has taken them over already.
        """
        return contextlib.nullcontext({})

    def connect(self, role: Role = Role.BOTH, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Reach the robot and wait until every sensor of ``role`` has spoken. Moves nothing.

        Raises:
            ConnectFailed: It cannot be reached.
            SensorLost: A sensor said nothing within ``timeout_s``; names all that did not.
            ContractViolated: A sensor sends something else than the contract says.
            RobotError: It is connected already.
        """
        if self._role is not None:
            raise RobotError(f"{self.name}: connected already, as {self._role}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: got {timeout_s}, expected a positive number of seconds")
        try:
            self._connect(Role(role), timeout_s)
        except BaseException:
            self._disconnect()
            raise
        self._role = Role(role)
        self._picture_watch = FrozenImageCheck(
            round(self.sensor_timeout_s * 1e9), repeats=self.contract.repeats_pictures
        )

    @property
    def role(self) -> Role | None:
        """What it is connected as; None before ``connect`` and after ``disconnect``."""
        return self._role

    @property
    def reads_joints(self) -> bool:
        """Whether a connection in the present role gives joint states."""
        return self._role is not None and (self.shareable or self._role is not Role.SENSING)

    def get_joints(self) -> JointSample:
        """The newest joint state, at once; its stamp tells whether it is new.

        Raises:
            NotConnected: Or connected in a role without joints.
            SensorLost: The joints have not spoken for the configured time, or their stamps stand
                still or went back (``StampFault``).
            RobotLost: The connection is gone.
        """
        if not self.reads_joints:
            raise self._refusal("get_joints", "control or both, or any where shareable")
        return self._get_joints()

    def get_cameras(self) -> dict[str, CameraSample]:
        """The newest picture of every camera, at once; stamps tell which are new.

        Pictures are the caller's: nothing is written into them afterwards.

        Raises:
            NotConnected, SensorLost, RobotLost: As ``get_joints``. A camera that repeats one
                picture for longer than ``sensor_timeout_s`` is lost too, whatever its stamps say.
        """
        if self._role not in (Role.SENSING, Role.BOTH) or self._picture_watch is None:
            raise self._refusal("get_cameras", "sensing or both")
        cameras = self._get_cameras()
        if missing := [name for name in self.contract.cameras if name not in cameras]:
            raise SensorLost(
                f"{self.name}: got no picture of {missing}, expected all of "
                f"{list(self.contract.cameras)}"
            )
        self._picture_watch.check(self.name, cameras)
        return cameras

    def get_observation(self) -> MetaObs:
        """The newest pictures and the joint state that belongs to the oldest of them, by stamps.

        ``t_capture_ns`` is when the first of all this was received: a joint state takes less time
        to arrive than the picture that it belongs to. ``timestep`` is the caller's to fill in.

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
        """Of the recent joint states, the one whose stamp is nearest to ``stamp_ns``.

        Raises:
            NotConnected, SensorLost, RobotLost: As ``get_joints``.
        """
        if not self.reads_joints:
            raise self._refusal("get_joints_at", "control or both, or any where shareable")
        return self._get_joints_at(stamp_ns)

    def send_action(self, action: NDArray[np.float32]) -> None:
        """Command the actuators. The array is the caller's again afterwards.

        Limits are the caller's business; only what can never be meant is refused.

        Args:
            action: (A,) float32.

        Raises:
            UnsafeCommand: Another shape, or a value that is not finite. Nothing was sent.
            NotConnected: Or connected for sensing.
            RobotLost: It did not leave.
        """
        if self._role not in (Role.CONTROL, Role.BOTH):
            raise self._refusal("send_action", "control or both")
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
        """How the job stands; None where the robot cannot tell. Any role.

        Raises:
            NotConnected, RobotLost: As ``get_joints``.
        """
        if self._role is None:
            raise self._refusal("outcome", "any role")
        return self._outcome()

    def reset(self, seed: int) -> bool:
        """Put arms and objects where an episode with ``seed`` begins. Any role.

        Returns:
            Whether the robot can do that; False means that a person has to.

        Raises:
            NotConnected, RobotLost: As ``get_joints``.
        """
        if self._role is None:
            raise self._refusal("reset", "any role")
        return self._reset(seed)

    def disconnect(self) -> None:
        """Release the robot, which keeps the last command. Idempotent."""
        self._role = None
        self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def _refusal(self, method: str, roles: str) -> NotConnected:
        state = "not connected" if self._role is None else f"connected as {self._role}"
        return NotConnected(f"{self.name}: {method}: {state}, expected to be connected as {roles}")

    @abstractmethod
    def _connect(self, role: Role, timeout_s: float) -> None:
        """As ``connect``; after a failure, ``_disconnect`` is called."""

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
        """Release everything; may be called at any time, and twice."""


def rest_command(
    joint_names: Sequence[str], actions: Sequence[ActionSpec], state: NDArray[np.float32]
) -> NDArray[np.float32]:
    """As ``RobotContract.rest_command``, for who has no contract."""
    command = np.zeros(len(actions), np.float32)
    for index, spec in enumerate(actions):
        if spec.kind.holds_position:
            command[index] = state[joint_names.index(spec.name)]
    return command


def arm_actions(names: Sequence[str], grippers: Collection[int]) -> tuple[ActionSpec, ...]:
    """Joints commanded by position in rad, those at ``grippers`` being grippers without a unit."""
    return tuple(
        ActionSpec(name, ActionKind.GRIPPER, "range") if index in grippers else ActionSpec(name)
        for index, name in enumerate(names)
    )
