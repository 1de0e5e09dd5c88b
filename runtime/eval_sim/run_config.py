"""The configuration of one evaluation in simulation; it is written into the result file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from envs.config import EnvConfig
from envs.factory import GYM_PREFIX
from policies.flag_builder import Flag, Group
from policies.number_ranges import (
    COUNT,
    COUNT_OR_NONE,
    DURATION_S,
    PROCESSES,
    RETRIES,
    SEED,
    check_ranges,
)
from runtime.control.strategy_selection import (
    ActionManager,
    ActionSteps,
    EnsembleStride,
    ManagerCoef,
)
from runtime.datasets.options import DatasetOptions
from runtime.eval_sim.episode_queue import DEFAULT_RETRIES
from runtime.eval_sim.latency_dial import NO_DELAY, LatencyDial
from runtime.evaluation.results import result_path
from runtime.live_view.options import LiveViewOptions
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.connection import ConnectionOptions
from runtime.options.fleet import FleetOptions
from runtime.options.model_name import Model, read_model_name
from runtime.options.shared_flags import Fps, LogLevel, TraceFile
from runtime.options.upstream import UpstreamOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSimConfig:
    """An evaluation in simulation.

    Attributes:
        env: The world's configuration: ``env_name`` with the overrides of ``--env.KEY`` and
            ``--camera_map``.
        fps: Policy ticks per second, in place of the checkpoint's. It is applied to the contract of
            a local or a served policy; therefore ``checkpoint`` has no such flag.

    Raises:
        ValueError: A value is out of range, or two options exclude each other.
    """

    model_name_or_path: Annotated[
        str,
        Flag(
            "checkpoint folder, server HOST:PORT, hf:ORG/NAME[@REVISION], python:MODULE:FACTORY, "
            "openpi://HOST:PORT or groot://HOST:PORT",
            "-m",
        ),
    ] = "127.0.0.1:5000"
    env_name: Annotated[
        str, Flag("name under configs/env, a YAML file, or gym:ID", "-e", name="env")
    ] = "aloha"
    env: EnvConfig
    num_rollout: Annotated[int, COUNT, Flag("number of episodes", "-n")] = 4
    num_envs: Annotated[
        int, PROCESSES, Flag("number of worker processes", "-bs", "--batch_size")
    ] = 1
    output_dir: Annotated[str, Flag("folder for results", "-o")] = "results"
    seed: Annotated[int, SEED, Flag("seed of the first episode; each next is 1 higher", "-s")] = 0
    resume: Annotated[
        bool, Flag("go on where the evaluation of this result stopped; finished episodes are kept")
    ] = False
    retries: Annotated[
        int, RETRIES, Flag("how often an episode that killed its worker process is run again")
    ] = DEFAULT_RETRIES
    episode_timeout_s: Annotated[
        float | None,
        DURATION_S,
        Flag("an episode's worker process is replaced after this long", default="no limit"),
    ] = None
    realtime: Annotated[bool, Flag("run by the wall clock, not in lockstep")] = False
    latency: Annotated[LatencyDial, Group("latency")] = NO_DELAY
    connection: ConnectionOptions = field(default_factory=ConnectionOptions)
    action_manager: ActionManager = None
    manager_coef: ManagerCoef = None
    n_action_steps: ActionSteps = None
    ensemble_stride: EnsembleStride = None
    videos: Annotated[
        int, COUNT_OR_NONE, Flag("number of episodes to record, from the first on")
    ] = 10
    fleet: Annotated[FleetOptions, Group("Ray")] = field(default_factory=FleetOptions)
    recording: DatasetOptions = field(default_factory=DatasetOptions)
    dataset_objects: Annotated[
        bool,
        Flag("with --dataset: also the objects' poses, as observation.environment_state"),
    ] = False
    live_view: LiveViewOptions = field(default_factory=LiveViewOptions)
    camera_map: Annotated[
        Mapping[str, str],
        Flag("the world's camera for a camera of the policy", metavar="POLICY=WORLD"),
    ] = field(default_factory=dict)
    use_spawn: Annotated[bool, Flag("no effect: processes are always spawned")] = False
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
        SEED.require("--seed with --num_rollout", self.seed + self.num_rollout - 1)
        if self.realtime and self.num_envs > 1:
            raise ValueError(
                "--realtime with --num_envs > 1: only one world at a time can run in real time"
            )
        if self.live_view.rerun is not None and self.num_envs > 1:
            raise ValueError("--rerun with --num_envs > 1: only one world at a time can be shown")
        if self.fleet.ray is not None and (
            self.realtime or self.trace is not None or self.live_view.rerun is not None
        ):
            raise ValueError("--ray with --realtime, --trace or --rerun: expected none of them")

    @property
    def model(self) -> Model:
        """What ``model_name_or_path`` names. Raises ``ModelNameError``."""
        return read_model_name(self.model_name_or_path)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each episode."""
        return tuple(range(self.seed, self.seed + self.num_rollout))

    @property
    def path(self) -> Path:
        """The result file; all other output is written beside it."""
        gym = self.env_name.startswith(GYM_PREFIX)
        world = self.env_name if gym else Path(self.env_name).stem
        return result_path(self.output_dir, world, self.env.task)

    @property
    def journal_path(self) -> Path:
        """The journal of the finished episodes, from which ``resume`` goes on."""
        return self.path.with_name(f"{self.path.stem}_episodes.jsonl")

    @property
    def video_dir(self) -> Path:
        """The folder for the videos of the first ``videos`` episodes."""
        return self.path.parent / "video" / self.path.stem
