"""Runs the episodes of an evaluation, in this process or in several worker processes.

An episode depends on its seed alone, so the episodes are the same in either case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from runtime.eval_sim.episode_queue import EpisodeQueue
from runtime.eval_sim.episode_worker import EpisodeWorker
from runtime.eval_sim.reports import Report, RunInfo
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.eval_sim.worker_processes import WorkerProcesses
from runtime.fleet.errors import FleetError
from runtime.options.model_name import LocalModel, ServerAddress
from runtime.options.upstream import UpstreamOptions
from runtime.server.model_loader import model_flags
from runtime.server.server_process import ServerProcess
from runtime.trace import recorder as trace


def run(config: EvalSimConfig, seeds: Sequence[int] | None = None) -> Iterator[Report]:
    """Run the evaluation: yield one ``RunInfo``, then each ``Episode`` when it ends.

    With ``--dataset``, an ``EpisodeSpooled`` follows each ``Episode``. An episode that kills its
    worker process too often is an ``ErroredEpisode``. A process cannot replace itself, so a limit
    of time needs a worker process even for one world.

    Args:
        config: The evaluation.
        seeds: Of the episodes to be run; None for all of ``config``. Without any, only the
            ``RunInfo`` is yielded.

    Raises:
        WorkerFailed: The policy or the world failed, or no process starts; the evaluation has
            ended.
    """
    model = config.model
    with contextlib.ExitStack() as stack:
        if isinstance(model, LocalModel):  # a branch of the hub must be one commit in all processes
            config = dataclasses.replace(config, model_name_or_path=model.name)
        queue = EpisodeQueue(config.seeds if seeds is None else seeds, config.retries)
        if config.fleet.ray is not None and not queue.empty:
            yield from _run_on_ray(config, queue)
            return
        if config.realtime and not isinstance(model, ServerAddress):
            flags = model_flags(model, config.checkpoint, config.upstream)
            if config.trace is not None:
                flags += ["--trace", str(trace.sibling(config.trace, "server"))]
            server = stack.enter_context(ServerProcess(flags))
            config = dataclasses.replace(
                config, model_name_or_path=server.address, upstream=UpstreamOptions()
            )
        if queue.empty or (config.num_envs == 1 and config.episode_timeout_s is None):
            yield from _run_here(config, queue)
            return
        workers = WorkerProcesses(
            functools.partial(EpisodeWorker, config),
            queue,
            config.num_envs,
            config.trace,
            config.episode_timeout_s or math.inf,
        )
        yield from stack.enter_context(workers).reports()


def _run_here(config: EvalSimConfig, queue: EpisodeQueue) -> Iterator[Report]:
    with EpisodeWorker(config) as worker:
        yield worker.info
        while (seed := queue.take()) is not None:
            yield from worker.run(seed)
            queue.finish(seed)


def _run_on_ray(config: EvalSimConfig, queue: EpisodeQueue) -> Iterator[Report]:
    """Run the episodes on a cluster. Raises ``FleetError``: it cannot run them."""
    from runtime.eval_sim.fleet_workers import FleetWorkers
    from runtime.fleet.cluster import connected

    model, fleet, given = config.model, config.fleet, config.model_name_or_path
    flags: list[str] | None = None
    if isinstance(model, LocalModel) and Path(model.name).exists():
        model = LocalModel(str(Path(model.name).resolve()))  # the nodes have other working folders
        config = dataclasses.replace(config, model_name_or_path=model.name)
    if fleet.servers is not None:
        if isinstance(model, ServerAddress):
            raise FleetError(f"--servers: got it with the server {model}, expected a checkpoint")
        flags = model_flags(model, config.checkpoint, config.upstream)
    cpus = min(config.num_envs, queue.waiting) * fleet.env_cpus
    timeout_s = config.episode_timeout_s or math.inf
    with (
        connected(fleet.ray or "", cpus) as ray,
        FleetWorkers(ray, config, queue, flags, timeout_s) as workers,
    ):
        for report in workers.reports():
            if isinstance(report, RunInfo) and report.policy_info["checkpoint"] == str(model):
                named = report.policy_info | {"checkpoint": given}
                report = dataclasses.replace(report, policy_info=named)  # noqa: PLW2901
            yield report
