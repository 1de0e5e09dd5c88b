"""What ``eval_sim.py`` is told, as one value: it is passed on whole and kept with the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from envs.config import EnvConfig
from envs.factory import GYM_PREFIX
from policies.flags import Flag, Group
from policies.number_ranges import COUNT, COUNT_OR_NONE, PROCESSES, SEED, check_ranges
from runtime.control.strategy_options import ActionManager, ActionSteps, ManagerCoef
from runtime.evaluation.results import result_path
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.common import Fps, LogLevel, TraceFile
from runtime.options.connection import ConnectionOptions
from runtime.options.model import LocalModel, ServerAddress, read_model_name


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSimConfig:
    """An evaluation in simulation.

    Attributes:
        env: The world: the configuration that ``env_name`` means, with what ``--env.KEY`` and
            ``--camera_map`` override.
        fps: Overrides the policy's rate. It is applied to the contract, wherever the policy is; so
            ``checkpoint`` has none.

    Raises:
        ValueError: Options that do not go together.
    """

    model_name_or_path: Annotated[
        str, Flag("checkpoint, HOST:PORT or python:MODULE:FACTORY", "-m")
    ] = "127.0.0.1:5000"
    env_name: Annotated[
        str, Flag("name under configs/env, a YAML, or gym:ID", "-e", name="env")
    ] = "aloha"
    env: EnvConfig
    num_rollout: Annotated[int, COUNT, Flag("episodes", "-n")] = 4
    num_envs: Annotated[int, PROCESSES, Flag("processes side by side", "-bs", "--batch_size")] = 1
    output_dir: Annotated[str, Flag("where results go", "-o")] = "results"
    seed: Annotated[int, SEED, Flag("of the first episode; the next has one more", "-s")] = 0
    realtime: Annotated[bool, Flag("by the wall clock, not in lockstep")] = False
    connection: ConnectionOptions = field(default_factory=ConnectionOptions)
    action_manager: ActionManager = None
    manager_coef: ManagerCoef = None
    n_action_steps: ActionSteps = None
    videos: Annotated[int, COUNT_OR_NONE, Flag("record this many of the first episodes")] = 10
    camera_map: Annotated[
        Mapping[str, str],
        Flag("which camera of the world the policy's camera is", metavar="POLICY=WORLD"),
    ] = field(default_factory=dict)
    use_spawn: Annotated[bool, Flag("accepted; processes are always spawned")] = False
    trace: TraceFile = None
    fps: Fps = None
    checkpoint: Annotated[CheckpointOptions, Group("a checkpoint's options", without=("fps",))] = (
        field(default_factory=CheckpointOptions)
    )
    log_level: LogLevel = "WARNING"

    def __post_init__(self) -> None:
        check_ranges(self)
        SEED.require("--seed with --num_rollout", self.seed + self.num_rollout - 1)
        if self.realtime and self.num_envs > 1:
            raise ValueError(
                "--realtime with --num_envs > 1: one world by the wall clock at a time on one "
                "machine"
            )

    @property
    def model(self) -> LocalModel | ServerAddress:
        """Whose policy. Raises ``ModelNameError`` where there is none by that name."""
        return read_model_name(self.model_name_or_path)

    @property
    def seeds(self) -> tuple[int, ...]:
        """One per episode."""
        return tuple(range(self.seed, self.seed + self.num_rollout))

    @property
    def path(self) -> Path:
        """Of the result; what else is written lies beside it."""
        gym = self.env_name.startswith(GYM_PREFIX)
        world = self.env_name if gym else Path(self.env_name).stem
        return result_path(self.output_dir, world, self.env.task)

    @property
    def video_dir(self) -> Path:
        """Where the videos of the first ``videos`` episodes go."""
        return self.path.parent / "video" / self.path.stem
