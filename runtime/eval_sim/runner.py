"""Runs the episodes of an evaluation, in this process or in several worker processes.

Episode i has seed ``seed + i`` in either case, so the episodes are the same. A failed process ends
the evaluation; the episodes finished before are already yielded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.errors import EnvError
from envs.factory import make_world
from envs.gl_context import why_not
from envs.world import World
from policies.errors import DeviceLost, PolicyError, UpstreamLost
from policies.execution import Assumption, Execution
from policies.types import PolicyContract, RolloutPolicy
from policies.yaml_config import InvalidConfig
from runtime.client.policy_client import PolicyClient
from runtime.control.chunk_executor import ChunkExecutor
from runtime.control.strategy_selection import choose_execution, strategy_of
from runtime.datasets.dataset_recorder import wait_recorded
from runtime.datasets.errors import RecorderFailed
from runtime.datasets.layout import spool_folder
from runtime.errors import RequestTimeout, RuntimeFault, ServerBusy, ServerLost
from runtime.eval_sim.episode import TickObserver, run_lockstep, run_realtime
from runtime.eval_sim.episode_recording import EpisodeRecording, dataset_features
from runtime.eval_sim.episode_video import EpisodeVideo
from runtime.eval_sim.in_process_policy import InProcessPolicy
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.eval_sim.worker_processes import WorkerFailed, run_in_processes
from runtime.eval_sim.world_compatibility import check_world
from runtime.evaluation.episode_result import Episode
from runtime.options.model_name import LocalModel, ServerAddress, UpstreamModel
from runtime.options.upstream import UpstreamOptions
from runtime.server.model_loader import load_model, model_flags
from runtime.server.server_process import ServerProcess
from runtime.trace import recorder as trace
from transport.errors import TransportError

logger = logging.getLogger(__name__)

EXPECTED_FAILURES = (InvalidConfig, EnvError, PolicyError, RuntimeFault, TransportError, ValueError)
"""Errors that a user can correct: only the message is shown, without a traceback."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What an evaluation runs with; known once the policy and the world are created.

    Attributes:
        contract_json: The policy's contract, at the rate used.
        execution: The fields of ``Execution``: strategy and its numbers.
        assumed: One line per value that neither checkpoint, user nor world defines.
        policy_info: The fields of ``PolicyInfo``.
        transport, transport_reason: How the policy is reached, and why so.
        pictures: How images are sent to the policy.
        deterministic: Whether the result depends on the seeds alone.
        world: ``World.info()``.
        dataset_features: ``DatasetFeatures`` of the episodes, as JSON; empty without ``--dataset``.
    """

    contract_json: str
    execution: dict[str, Any]
    assumed: tuple[str, ...]
    policy_info: dict[str, Any]
    transport: str
    transport_reason: str
    pictures: str
    deterministic: bool
    world: dict[str, Any]
    dataset_features: str


@dataclass(frozen=True, slots=True)
class EpisodeSpooled:
    """An episode for the dataset.

    Attributes:
        folder: Of the ``SpooledEpisode``, which is complete.
    """

    folder: Path


Report = RunInfo | Episode | EpisodeSpooled
RunEpisode = Callable[[World, ChunkExecutor, int, Sequence[TickObserver]], Episode]
"""Runs one episode of a given policy: (world, executor, seed, observers) to its result."""


def run(config: EvalSimConfig) -> Iterator[Report]:
    """Run the evaluation: yield one ``RunInfo``, then each ``Episode`` when it ends.

    With ``--dataset``, an ``EpisodeSpooled`` follows each ``Episode``.

    Raises:
        WorkerFailed: The policy, the world or a process failed; the evaluation has ended.
    """
    model = config.model
    with contextlib.ExitStack() as stack:
        if isinstance(model, LocalModel):  # a branch of the hub must be one commit in all processes
            config = dataclasses.replace(config, model_name_or_path=model.name)
        if config.realtime and not isinstance(model, ServerAddress):
            flags = model_flags(model, config.checkpoint, config.upstream)
            if config.trace is not None:
                flags += ["--trace", str(trace.sibling(config.trace, "server"))]
            server = stack.enter_context(ServerProcess(flags))
            config = dataclasses.replace(
                config, model_name_or_path=server.address, upstream=UpstreamOptions()
            )
        evaluate = functools.partial(_run_seeds, config)
        if config.num_envs == 1:
            yield from evaluate(config.seeds)
            return
        info_sent = False
        reports = run_in_processes(evaluate, config.seeds, config.num_envs, config.trace)
        for report in stack.enter_context(contextlib.closing(reports)):
            if not (info_sent and isinstance(report, RunInfo)):  # every process has the same one
                yield report
            info_sent = True


def _run_seeds(config: EvalSimConfig, seeds: tuple[int, ...]) -> Iterator[Report]:
    try:
        yield from _evaluate(config, seeds)
    except (
        ServerLost,
        ServerBusy,
        RequestTimeout,
        DeviceLost,
        UpstreamLost,
        RecorderFailed,
    ) as error:
        raise WorkerFailed(str(error), bad_input=False) from error
    except EXPECTED_FAILURES as error:
        raise WorkerFailed(str(error), bad_input=True) from error


def _evaluate(config: EvalSimConfig, seeds: tuple[int, ...]) -> Iterator[Report]:
    if config.env.kind != "fake":
        why_not()  # before a policy imports mujoco; the world reports the reason if it renders
    with contextlib.ExitStack() as stack:
        policy, run_episode = _make_policy(config)
        stack.enter_context(contextlib.closing(policy))
        contract = _played_contract(config, policy.contract)
        world = stack.enter_context(
            contextlib.closing(
                make_world(config.env, cameras=contract.cameras, rendering=contract.rendering)
            )
        )
        check_world(world, policy, contract)
        execution = choose_execution(
            contract, config.action_manager, config.manager_coef, config.n_action_steps
        )
        executor = ChunkExecutor(contract, strategy_of(contract, execution))
        yield _run_info(config, world, policy, contract, execution)
        play = functools.partial(run_episode, world, executor)
        recordings = _Recordings(config)
        for seed in seeds:
            recording = recordings.new()
            yield _run_one(config, world, play, seed, recording)
            if recording is not None:
                yield recordings.spool(recording, world, seed)


class _Recordings:
    """The episodes of one process for the dataset; none without ``--dataset``."""

    def __init__(self, config: EvalSimConfig) -> None:
        self._config, self._root = config, config.recording.dataset
        self._last: Path | None = None

    def new(self) -> EpisodeRecording | None:
        if self._root is None:
            return None
        config = self._config
        return EpisodeRecording(realtime=config.realtime, with_objects=config.dataset_objects)

    def spool(self, recording: EpisodeRecording, world: World, seed: int) -> EpisodeSpooled:
        """Leave an episode for the recorder, once it has taken the one before.

        Raises:
            RecorderFailed: The recorder has ended, or the disk is full.
        """
        if self._last is not None:
            wait_recorded(self._last)
        self._last = spool_folder((self._root or Path()).resolve(), f"seed_{seed}")
        try:
            recording.spool(world, self._last)
        except OSError as error:
            raise RecorderFailed(f"the episode of seed {seed} is not recorded: {error}") from error
        return EpisodeSpooled(self._last)


def _make_policy(config: EvalSimConfig) -> tuple[RolloutPolicy, RunEpisode]:
    """Return the policy, local or served, and the function that runs an episode with it."""
    model = config.model
    if not isinstance(model, ServerAddress):
        policy = InProcessPolicy(
            load_model(model, config.checkpoint, config.upstream),
            upstream=isinstance(model, UpstreamModel),
        )
        return policy, functools.partial(run_lockstep, policy)
    client = PolicyClient(
        str(model), deterministic=not config.realtime, **config.connection.keywords()
    )
    if config.realtime:
        return client, functools.partial(run_realtime, client)
    return client, functools.partial(run_lockstep, client)


def _played_contract(config: EvalSimConfig, contract: PolicyContract) -> PolicyContract:
    """Return the contract at the rate used. Raises ``ValueError``: an unknown camera is mapped."""
    unknown = sorted(set(config.camera_map) - set(contract.camera_names))
    if unknown:
        raise ValueError(
            f"--camera_map: got {unknown}, expected some of {list(contract.camera_names)}"
        )
    return contract.at_rate(config.fps)


def _run_one(
    config: EvalSimConfig,
    world: World,
    play: Callable[[int, Sequence[TickObserver]], Episode],
    seed: int,
    recording: EpisodeRecording | None,
) -> Episode:
    video = None
    if seed - config.seed < config.videos:
        video = EpisodeVideo(world)
    with trace.span("episode", seed):
        observers = [observer for observer in (video, recording) if observer is not None]
        episode = play(seed, observers)
    if video:
        outcome = "success" if episode.success else "failure"
        try:
            video.write(config.video_dir / f"seed{seed}_{outcome}")
        except OSError as error:  # a full disk costs the video, not the episode
            logger.warning("no video of seed %d: %s", seed, error)
    return episode


def _run_info(
    config: EvalSimConfig,
    world: World,
    policy: RolloutPolicy,
    contract: PolicyContract,
    execution: Execution,
) -> RunInfo:
    info = policy.info
    return RunInfo(
        contract_json=contract.to_json(),
        execution=dataclasses.asdict(execution),
        assumed=_assumptions(config, world, contract),
        policy_info={name: getattr(info, name) for name in type(info).__slots__},
        transport=policy.transport,
        transport_reason=policy.transport_reason,
        pictures=policy.pictures,
        deterministic=not config.realtime and policy.deterministic,
        world=world.info(),
        dataset_features=_dataset_features(config, world, contract),
    )


def _dataset_features(config: EvalSimConfig, world: World, contract: PolicyContract) -> str:
    if config.recording.dataset is None:
        return ""
    return dataset_features(
        world,
        contract,
        config.env.kind,
        lossless=config.recording.dataset_lossless,
        with_objects=config.dataset_objects,
    ).to_json()


def _assumptions(config: EvalSimConfig, world: World, contract: PolicyContract) -> tuple[str, ...]:
    lines = [str(assumption) for assumption in contract.assumed]
    env, info = config.env, world.info()
    rendered = "shadows" in info and "msaa" in info
    if rendered and contract.rendering is None and None in (env.shadows, env.msaa):
        how = f"shadows {str(info['shadows']).lower()}, msaa {info['msaa']}"
        lines.append(str(Assumption("rendering", how, "--env.shadows, --env.msaa")))
    return (*lines, *info.get("assumed", ()))
