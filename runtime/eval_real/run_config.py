"""The configurations of an evaluation on a robot: the command line's and its processes'."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from policies.execution import Execution
from policies.flag_builder import Flag, Group
from policies.number_ranges import (
    COUNT,
    DURATION_S,
    POSITIVE,
    RATE_HZ,
    TICKS,
    Choice,
    Range,
    check_ranges,
)
from policies.types import PolicyContract
from policies.yaml_config import as_plain, parse_config
from robots.base import ANGLES, ActionKind, ActionSpec, Robot
from robots.errors import ConfigError
from robots.factory import make_robot
from robots.joint_limits import JointLimits
from runtime.control.blending import Strategy
from runtime.control.command_stream import CommandStream
from runtime.control.interpolation import control_ratio
from runtime.control.realtime import UNPRIVILEGED, RealtimeOptions
from runtime.control.strategy_selection import (
    ActionManager,
    ActionSteps,
    EnsembleStride,
    ManagerCoef,
    strategy_of,
)
from runtime.datasets.options import DatasetOptions
from runtime.eval_real.motion_state_machine import MotionStateMachine
from runtime.eval_real.shared_state import Dims
from runtime.live_view.options import LiveViewOptions
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.connection import ConnectionOptions
from runtime.options.model_name import Model, read_model_name
from runtime.options.shared_flags import Fps, LogLevel, TraceFile
from runtime.options.upstream import UpstreamOptions

MOST_SEEDS = 2**24
"""A seed is sent to the control process in 24 bits."""
ROS_DISCOVERY = Choice(("localhost", "subnet"))
SEEDS, PRIORITY, VIDEO_FPS = Range(0, MOST_SEEDS - 1), Range(0, 99), Range(0, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRealConfig:
    """An evaluation on a robot, as the command line describes it.

    Attributes:
        overrides: Values of ``--robot.KEY``, as YAML text by key.
        fps: Policy ticks per second, in place of the checkpoint's. It is applied to the contract of
            a local or a served policy; therefore ``checkpoint`` has no such flag.

    Raises:
        ValueError: A value is out of range.
    """

    model_name_or_path: Annotated[
        str,
        Flag(
            "server HOST:PORT; a checkpoint folder, hf:ORG/NAME@REVISION, python:MODULE:FACTORY, "
            "openpi://HOST:PORT or groot://HOST:PORT starts a server",
            "-m",
        ),
    ] = "127.0.0.1:5000"
    robot: Annotated[
        str, Flag("name under configs/robot, or a YAML file", "-c", name="robot_config")
    ]
    overrides: Mapping[str, str] = field(default_factory=dict)
    task: Annotated[str, Flag("name under configs/task, or a YAML file")] = "sim_transfer_cube"
    publish_rate: Annotated[
        float | None, RATE_HZ, Flag("commands to the robot per second", default="the policy's rate")
    ] = None
    sensing_rate: Annotated[
        float | None,
        RATE_HZ,
        Flag("reads of the robot's sensors per second", default="the policy's rate"),
    ] = None
    num_rollout: Annotated[int, COUNT, Flag("number of rollouts", "-n")] = 1
    max_timesteps: Annotated[
        int | None, TICKS, Flag("largest number of policy ticks in a rollout", default="the task's")
    ] = None
    action_manager: ActionManager = None
    manager_coef: ManagerCoef = None
    n_action_steps: ActionSteps = None
    ensemble_stride: EnsembleStride = None
    save_dir: Annotated[str, Flag("folder for results", "-o")] = "results"
    seed: Annotated[
        int,
        SEEDS,
        Flag("seed of the first rollout, for robots that take one; each next is 1 higher", "-s"),
    ] = 0
    yes: Annotated[bool, Flag("start without waiting for Enter; a fault ends the run")] = False
    connection: ConnectionOptions = field(default_factory=ConnectionOptions)
    near: Annotated[
        float | None,
        POSITIVE,
        Flag(
            "largest distance of the policy's first action from the arm, in each joint's unit",
            default="0.1 rad or 5.7 deg; other units: a twentieth of the joint's range, a tenth of "
            "a gripper's",
        ),
    ] = None
    same_joints: Annotated[
        bool, Flag("accept joint names that differ between policy and robot")
    ] = False
    fault_after_s: Annotated[
        float,
        DURATION_S,
        Flag(
            "seconds without a new chunk, after the arm has slowed down, until a fault is latched"
        ),
    ] = 1.0
    max_chunk_age_s: Annotated[
        float | None,
        DURATION_S,
        Flag(
            "largest age of the observation that a command is based on, in seconds; beyond it the "
            "arm stops",
            default="the chunk's length and 1 s",
        ),
    ] = None
    max_sensing_age_s: Annotated[
        float,
        DURATION_S,
        Flag("largest age of the newest image and of the sensing process' heartbeat, in seconds"),
    ] = 0.5
    connect_timeout_s: Annotated[
        float,
        DURATION_S,
        Flag("seconds to connect to the robot and to get its sensors' first data"),
    ] = 15.0
    ros_discovery: Annotated[
        str | None,
        ROS_DISCOVERY,
        Flag("where a ros2 robot's nodes are looked for", default="localhost"),
    ] = None
    priority: Annotated[
        int,
        PRIORITY,
        Flag("SCHED_FIFO priority of the control loop and its watchdog", default="none"),
    ] = 0
    video_fps: Annotated[float, VIDEO_FPS, Flag("frames per second of videos; 0: no video")] = 10.0
    recording: DatasetOptions = field(default_factory=DatasetOptions)
    live_view: LiveViewOptions = field(default_factory=LiveViewOptions)
    trace: TraceFile = None
    fps: Fps = None
    checkpoint: Annotated[CheckpointOptions, Group("checkpoint options", without=("fps",))] = field(
        default_factory=CheckpointOptions
    )
    upstream: Annotated[UpstreamOptions, Group("another system's server")] = field(
        default_factory=UpstreamOptions
    )
    log_level: LogLevel = "WARNING"

    def __post_init__(self) -> None:
        check_ranges(self)
        Range(0, MOST_SEEDS - self.num_rollout).require("--seed", self.seed)

    @property
    def model(self) -> Model:
        """What ``model_name_or_path`` names. Raises ``ModelNameError``."""
        return read_model_name(self.model_name_or_path, fixed_revision=True)

    @property
    def seeds(self) -> range:
        """The seed of each rollout."""
        return range(self.seed, self.seed + self.num_rollout)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(EvalRealConfig):
    """``EvalRealConfig`` with every option decided; each process gets it as a line of JSON.

    The rates, the strategy and the lengths that the user left open come from the policy's contract
    and the task.

    Attributes:
        contract_json: The policy's contract, as its server sent it.
        address: The policy server's address.
        language: The task's instruction in words.
        execution_source: What chose the strategy: a flag, the checkpoint, or the default.
        weights_hash: Of the policy's weights, as its server said it; empty for none.
        max_latency_ms: Latency up to which the checkpoint's strategy was measured to hold; None
            if it was not, or another is used.
    """

    contract_json: str
    address: str
    language: str = ""
    action_manager: str = "sequential"
    execution_source: str = ""
    weights_hash: str = ""
    max_latency_ms: float | None = None
    publish_rate: float = 50.0
    sensing_rate: float = 50.0
    max_timesteps: int = 400
    max_chunk_age_s: float = 5.0

    def to_json(self) -> str:
        """Return the configuration as one line of JSON."""
        return json.dumps(as_plain(self))

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Read what ``to_json`` returned. Raises ``InvalidConfig``."""
        return parse_config(cls, json.loads(text), source="run configuration")

    @property
    def served_contract(self) -> PolicyContract:
        """The contract as the server sent it; a later session's contract must equal it."""
        return PolicyContract.from_json(self.contract_json)

    @property
    def contract(self) -> PolicyContract:
        """The contract at the rate used, which ``fps`` may override."""
        return self.served_contract.at_rate(self.fps)

    @property
    def execution(self) -> Execution:
        """How chunks are executed, and what chose it."""
        return Execution(
            self.action_manager,
            self.manager_coef,
            self.n_action_steps,
            self.execution_source,
            self.max_latency_ms,
        )

    @property
    def ratio(self) -> int:
        """Control ticks per policy tick.

        Raises:
            ValueError: The publish rate is not an integer multiple of the policy's.
        """
        return control_ratio(1 / self.contract.dt_s, self.publish_rate)

    @property
    def period_s(self) -> float:
        """Seconds from one command to the next."""
        return self.contract.dt_s / self.ratio

    def demand(self) -> dict[str, Any]:
        """Return the session's deadline and rate, as keyword arguments of ``PolicyClient``.

        A reply later than the chunk is long contains no action that can still be used. A strategy
        that executes one chunk after another needs chunks at a fixed rate; the others do if a flag
        or the checkpoint states the ticks between them.
        """
        contract, strategy = self.contract, self.strategy()
        demand: dict[str, Any] = {"deadline_ms": contract.chunk_size * contract.dt_s * 1e3}
        if strategy.windowed or self.n_action_steps is not None:
            demand["rate_hz"] = 1 / (strategy.stride * contract.dt_s)
        return demand

    @property
    def realtime(self) -> RealtimeOptions:
        """Real-time options of the control and watchdog processes; drivers may start threads."""
        if not self.priority:
            return UNPRIVILEGED
        return RealtimeOptions(priority=self.priority, threads=True)

    def strategy(self) -> Strategy:
        """Return the strategy. Raises ``ValueError``: unknown, or its coefficient out of range."""
        return strategy_of(self.contract, self.execution)

    def make_robot(self) -> Robot:
        """Return the robot, not connected. Raises ``ConfigError``."""
        return make_robot(self.robot, self.overrides)

    def make_state_machine(self, robot_limits: RobotLimits, **options: Any) -> MotionStateMachine:
        """Return the state machine that commands a robot.

        Args:
            robot_limits: The robot's.
            options: Further keyword arguments of ``CommandStream``.

        Raises:
            ValueError: The policy's actions do not fit the robot's.
        """
        contract = self.contract
        stream = CommandStream(
            contract,
            self.strategy(),
            robot_limits.limits,
            actions=robot_limits.actions,
            ratio=self.ratio,
            hold=robot_limits.grippers,
            fault_after_s=self.fault_after_s,
            **options,
        )
        return MotionStateMachine(
            stream,
            max_ticks=self.max_timesteps * self.ratio,
            start_pose=robot_limits.start_pose,
            start_velocity=robot_limits.start_velocity,
            near=(
                default_near(robot_limits)
                if self.near is None
                else np.full(contract.action_dim, float(self.near))
            ),
            actions=robot_limits.actions,
        )

    def dims(self, robot: Robot) -> Dims:
        """Return the sizes of the shared memory between the processes."""
        contract = self.contract
        return Dims(robot.contract.state_dim, contract.action_dim, contract.chunk_size)


