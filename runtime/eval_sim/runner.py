"""Many episodes, in one process or several side by side, the same episodes either way.

Episode i has seed ``seed + i``, whichever process runs it. A process that fails ends the
evaluation; what was finished by then has been handed over already.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from envs.errors import EnvError
from envs.factory import make_world
from envs.gl_context import why_not
from envs.world import World
from policies.errors import PolicyError
from policies.execution import Assumption, Execution
from policies.types import PolicyContract, RolloutPolicy
from policies.yaml_config import InvalidConfig
from runtime.client.policy_client import PolicyClient
from runtime.control.chunk_executor import ChunkExecutor
from runtime.control.strategy_options import choose_execution, strategy_of
from runtime.errors import RequestTimeout, RuntimeFault, ServerBusy, ServerLost
from runtime.eval_sim.episode import OnTick, run_lockstep, run_realtime
from runtime.eval_sim.episode_video import EpisodeVideo
from runtime.eval_sim.in_process_policy import InProcessPolicy
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.eval_sim.worker_processes import WorkerFailed, in_processes
from runtime.eval_sim.world_compatibility import check_world
from runtime.evaluation.episode_result import Episode
from runtime.options.model import LocalModel
from runtime.server.server_process import ServerProcess
from runtime.trace import recorder as trace
from transport.errors import TransportError

logger = logging.getLogger(__name__)

EXPECTED_FAILURES = (InvalidConfig, EnvError, PolicyError, RuntimeFault, TransportError, ValueError)
"""What a user can act on: reported by message alone, without a traceback."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the episodes ran with, known once the policy and the world are there.

    Attributes:
        contract_json: The policy's, at the rate that it is played at.
        execution: How it is played; fields of ``Execution``.
        assumed: What neither the checkpoint nor the user nor the world says, one line each.
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


Report = Setting | Episode
RunEpisode = Callable[[World, ChunkExecutor, int, OnTick | None], Episode]
"""Plays one policy, in lockstep or in real time: world, executor, seed, what to do every tick."""


def run(plan: EvalSimConfig) -> Iterator[Report]:
    """Run the plan: one ``Setting`` first, then every ``Episode`` as it ends.

    Raises:
        WorkerFailed: Nothing more will come.
    """
    with contextlib.ExitStack() as stack:
        if plan.realtime and isinstance(plan.model, LocalModel):
            flags = ["-m", plan.model.name, *plan.checkpoint.flags()]
            if plan.trace is not None:
                flags += ["--trace", str(trace.sibling(plan.trace, "server"))]
            child = stack.enter_context(ServerProcess(flags))
            plan = dataclasses.replace(plan, model_name_or_path=child.address)
        evaluate = functools.partial(_guarded, plan)
        if plan.num_envs == 1:
            yield from evaluate(plan.seeds)
            return
        told = False
        reports = in_processes(evaluate, plan.seeds, plan.num_envs, plan.trace)
        for report in stack.enter_context(contextlib.closing(reports)):
            if not (told and isinstance(report, Setting)):  # every process has the same one
                yield report
            told = True


def _guarded(plan: EvalSimConfig, seeds: tuple[int, ...]) -> Iterator[Report]:
    try:
        yield from _episodes(plan, seeds)
    except (ServerLost, ServerBusy, RequestTimeout) as error:
        raise WorkerFailed(str(error), bad_input=False) from error
    except EXPECTED_FAILURES as error:
        raise WorkerFailed(str(error), bad_input=True) from error


def _episodes(plan: EvalSimConfig, seeds: tuple[int, ...]) -> Iterator[Report]:
    if plan.env.kind != "fake":
        why_not()  # before anybody's policy imports mujoco; the world says it if it matters
    with contextlib.ExitStack() as stack:
        policy, run_episode = _policy(plan)
        stack.enter_context(contextlib.closing(policy))
        contract = _contract(plan, policy.contract)
        world = stack.enter_context(
            contextlib.closing(
                make_world(plan.env, cameras=contract.cameras, rendering=contract.rendering)
            )
        )
        check_world(world, policy, contract)
        execution = choose_execution(
            contract, plan.action_manager, plan.manager_coef, plan.n_action_steps
        )
        executor = ChunkExecutor(contract, strategy_of(contract, execution))
        yield _setting(plan, world, policy, contract, execution)
        for seed in seeds:
            yield _one(plan, world, run_episode, executor, seed)


def _policy(plan: EvalSimConfig) -> tuple[RolloutPolicy, RunEpisode]:
    """The policy, wherever it runs, and what plays it. ``run`` gives a real-time plan a server."""
    if isinstance(plan.model, LocalModel):
        policy = InProcessPolicy(plan.checkpoint.load(plan.model.name))
        return policy, functools.partial(run_lockstep, policy)
    client = PolicyClient(
        str(plan.model), deterministic=not plan.realtime, **plan.connection.keywords()
    )
    if plan.realtime:
        return client, functools.partial(run_realtime, client)
    return client, functools.partial(run_lockstep, client)


def _contract(plan: EvalSimConfig, contract: PolicyContract) -> PolicyContract:
    """The policy's, at the rate that it is played at."""
    unknown = sorted(set(plan.camera_map) - set(contract.camera_names))
    if unknown:
        raise ValueError(
            f"--camera_map: got {unknown}, expected some of {list(contract.camera_names)}"
        )
    return contract.at_rate(plan.fps)


def _one(
    plan: EvalSimConfig, world: World, run_episode: RunEpisode, executor: ChunkExecutor, seed: int
) -> Episode:
    video = None
    if seed - plan.seed < plan.videos:
        video = EpisodeVideo(world)
    with trace.span("episode", seed):
        episode = run_episode(world, executor, seed, video.note if video else None)
    if video:
        outcome = "success" if episode.success else "failure"
        try:
            video.write(plan.video_dir / f"seed{seed}_{outcome}")
        except OSError as error:  # a full disk costs the video, not the episode
            logger.warning("no video of seed %d: %s", seed, error)
    return episode


def _setting(
    plan: EvalSimConfig,
    world: World,
    policy: RolloutPolicy,
    contract: PolicyContract,
    execution: Execution,
) -> Setting:
    info = policy.info
    return Setting(
        contract_json=contract.to_json(),
        execution=dataclasses.asdict(execution),
        assumed=_assumed(plan, world, contract),
        policy_info={name: getattr(info, name) for name in type(info).__slots__},
        transport=policy.transport,
        transport_reason=policy.transport_reason,
        pictures=policy.pictures,
        deterministic=not plan.realtime and policy.deterministic,
        world=world.info(),
    )


def _assumed(plan: EvalSimConfig, world: World, contract: PolicyContract) -> tuple[str, ...]:
    lines = [str(assumption) for assumption in contract.assumed]
    env, info = plan.env, world.info()
    rendered = "shadows" in info and "msaa" in info
    if rendered and contract.rendering is None and None in (env.shadows, env.msaa):
        how = f"shadows {str(info['shadows']).lower()}, msaa {info['msaa']}"
        lines.append(str(Assumption("rendering", how, "--env.shadows, --env.msaa")))
    return (*lines, *info.get("assumed", ()))
