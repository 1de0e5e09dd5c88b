"""Runs the episodes of a queue in the actors of a Ray cluster, which pull one seed at a time."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from runtime.datasets.layout import spool_folder
from runtime.eval_sim.episode_queue import EpisodeQueue
from runtime.eval_sim.fleet_handles import PLACES, ServerHandle, WorkerHandle, first_line
from runtime.eval_sim.reports import (
    EpisodeSpooled,
    FleetStatus,
    FleetWorker,
    Report,
    RunInfo,
    WorkerFailed,
)
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.eval_sim.world_actor import (
    DATASET,
    OUTPUT,
    ActorFailure,
    ActorPlace,
    EpisodeAnswer,
    WorldActor,
)
from runtime.fleet.cluster import check_stamp, live_nodes
from runtime.fleet.folder_transfer import FilePart, IncomingFolder
from runtime.fleet.placement import nearest_server, node_for_server
from runtime.fleet.server_actor import PolicyServerActor, ServerPlace

STARTS = 3
"""Actors that may die one after another before they are ready; then the evaluation ends."""
POLL_S = 0.25
"""How often deadlines and the dataset's recorder are looked at while no actor reports."""
CLOSE_WITHIN_S = 2.0


_Handler = Callable[[Any], Iterator[Report]]
"""Takes what a task returned, or the ``RayError`` that it ended with."""


