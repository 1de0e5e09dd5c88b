"""Many episodes, in one process or several side by side, the same episodes either way.

Episode i has seed ``seed + i``, whichever process runs it. A process that fails ends the
evaluation; what was finished by then has been handed over already.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from envs.config import EnvConfig
from envs.errors import EnvError
from envs.factory import make_world
from envs.gl import why_not
from envs.world import World
from policies.errors import PolicyError
from policies.execution import Assumption, Execution
from policies.types import Policy, PolicyContract
from policies.yaml_config import ConfigError
from runtime.client.policy_client import PolicyClient
from runtime.control.chunk_executor import ChunkExecutor
from runtime.errors import RequestTimeout, RuntimeFault, ServerBusy, ServerLost
from runtime.eval_sim.episode import check_world, run_lockstep, run_realtime
from runtime.evaluation.episode_result import Episode
from runtime.evaluation.video import write_still, write_video
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.connection import ConnectionOptions
from runtime.options.execution import choose_execution, strategy_of
from runtime.options.model import LocalModel, ServerAddress
from runtime.protocol import messages
from runtime.server.server_process import ServerProcess
from runtime.trace import recorder as trace
from transport.address import parse_address
from transport.errors import TransportError
from transport.zeromq.malloc import keep_freed_memory

logger = logging.getLogger(__name__)

EXPECTED_FAILURES = (ConfigError, EnvError, PolicyError, RuntimeFault, TransportError, ValueError)
"""What a user can act on: reported by message alone, without a traceback."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run.

    Attributes:
        model: Whose policy.
        checkpoint: How to load it, if it is one.
        wishes: For a server.
        env: The world.
        seeds: One per episode.
        num_envs: Processes side by side.
        realtime: By the wall clock, or lockstep.
        action_manager, manager_coef, n_action_steps: The user's; see ``choose_execution``.
        camera_names: The policy's cameras that the user mapped; all must be the policy's.
        fps: Overrides the policy's rate, for checkpoints that do not say theirs.
        video_dir: Where videos go, and ``videos``: of how many of the first episodes.
        trace: Where this run is traced; its other processes write beside it.
    """

    model: LocalModel | ServerAddress
    checkpoint: CheckpointOptions
    env: EnvConfig
    seeds: tuple[int, ...]
    num_envs: int = 1
    realtime: bool = False
    action_manager: str | None = None
    manager_coef: float | None = None
    n_action_steps: int | None = None
    camera_names: tuple[str, ...] = ()
    fps: float | None = None
    options: ConnectionOptions = field(default_factory=ConnectionOptions)
    video_dir: Path | None = None
    videos: int = 0
    trace: Path | None = None


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


class WorkerFailed(RuntimeFault):
    """A process could not go on.

    Attributes:
        bad_input: Whether the user asked for what cannot be; else a server or process was lost.
    """

    def __init__(self, message: str, *, bad_input: bool) -> None:
        super().__init__(message)
        self.bad_input = bad_input


@dataclass(frozen=True, slots=True)
class _Failure:
    """A ``WorkerFailed`` on its way between processes."""

    message: str
    bad_input: bool


def run(plan: Plan) -> Iterator[Report]:
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
            plan = dataclasses.replace(plan, model=ServerAddress(*parse_address(child.address)))
        if plan.num_envs == 1:
            yield from _guarded(plan, plan.seeds)
        else:
            yield from _side_by_side(plan)


def _guarded(plan: Plan, seeds: tuple[int, ...]) -> Iterator[Report]:
    try:
        yield from _episodes(plan, seeds)
    except (ServerLost, ServerBusy, RequestTimeout) as error:
        raise WorkerFailed(str(error), bad_input=False) from error
    except EXPECTED_FAILURES as error:
        raise WorkerFailed(str(error), bad_input=True) from error


def _episodes(plan: Plan, seeds: tuple[int, ...]) -> Iterator[Report]:
    with contextlib.ExitStack() as stack:
        if plan.env.kind != "fake":
            why_not()  # before anybody's policy imports mujoco; the world says it if it matters
        policy = stack.enter_context(contextlib.closing(_policy(plan)))
        contract = policy.contract
        unknown = sorted(set(plan.camera_names) - set(contract.camera_names))
        if unknown:
            raise ValueError(
                f"--camera_map: got {unknown}, expected some of {list(contract.camera_names)}"
            )
        contract = contract.at_rate(plan.fps)
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
            yield _one(plan, world, policy, executor, seed)


def _policy(plan: Plan) -> Policy:
    if isinstance(plan.model, ServerAddress):
        return PolicyClient(
            str(plan.model), deterministic=not plan.realtime, **plan.options.keywords()
        )
    return plan.checkpoint.load(plan.model.name)


def _one(plan: Plan, world: World, policy: Policy, executor: ChunkExecutor, seed: int) -> Episode:
    recorder = None
    if plan.video_dir is not None and plan.seeds.index(seed) < plan.videos:
        recorder = _Recorder(world)
    on_tick = recorder.note if recorder else None
    with trace.span("episode", seed):
        if plan.realtime:
            if not isinstance(policy, PolicyClient):
                raise TypeError("run() gives a real-time plan a server")
            episode = run_realtime(world, policy, executor, seed, on_tick)
        else:
            episode = run_lockstep(world, policy, executor, seed, on_tick)
    if recorder and plan.video_dir:
        outcome = "success" if episode.success else "failure"
        try:
            recorder.write(plan.video_dir / f"seed{seed}_{outcome}")
        except OSError as error:  # a full disk costs the video, not the episode
            logger.warning("no video of seed %d: %s", seed, error)
    return episode


class _Recorder:
    """Notes the world's state every other tick and renders afterwards, off the clock."""

    EVERY = 2

    def __init__(self, world: World) -> None:
        self._world = world
        self._snapshots: list[Any] = []
        self._ticks = 0

    def note(self, world: World) -> None:
        if self._ticks % self.EVERY == 0:
            self._snapshots.append(world.snapshot())
        self._ticks += 1

    def write(self, stem: Path) -> None:
        """Write ``stem``.mp4, and ``stem``.png of the last moment: the success, if it is one."""
        moments = [*self._snapshots, self._world.snapshot()]
        frames = (self._world.frame(snapshot) for snapshot in moments)
        write_video(stem.with_suffix(".mp4"), frames, fps=round(1 / self._world.dt_s / self.EVERY))
        write_still(stem.with_suffix(".png"), self._world.frame())


