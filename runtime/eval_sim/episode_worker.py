"""The worker of an evaluation: runs episodes in one process, which has a policy and a world."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

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
from runtime.eval_sim.episode import PolicyObserver, TickObserver, run_lockstep, run_realtime
from runtime.eval_sim.episode_recording import EpisodeRecording, dataset_features
from runtime.eval_sim.episode_video import EpisodeVideo
from runtime.eval_sim.in_process_policy import InProcessPolicy
from runtime.eval_sim.reports import EpisodeReport, EpisodeSpooled, RunInfo, WorkerFailed
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.eval_sim.world_compatibility import check_world
from runtime.evaluation.episode_result import Episode
from runtime.options.model_name import ServerAddress, UpstreamModel
from runtime.server.model_loader import load_model
from runtime.trace import recorder as trace
from transport.errors import TransportError

if TYPE_CHECKING:
    from runtime.eval_sim.live_episodes import LiveEpisodes

logger = logging.getLogger(__name__)

EXPECTED_FAILURES = (InvalidConfig, EnvError, PolicyError, RuntimeFault, TransportError, ValueError)
"""Errors that a user can correct: only the message is shown, without a traceback."""
LOSSES = (ServerLost, ServerBusy, RequestTimeout, DeviceLost, UpstreamLost, RecorderFailed)
"""Something was lost that the evaluation needs; its input is valid."""


class RunEpisode(Protocol):
    """Runs one episode of a given policy, as ``run_lockstep`` and ``run_realtime`` do."""

    def __call__(
        self,
        world: World,
        executor: ChunkExecutor,
        seed: int,
        observers: Sequence[TickObserver],
        *,
        policy_observer: PolicyObserver | None,
    ) -> Episode:
        """Return the result."""
        ...


class EpisodeWorker:
    """A policy, a world and an executor, which run one episode after another.

    An episode depends on its seed alone, not on the worker or its earlier episodes.

    Args:
        config: The evaluation; a model of the hub is one commit, and in real time it is served.

    Attributes:
        info: What the episodes run with; the same in every worker, but for the transport.

    Raises:
        WorkerFailed: The policy or the world cannot be created, or they do not fit.
    """

    def __init__(self, config: EvalSimConfig) -> None:
        self._config = config
        self._recordings = _Recordings(config)
        with contextlib.ExitStack() as stack, _as_worker_failed():
            if config.env.kind != "fake":
                why_not()  # before a policy imports mujoco; the world reports why if it renders
            policy, run_episode = _make_policy(config)
            stack.enter_context(contextlib.closing(policy))
            contract = _played_contract(config, policy.contract)
            self._world = stack.enter_context(
                contextlib.closing(
                    make_world(config.env, cameras=contract.cameras, rendering=contract.rendering)
                )
            )
            check_world(self._world, policy, contract)
            execution = choose_execution(
                contract,
                config.action_manager,
                config.manager_coef,
                config.n_action_steps,
                config.ensemble_stride,
            )
            executor = ChunkExecutor(contract, strategy_of(contract, execution))
            self.info = _run_info(config, self._world, policy, contract, execution)
            self._live: LiveEpisodes | None = None
            if config.live_view.rerun is not None:
                from runtime.eval_sim.live_episodes import LiveEpisodes, start_live_episodes

                view = start_live_episodes(config, self._world, contract, execution, logger.warning)
                self._live = LiveEpisodes(
                    stack.enter_context(view), self._world, realtime=config.realtime
                )
            self._play = functools.partial(
                run_episode, self._world, executor, policy_observer=self._live
            )
            self._open = stack.pop_all()

    def run(self, seed: int) -> Iterator[EpisodeReport]:
        """Run the episode of ``seed``: yield its ``Episode``.

        With ``--dataset``, its ``EpisodeSpooled`` follows. The video, if any, is written before.

        Raises:
            WorkerFailed: Inference failed, something was lost, or the disk is full.
        """
        with _as_worker_failed():
            recording = self._recordings.new()
            yield self._run(seed, recording)
            if recording is not None:
                yield self._recordings.spool(recording, self._world, seed)

    def _run(self, seed: int, recording: EpisodeRecording | None) -> Episode:
        config, live = self._config, self._live
        video = EpisodeVideo(self._world) if seed - config.seed < config.videos else None
        observers = [observer for observer in (video, recording, live) if observer is not None]
        with trace.span("episode", seed):
            if live is not None:
                live.begin(seed)
            episode = self._play(seed, observers)
            if live is not None:
                live.end(episode)
        if video is not None:
            _write_video(video, episode, config.video_dir)
        return episode

    def close(self) -> None:
        """Release the policy and the world. Idempotent."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _as_worker_failed() -> Iterator[None]:
    """Raise the expected errors of the block as ``WorkerFailed``."""
    try:
        yield
    except WorkerFailed:
        raise
    except LOSSES as error:
        raise WorkerFailed(str(error), bad_input=False) from error
    except EXPECTED_FAILURES as error:
        raise WorkerFailed(str(error), bad_input=True) from error


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
        return policy, functools.partial(run_lockstep, policy, dial=config.latency)
    client = PolicyClient(
        str(model), deterministic=not config.realtime, **config.connection.keywords()
    )
    if config.realtime:
        return client, functools.partial(run_realtime, client, dial=config.latency)
    return client, functools.partial(run_lockstep, client, dial=config.latency)


def _played_contract(config: EvalSimConfig, contract: PolicyContract) -> PolicyContract:
    """Return the contract at the rate used. Raises ``ValueError``: an unknown camera is mapped."""
    unknown = sorted(set(config.camera_map) - set(contract.camera_names))
    if unknown:
        raise ValueError(
            f"--camera_map: got {unknown}, expected some of {list(contract.camera_names)}"
        )
    return contract.at_rate(config.fps)


def _write_video(video: EpisodeVideo, episode: Episode, folder: Path) -> None:
    """Write the video; a full disk costs the video, not the episode."""
    outcome = "success" if episode.success else "failure"
    try:
        for other in folder.glob(f"seed{episode.seed}_*"):
            other.unlink()  # of an episode that was interrupted, or of an earlier evaluation
        video.write(folder / f"seed{episode.seed}_{outcome}")
    except OSError as error:
        logger.warning("no video of seed %d: %s", episode.seed, error)


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