class FleetWorkers:
    """World actors, each with an ``EpisodeWorker``, and the policy servers that they ask.

    An actor that dies or takes too long for an episode is replaced. An episode counts when its
    result and its files are here; until then it is run again. The loss of a node or of a server is
    not held against the episodes that it interrupts.

    Args:
        ray: The module, connected to a cluster.
        config: The evaluation.
        queue: The episodes.
        server_flags: Command line of the servers; None without ``--servers``.
        timeout_s: For one episode, in seconds.
    """

    def __init__(
        self,
        ray: ModuleType,
        config: EvalSimConfig,
        queue: EpisodeQueue,
        server_flags: list[str] | None,
        timeout_s: float = float("inf"),
    ) -> None:
        self._ray, self._config, self._queue = ray, config, queue
        self._server_flags, self._timeout_s = server_flags, timeout_s
        self._workers: list[WorkerHandle] = []
        self._servers: list[ServerHandle] = []
        self._tasks: dict[Any, tuple[WorkerHandle | ServerHandle, _Handler]] = {}
        self._info: RunInfo | None = None
        self._fruitless = 0
        self._began_s = time.monotonic()
        self._records: list[FleetWorker] = []
        self._workers_lost = self._servers_lost = 0
        self._count = min(config.num_envs, queue.waiting)

    def reports(self) -> Iterator[Report]:
        """Yield one ``RunInfo``, then the reports of each episode together.

        A ``FleetStatus`` follows whenever a worker or a server is ready or lost.

        Raises:
            WorkerFailed: The policy or the world failed, a worker has another policy or world than
                the first one, or no actor starts.
            FleetError: A node that joined the cluster has other sources of this package.
            OSError: A file of an episode cannot be written.
        """
        while not self._queue.empty:
            self._start_missing()
            self._hand_out()
            for ref in self._finished_tasks():
                owner, handle = self._tasks.pop(ref)
                if owner in self._workers or owner in self._servers:  # else it was ended meanwhile
                    yield from handle(self._answer_of(ref))
            now_s = time.monotonic()
            for worker in [one for one in self._workers if one.deadline_s <= now_s]:
                reason = f"the episode took longer than {self._timeout_s:g} s"
                yield from self._lose_worker(worker, reason)

    def close(self) -> None:
        """End all actors; idle workers may first remove their files. Idempotent."""
        closing = [worker.actor.close.remote() for worker in self._workers if not worker.busy]
        if closing:
            self._ray.wait(closing, num_returns=len(closing), timeout=CLOSE_WITHIN_S)
        for actor in [one.actor for one in self._workers] + [one.actor for one in self._servers]:
            self._ray.kill(actor)
        for worker in self._workers:
            if worker.incoming is not None:
                worker.incoming.remove()
        self._workers, self._servers, self._tasks = [], [], {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Tasks

    def _finished_tasks(self) -> list[Any]:
        """Wait until a task ends, for ``POLL_S`` at most; return all that have."""
        refs = list(self._tasks)
        if not refs:
            time.sleep(POLL_S)
            return []
        done, _ = self._ray.wait(refs, num_returns=1, timeout=POLL_S)
        if done and len(refs) > 1:
            done, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        return list(done)

    def _answer_of(self, ref: Any) -> Any:
        """Return what a task returned, or the ``RayError`` that it ended with."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return error

    # Servers

    def _start_missing(self) -> None:
        """Start the servers and the workers that are not there."""
        if self._server_flags is not None:
            while len(self._servers) < (self._config.fleet.servers or 0):
                self._start_server(self._server_flags)
        wanted = min(self._count, self._queue.waiting + self._queue.running)
        while len(self._workers) < wanted:
            self._start_worker()

    def _start_server(self, flags: list[str]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        taken = Counter(server.node_id for server in self._servers)
        gpus = self._config.fleet.server_gpus
        node = node_for_server(live_nodes(self._ray), taken, gpus)
        if node is None:
            raise WorkerFailed(
                f"--servers, --server_gpus: got {gpus:g} for each, expected at most what the nodes "
                f"have beside the {len(self._servers)} servers before it",
                bad_input=not self._servers_lost,
            )
        options = {
            "num_cpus": 0,  # with some, a new server could wait for its own workers' CPUs for ever
            "num_gpus": gpus,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        }
        actor = self._ray.remote(PolicyServerActor).options(**options).remote(flags)
        server = ServerHandle(actor, node.node_id)
        self._servers.append(server)
        self._tasks[actor.start.remote()] = server, lambda a: self._server_started(server, a)

    def _server_started(self, server: ServerHandle, answer: Any) -> Iterator[Report]:
        if isinstance(answer, str):
            raise WorkerFailed(answer, bad_input=True)
        if not isinstance(answer, ServerPlace):
            yield from self._lose_server(server, first_line(answer))
            return
        server.place = answer
        ended = server.actor.wait.remote()
        self._tasks[ended] = server, lambda a: self._lose_server(server, first_line(a))
        yield self._changed(f"policy server ready at {answer.address}")

    def _lose_server(self, server: ServerHandle, reason: str) -> Iterator[Report]:
        """Forget a server; its workers notice by themselves, or get another when they are idle."""
        self._servers.remove(server)
        self._ray.kill(server.actor)
        where = f"at {server.place.address}" if server.place else "that started"
        self._servers_lost += 1
        self._count_fruitless(f"policy server {where}: {reason}")
        yield self._changed(f"lost the policy server {where}: {reason}")

    # Workers

    def _start_worker(self) -> None:
        options = {
            "num_cpus": self._config.fleet.env_cpus,
            "max_restarts": 0,
            "scheduling_strategy": "SPREAD",
        }
        worker = WorkerHandle(self._ray.remote(WorldActor).options(**options).remote(self._config))
        self._workers.append(worker)
        placed = worker.actor.place.remote()
        self._tasks[placed] = worker, lambda a: self._worker_placed(worker, a)

    def _worker_placed(self, worker: WorkerHandle, answer: Any) -> Iterator[Report]:
        if not isinstance(answer, ActorPlace):
            yield from self._lose_worker(worker, first_line(answer))
            return
        check_stamp(answer.address, answer.stamp)  # the node may have joined a moment ago
        worker.place, worker.busy = answer, False
        if self._server_flags is None:
            self._prepare(worker)

    def _prepare(self, worker: WorkerHandle) -> None:
        """Have a worker create its policy and its world, again after it lost its server."""
        worker.busy = True
        place = worker.server.place if worker.server is not None else None
        prepared = worker.actor.prepare.remote(place.address if place is not None else "")
        self._tasks[prepared] = worker, lambda a: self._worker_ready(worker, a)

    def _worker_ready(self, worker: WorkerHandle, answer: Any) -> Iterator[Report]:
        if isinstance(answer, ActorFailure):
            yield from self._fail(worker, answer)
            return
        if not isinstance(answer, RunInfo):
            yield from self._lose_worker(worker, first_line(answer))
            return
        if self._info is None:
            self._info = answer
            yield answer
        answer.require(self._info, "a new worker", but=PLACES)
        worker.info, worker.busy = answer, False
        self._record(worker)
        yield self._changed("")

    def _record(self, worker: WorkerHandle) -> None:
        """Note how a worker reaches its policy, for the result."""
        if worker.place is None or worker.info is None:
            return
        if worker.record is None:
            ready_s = round(time.monotonic() - self._began_s, 3)
            worker.record = FleetWorker(worker.place.address, worker.place.pid, ready_s)
            self._records.append(worker.record)
        server = worker.server.place if worker.server is not None else None
        worker.record.server = server.address if server is not None else worker.record.server
        worker.record.transport = worker.info.transport
        worker.record.transport_reason = worker.info.transport_reason

    def _hand_out(self) -> None:
        """Give every idle worker a server if it needs one, else a seed."""
        for worker in self._workers:
            if worker.busy or self._needs_server(worker):
                continue
            if worker.spool is not None and worker.spool.exists():
                continue  # no worker is more than one episode ahead of the dataset's recorder
            if (seed := self._queue.take()) is not None:
                worker.seed, worker.busy = seed, True
                worker.deadline_s = time.monotonic() + self._timeout_s
                self._tasks[worker.actor.run.remote(seed)] = worker, self._on_answer(worker)

    def _on_answer(self, worker: WorkerHandle) -> _Handler:
        return lambda answer: self._episode_ran(worker, answer)

    def _needs_server(self, worker: WorkerHandle) -> bool:
        """Whether an idle worker cannot run an episode yet; connect it if a server is ready."""
        if self._server_flags is None or worker.place is None:
            return False
        load = Counter(one.server for one in self._workers if one.server is not None)
        ready = {server: server.node_id for server in self._servers if server.place is not None}
        best = nearest_server(worker.place.node_id, ready, load, worker.server)
        if best is None or (best is worker.server and worker.info is not None):
            return best is None
        worker.server, worker.info = best, None
        self._prepare(worker)
        return True

    # Episodes

    def _episode_ran(self, worker: WorkerHandle, answer: Any) -> Iterator[Report]:
        worker.deadline_s = float("inf")  # the rest depends on the network
        if isinstance(answer, ActorFailure):
            yield from self._fail(worker, answer)
        elif not isinstance(answer, EpisodeAnswer):
            yield from self._lose_worker(worker, first_line(answer))
        else:
            worker.answer, worker.parts = answer, list(answer.parts)
            if worker.parts:
                worker.incoming = IncomingFolder(self._config.path.parent)
            yield from self._fetch_next(worker)

    def _fetch_next(self, worker: WorkerHandle) -> Iterator[Report]:
        if not worker.parts:
            yield from self._finish(worker)
            return
        part = worker.parts.pop(0)
        content = worker.actor.read.remote(part)
        self._tasks[content] = worker, lambda a: self._part_arrived(worker, part, a)

    def _part_arrived(self, worker: WorkerHandle, part: FilePart, answer: Any) -> Iterator[Report]:
        if not isinstance(answer, bytes):
            yield from self._lose_worker(worker, first_line(answer))
            return
        if worker.incoming is not None:
            worker.incoming.write(part, answer)
        yield from self._fetch_next(worker)

    def _finish(self, worker: WorkerHandle) -> Iterator[Report]:
        answer, seed = worker.answer, worker.seed
        if answer is None or seed is None:
            raise RuntimeError("finish: got a worker without an episode, expected one with")
        if worker.incoming is not None:
            worker.spool = self._place_files(worker.incoming, seed)
            worker.incoming.remove()
        worker.seed, worker.answer, worker.incoming, worker.busy = None, None, None, False
        self._queue.finish(seed)
        self._fruitless = 0
        if worker.record is not None:
            worker.record.episodes += 1
        yield answer.episode
        if answer.spool and worker.spool is not None:
            yield EpisodeSpooled(worker.spool)

    def _place_files(self, incoming: IncomingFolder, seed: int) -> Path | None:
        """Move an episode's files to where an evaluation on this machine leaves them.

        Returns:
            The folder of its spool, if it has one.
        """
        root, spool = self._config.recording.dataset, None
        for old in self._config.video_dir.glob(f"seed{seed}_*"):
            old.unlink()  # of an earlier evaluation
        for name in incoming.files():
            if name.parts[0] == OUTPUT:
                target = Path(self._config.output_dir).joinpath(*name.parts[1:])
            elif name.parts[0] == DATASET and root is not None:
                spool = spool_folder(root.resolve(), f"seed_{seed}")
                target = spool / name.name
            else:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(incoming.path / name, target)
        return spool

    # Losses

    def _fail(self, worker: WorkerHandle, failure: ActorFailure) -> Iterator[Report]:
        """Connect a worker to another server, if that helps. Raises ``WorkerFailed``."""
        if not failure.server_lost or self._server_flags is None:
            raise WorkerFailed(failure.message, bad_input=failure.bad_input)
        self._give_back(worker)
        worker.server, worker.info, worker.busy = None, None, False
        self._count_fruitless(failure.message)
        yield self._changed(failure.message)

    def _lose_worker(self, worker: WorkerHandle, reason: str) -> Iterator[Report]:
        """End a worker, and hand out its episode again. Raises ``WorkerFailed``."""
        self._workers.remove(worker)
        self._ray.kill(worker.actor)
        where, node_lives = "a worker that started", True
        if worker.place is not None:
            where = f"the worker {worker.place.pid} on {worker.place.address}"
            alive = {node.node_id for node in live_nodes(self._ray)}
            node_lives = worker.place.node_id in alive
        if not node_lives:
            reason = "its node is gone"
        self._workers_lost += 1
        if worker.info is None and node_lives:
            self._count_fruitless(f"{where}: {reason}")
        if not node_lives:
            self._give_back(worker)
        elif worker.seed is not None:
            errored = self._queue.lose(worker.seed, f"{where} was lost: {reason}")
            if errored is not None:
                yield errored
        self._drop_files(worker)
        yield self._changed(f"lost {where}: {reason}")

    def _give_back(self, worker: WorkerHandle) -> None:
        if worker.seed is not None:
            self._queue.give_back(worker.seed)
        worker.seed = None
        self._drop_files(worker)

    def _drop_files(self, worker: WorkerHandle) -> None:
        if worker.incoming is not None:
            worker.incoming.remove()
        worker.incoming, worker.answer, worker.parts = None, None, []

    def _count_fruitless(self, reason: str) -> None:
        """Raise ``WorkerFailed`` if losses follow one another without an episode between them."""
        self._fruitless += 1
        if self._fruitless >= STARTS * max(1, self._count):
            raise WorkerFailed(
                f"{reason}; {self._fruitless} losses without a finished episode between them",
                bad_input=False,
            )

    def _changed(self, event: str) -> FleetStatus:
        return FleetStatus(
            event=event,
            ready=sum(worker.info is not None for worker in self._workers),
            wanted=self._count,
            servers=sum(server.place is not None for server in self._servers),
            workers_lost=self._workers_lost,
            servers_lost=self._servers_lost,
            workers=self._records,
        )