@dataclass(frozen=True, slots=True, eq=False)
class RobotLimits:
    """What a ``MotionStateMachine`` needs of a robot; stored with each recording.

    Attributes:
        limits: Position, velocity and acceleration limits of the A actuators.
        start_pose: (A,) float32, in each joint's unit; None if the robot has none.
        start_velocity: (A,) float64, unit per second, for the motion to ``start_pose``.
        actions: Name, kind and unit of each of the A actions.
    """

    limits: JointLimits
    start_pose: NDArray[np.float32] | None
    start_velocity: NDArray[np.float64]
    actions: tuple[ActionSpec, ...]

    @property
    def grippers(self) -> tuple[int, ...]:
        """Indices of the gripper actions, which are not interpolated."""
        return tuple(
            index for index, spec in enumerate(self.actions) if spec.kind is ActionKind.GRIPPER
        )

    @classmethod
    def of(cls, robot: Robot) -> RobotLimits:
        """Return those of ``robot``; its velocity limit where it has no start velocity."""
        given = robot.start_velocity
        return cls(
            robot.limits,
            robot.start_pose,
            robot.limits.velocity if given is None else given,
            robot.contract.actions,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; ``from_dict`` restores every float exactly."""
        return {
            **{f.name: getattr(self.limits, f.name).tolist() for f in fields(JointLimits)},
            "start_pose": None if self.start_pose is None else self.start_pose.tolist(),
            "start_velocity": self.start_velocity.tolist(),
            "actions": [dataclasses.asdict(spec) for spec in self.actions],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> RobotLimits:
        """Read what ``to_dict`` returned. Raises ``KeyError``: a key is missing."""
        pose = raw["start_pose"]
        return cls(
            JointLimits(*(np.array(raw[f.name], np.float64) for f in fields(JointLimits))),
            None if pose is None else np.array(pose, np.float32),
            np.array(raw["start_velocity"], np.float64),
            tuple(
                ActionSpec(spec["name"], ActionKind(spec["kind"]), spec["unit"])
                for spec in raw["actions"]
            ),
        )


NEAR_RAD = 0.1
"""5.7 degrees."""
NEAR_GRIPPER, NEAR_OTHER = 0.1, 0.05
"""Fractions of the range between the position limits."""


def default_near(robot_limits: RobotLimits) -> NDArray[np.float64]:
    """Return the largest distance of a policy's first action from the arm's position.

    0.1 rad for a joint in an angular unit; otherwise a fraction of the range between the position
    limits: a tenth for a gripper, a twentieth for other joints.

    Returns:
        (A,) float64, in each joint's unit.

    Raises:
        ConfigError: A joint in another unit has no position limits.
    """
    near = np.zeros(len(robot_limits.actions))
    spans = robot_limits.limits.position_upper - robot_limits.limits.position_lower
    for index, spec in enumerate(robot_limits.actions):
        if spec.unit in ANGLES and spec.kind is not ActionKind.GRIPPER:
            near[index] = NEAR_RAD / ANGLES[spec.unit]
        else:
            near[index] = spans[index] * (
                NEAR_GRIPPER if spec.kind is ActionKind.GRIPPER else NEAR_OTHER
            )
        if spec.kind.holds_position and not np.isfinite(near[index]):
            raise ConfigError(
                f"joint {index} ({spec.name}, {spec.unit}): got no position limits, expected both, "
                "or --near: the largest distance of the first action follows from one of them"
            )
    return near
