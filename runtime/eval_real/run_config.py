"""What ``eval_real.py`` is told, and what every process of it has to know, as one line of JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from policies.execution import Execution
from policies.flags import Flag, Group
from policies.number_ranges import COUNT, DURATION_S, POSITIVE, RATE_HZ, TICKS, Range, check_ranges
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
from runtime.control.strategy_options import ActionManager, ActionSteps, ManagerCoef, strategy_of
from runtime.eval_real.motion_state_machine import MotionStateMachine
from runtime.eval_real.shared_state import Dims
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.common import Fps, LogLevel, TraceFile
from runtime.options.connection import ConnectionOptions
from runtime.options.model import LocalModel, ServerAddress, read_model_name

MOST_SEEDS = 2**24
"""A seed is told to the control process in 24 bits."""
SEEDS, PRIORITY, VIDEO_FPS = Range(0, MOST_SEEDS - 1), Range(0, 99), Range(0, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRealConfig:
    """An evaluation on a robot, as ``eval_real.py`` is told.

    Attributes:
        overrides: Of the robot's keys: ``--robot.KEY``.
        fps: The policy's rate; it is applied to the contract, wherever the policy is, so that
            ``checkpoint`` has none.

    Raises:
        ValueError: Options that do not go together.
    """

    model_name_or_path: Annotated[
        str,
        Flag("HOST:PORT, or a checkpoint or python:MODULE:FACTORY for a server of our own", "-m"),
    ] = "127.0.0.1:5000"
    robot: Annotated[str, Flag("name under configs/robot, or a YAML", "-c", name="robot_config")]
    overrides: Mapping[str, str] = field(default_factory=dict)
    task: Annotated[str, Flag("name under configs/task")] = "sim_transfer_cube"
    publish_rate: Annotated[
        float | None, RATE_HZ, Flag("commands per second", default="the policy's rate")
    ] = None
    sensing_rate: Annotated[
        float | None,
        RATE_HZ,
        Flag("looks at the cameras per second", default="the policy's rate"),
    ] = None
    num_rollout: Annotated[int, COUNT, Flag("rollouts", "-n")] = 1
    max_timesteps: Annotated[
        int | None, TICKS, Flag("policy ticks per rollout", default="the task's")
    ] = None
    action_manager: ActionManager = None
    manager_coef: ManagerCoef = None
    n_action_steps: ActionSteps = None
    save_dir: Annotated[str, Flag("where results go", "-o")] = "results"
    seed: Annotated[int, SEEDS, Flag("of the first rollout, for robots that take one", "-s")] = 0
    yes: Annotated[bool, Flag("do not wait for Enter; a fault ends the evaluation")] = False
    connection: ConnectionOptions = field(default_factory=ConnectionOptions)
    near: Annotated[
        float | None,
        POSITIVE,
        Flag(
            "how far off the policy may begin, in each joint's unit",
            default="0.1 rad or 5.7 deg; other units: a twentieth of the joint's range, a tenth of "
            "a gripper's",
        ),
    ] = None
    same_joints: Annotated[
        bool, Flag("the policy's joints are the robot's, although their names differ")
    ] = False
    fault_after_s: Annotated[
        float,
        DURATION_S,
        Flag("how long chunks may stay away once the arm slows down; then a fault is latched"),
    ] = 1.0
    max_chunk_age_s: Annotated[
        float | None,
        DURATION_S,
        Flag("of what a command rests on; older, and the arm stops", default="a chunk and 1 s"),
    ] = None
    max_sensing_age_s: Annotated[
        float,
        DURATION_S,
        Flag("of the newest picture, and of the sensing process' own sign of life"),
    ] = 0.5
    connect_timeout_s: Annotated[
        float, DURATION_S, Flag("for the robot to be connected and its sensors to speak")
    ] = 15.0
    priority: Annotated[
        int,
        PRIORITY,
        Flag("SCHED_FIFO priority of the control loop and its watchdog", default="none"),
    ] = 0
    video_fps: Annotated[float, VIDEO_FPS, Flag("pictures per second of videos, 0: none")] = 10.0
    trace: TraceFile = None
    fps: Fps = None
    checkpoint: Annotated[CheckpointOptions, Group("a checkpoint's options", without=("fps",))] = (
        field(default_factory=CheckpointOptions)
    )
    log_level: LogLevel = "WARNING"

    def __post_init__(self) -> None:
        check_ranges(self)
        Range(0, MOST_SEEDS - self.num_rollout).require("--seed", self.seed)

    @property
    def model(self) -> LocalModel | ServerAddress:
        """Whose policy. Raises ``ModelNameError`` where there is none by that name."""
        return read_model_name(self.model_name_or_path)

    @property
    def seeds(self) -> range:
        """One per rollout."""
        return range(self.seed, self.seed + self.num_rollout)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(EvalRealConfig):
    """The same with what the policy's server and the task say; every process gets it, as JSON.

    What the user left open is decided here: the rates, the strategy and the lengths.

    Attributes:
        contract_json: The policy's, as its server describes it.
        address: The policy server's.
        language: The instruction.
        execution_source: Why the strategy is this one.
    """

    contract_json: str
    address: str
    language: str = ""
    action_manager: str = "sequential"
    execution_source: str = ""
    publish_rate: float = 50.0
    sensing_rate: float = 50.0
    max_timesteps: int = 400
    max_chunk_age_s: float = 5.0

    def to_json(self) -> str:
        return json.dumps(as_plain(self))

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        return parse_config(cls, json.loads(text), source="mission")

    @property
    def served_contract(self) -> PolicyContract:
        """As the server has it: what another session's is compared with."""
        return PolicyContract.from_json(self.contract_json)

    @property
    def contract(self) -> PolicyContract:
        """As it is played: at the user's rate."""
        return self.served_contract.at_rate(self.fps)

    @property
    def execution(self) -> Execution:
        """How chunks are played, and why so."""
        return Execution(
            self.action_manager, self.manager_coef, self.n_action_steps, self.execution_source
        )

    @property
    def ratio(self) -> int:
        """Control ticks per policy tick.

        Raises:
            ValueError: The publish rate is no integer multiple of the policy's.
        """
        return control_ratio(1 / self.contract.dt_s, self.publish_rate)

    @property
    def period_s(self) -> float:
        """Between two commands."""
        return self.contract.dt_s / self.ratio

    def demand(self) -> dict[str, Any]:
        """What a server is told of it, as ``PolicyClient`` takes it.

        An answer later than the chunk is long has no action left. A strategy that plays its chunks
        one after another needs them at that rate; the others take what they get.
        """
        contract, strategy = self.contract, self.strategy()
        demand: dict[str, Any] = {"deadline_ms": contract.chunk_size * contract.dt_s * 1e3}
        if strategy.windowed:
            demand["rate_hz"] = 1 / (strategy.stride * contract.dt_s)
        return demand

    @property
    def realtime(self) -> RealtimeOptions:
        """Of the two processes that command the robot, whose driver may have threads."""
        if not self.priority:
            return UNPRIVILEGED
        return RealtimeOptions(priority=self.priority, threads=True)

    def strategy(self) -> Strategy:
        """Raises ``ValueError``: an unknown name, or a coefficient out of range."""
        return strategy_of(self.contract, self.execution)

    def make_robot(self) -> Robot:
        """The robot, not connected."""
        return make_robot(self.robot, self.overrides)

    def make_state_machine(self, robot_limits: RobotLimits, **options: Any) -> MotionStateMachine:
        """What commands ``body``; ``options`` as ``CommandStream`` has them.

        Raises:
            ValueError: The policy's actions are not this robot's.
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
        contract = self.contract
        return Dims(robot.contract.state_dim, contract.action_dim, contract.chunk_size)


@dataclass(frozen=True, slots=True, eq=False)
class RobotLimits:
    """What a pilot has to know of a robot; kept with a recording.

    Attributes:
        limits: Of its A actuators.
        start_pose: (A,) float32, or None.
        start_velocity: (A,) per second, for approaches.
        actions: What each of the A numbers means.
    """

    limits: JointLimits
    start_pose: NDArray[np.float32] | None
    start_velocity: NDArray[np.float64]
    actions: tuple[ActionSpec, ...]

    @property
    def grippers(self) -> tuple[int, ...]:
        """Dimensions that are not interpolated."""
        return tuple(
            index for index, spec in enumerate(self.actions) if spec.kind is ActionKind.GRIPPER
        )

    @classmethod
    def of(cls, robot: Robot) -> RobotLimits:
        given = robot.start_velocity
        return cls(
            robot.limits,
            robot.start_pose,
            robot.limits.velocity if given is None else given,
            robot.contract.actions,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; floats come back as they were."""
        return {
            **{f.name: getattr(self.limits, f.name).tolist() for f in fields(JointLimits)},
            "start_pose": None if self.start_pose is None else self.start_pose.tolist(),
            "start_velocity": self.start_velocity.tolist(),
            "actions": [dataclasses.asdict(spec) for spec in self.actions],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> RobotLimits:
        """What ``to_dict`` gave. Raises ``KeyError`` where something is missing."""
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
"""Of what lies between the position limits."""


def default_near(robot_limits: RobotLimits) -> NDArray[np.float64]:
    """(A,) how far a policy's first action may be from the arm, in each joint's unit.

    0.1 rad where the unit is an angle; else a part of what lies between the joint's limits, a tenth
    for a gripper and a twentieth for other joints.

    Raises:
        ConfigError: A joint whose unit is no angle has no position limits.
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
                "or --near: how far from the arm the policy may begin cannot be told otherwise"
            )
    return near