def _setting(
    plan: Plan, world: World, policy: Policy, contract: PolicyContract, execution: Execution
) -> Setting:
    info = policy.info
    lossy = isinstance(policy, PolicyClient) and policy.lossy
    return Setting(
        contract_json=contract.to_json(),
        execution=dataclasses.asdict(execution),
        assumed=_assumed(plan, world, contract),
        policy_info={name: getattr(info, name) for name in type(info).__slots__},
        transport=policy.transport if isinstance(policy, PolicyClient) else "in process",
        transport_reason=(
            policy.transport_reason
            if isinstance(policy, PolicyClient)
            else "-m is a checkpoint: no server is needed"
        ),
        pictures=policy.pictures if isinstance(policy, PolicyClient) else "as they are",
        deterministic=not plan.realtime and messages.is_deterministic(info) and not lossy,
        world=world.info(),
    )


def _assumed(plan: Plan, world: World, contract: PolicyContract) -> tuple[str, ...]:
    lines = [str(assumption) for assumption in contract.assumed]
    env, info = plan.env, world.info()
    rendered = "shadows" in info and "msaa" in info
    if rendered and contract.rendering is None and None in (env.shadows, env.msaa):
        how = f"shadows {str(info['shadows']).lower()}, msaa {info['msaa']}"
        lines.append(str(Assumption("rendering", how, "--env.shadows, --env.msaa")))
    return (*lines, *info.get("assumed", ()))


def _side_by_side(plan: Plan) -> Iterator[Report]:
    """The seeds dealt out to ``num_envs`` spawned processes, reports as they come."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, Any] = {}
    with contextlib.ExitStack() as stack:
        for index in range(min(plan.num_envs, len(plan.seeds))):
            ours, theirs = context.Pipe(duplex=False)
            stack.callback(ours.close)
            process = context.Process(
                target=_work, args=(plan, plan.seeds[index :: plan.num_envs], theirs), daemon=True
            )
            with _ignoring_interrupts():
                process.start()
            theirs.close()
            stack.callback(_end, process)
            workers[ours] = process
        yield from _collect(workers)


def _collect(workers: dict[Connection, Any]) -> Iterator[Report]:
    said = False
    while workers:
        for connection in wait(list(workers)):
            if not isinstance(connection, Connection):
                raise TypeError(f"{connection}")
            try:
                report = connection.recv()
            except EOFError:
                process = workers.pop(connection)
                process.join()
                raise WorkerFailed(
                    f"an evaluation process died (exit status {process.exitcode})",
                    bad_input=False,
                ) from None
            if report is None:
                workers.pop(connection).join()
            elif isinstance(report, _Failure):
                raise WorkerFailed(report.message, bad_input=report.bad_input)
            elif not isinstance(report, Setting) or not said:
                said = said or isinstance(report, Setting)
                yield report


def _work(plan: Plan, seeds: tuple[int, ...], reports: Connection) -> None:
    """A worker process: its reports, then None; or the failure."""
    keep_freed_memory()
    send: Callable[[Any], None] = reports.send
    try:
        with trace.tracing(trace.sibling(plan.trace, f"worker-{os.getpid()}"), "eval_sim worker"):
            for report in _guarded(plan, seeds):
                send(report)
        send(None)
    except WorkerFailed as error:
        with contextlib.suppress(BrokenPipeError):
            send(_Failure(str(error), error.bad_input))
    except BrokenPipeError:
        pass  # whoever wanted the reports is gone


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """What is started meanwhile ignores Ctrl-C: its parent hears it, and ends its children."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(process: Any) -> None:
    if process.is_alive():
        process.terminate()
    process.join()
