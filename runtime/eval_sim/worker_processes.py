"""Runs the episodes of a queue in several worker processes, which pull one seed at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Self

from runtime.eval_sim.episode_queue import EpisodeQueue
from runtime.eval_sim.episode_worker import EpisodeWorker
from runtime.eval_sim.reports import EpisodeReport, Report, RunInfo, WorkerFailed
from runtime.trace import recorder as trace
from transport.child_process import die_with_parent
from transport.zeromq.malloc import keep_freed_memory

TRANSPORT = {"transport", "transport_reason"}
"""Fields of ``RunInfo`` that may differ between processes of one machine."""
END_WITHIN_S = 10.0
"""For a process to close its policy and its world once no episode is left."""


@dataclass(frozen=True, slots=True)
class _Finished:
    """A worker has reported everything of its episode."""


_Message = RunInfo | EpisodeReport | _Finished | WorkerFailed


@dataclass(eq=False, slots=True)
class _Worker:
    """A process as its parent sees it.

    Attributes:
        process, connection: As given by ``multiprocessing``.
        ready: Whether it has a policy and a world.
        seed: Of its episode; None if it has none.
        deadline_s: When the episode has to have ended, by the monotonic clock.
        reports: What it has reported of the episode, which counts only as a whole.
    """

    process: SpawnProcess
    connection: Connection[int | None, _Message]
    ready: bool = False
    seed: int | None = None
    deadline_s: float = float("inf")
    reports: list[EpisodeReport] = field(default_factory=list)

    def start(self, seed: int, timeout_s: float) -> None:
        """Send a seed. Raises ``BrokenPipeError``: the process has ended."""
        self.connection.send(seed)
        self.seed, self.reports = seed, []
        self.deadline_s = time.monotonic() + timeout_s

    def end(self) -> None:
        """Kill the process if it runs, and forget it."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class WorkerProcesses:
    """Worker processes, each with an ``EpisodeWorker``.

    A process that dies or takes too long for an episode is replaced. An episode counts when all its
    reports are here; until then it is run again. Processes that die before they are ready end the
    evaluation once there are more in a row than an episode has retries.

    Args:
        make_worker: Called in each process; must be picklable.
        queue: The episodes.
        count: Largest number of processes.
        trace_path: This process' trace file; the workers write theirs beside it. None: no trace.
        timeout_s: For one episode, with its video, in seconds.
    """

    def __init__(
        self,
        make_worker: Callable[[], EpisodeWorker],
        queue: EpisodeQueue,
        count: int,
        trace_path: Path | None,
        timeout_s: float = float("inf"),
    ) -> None:
        self._make_worker, self._queue, self._count = make_worker, queue, count
        self._trace_path, self._timeout_s = trace_path, timeout_s
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._info: RunInfo | None = None
        self._died_at_start = 0

    def reports(self) -> Iterator[Report]:
        """Yield one ``RunInfo``, then the reports of each episode together.

        Raises:
            WorkerFailed: The policy or the world failed, a process has another policy or world than
                the first one, or no process starts.
        """
        while not self._queue.empty:
            self._hand_out()
            connections = [worker.connection for worker in self._workers]
            ready = wait(connections, self._until_next_deadline())
            for worker in [one for one in self._workers if one.connection in ready]:
                yield from self._receive(worker)
            now_s = time.monotonic()
            for worker in [one for one in self._workers if one.deadline_s <= now_s]:
                reason = f"the episode took longer than {self._timeout_s:g} s"
                yield from self._lose(worker, reason)
        self._end_idle()

    def _hand_out(self) -> None:
        """Give every idle worker a seed, and start processes for the other episodes."""
        for worker in self._workers:
            if worker.ready and worker.seed is None and (seed := self._queue.take()) is not None:
                try:
                    worker.start(seed, self._timeout_s)
                except BrokenPipeError:  # it is replaced when its end is received
                    self._queue.give_back(seed)
        while len(self._workers) < self._count and self._queue.waiting > self._starting:
            self._start_process()

    @property
    def _starting(self) -> int:
        return sum(not worker.ready for worker in self._workers)

    def _start_process(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(self._make_worker, self._trace_path, theirs), daemon=True
        )
        with _ignoring_interrupts():
            process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))

    def _until_next_deadline(self) -> float | None:
        deadline_s = min(worker.deadline_s for worker in self._workers)
        return None if deadline_s == float("inf") else max(0.0, deadline_s - time.monotonic())

    def _receive(self, worker: _Worker) -> Iterator[Report]:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            status = worker.process.exitcode
            yield from self._lose(worker, f"an evaluation process died (exit status {status})")
            return
        if isinstance(message, WorkerFailed):
            raise message
        if isinstance(message, RunInfo):
            worker.ready, self._died_at_start = True, 0
            if self._info is None:
                self._info = message
                yield message
            message.require(self._info, "a new process", but=TRANSPORT)
        elif isinstance(message, _Finished):
            yield from self._finish(worker)
        else:
            worker.reports.append(message)
            worker.deadline_s = float("inf")  # the rest waits for the dataset's recorder

    def _finish(self, worker: _Worker) -> Iterator[Report]:
        reports = worker.reports
        if worker.seed is not None:
            self._queue.finish(worker.seed)
        worker.seed = None
        self._hand_out()  # the worker goes on while its reports are written to the disk
        yield from reports

    def _lose(self, worker: _Worker, reason: str) -> Iterator[Report]:
        """End a worker, and hand out its episode again. Raises ``WorkerFailed``."""
        self._workers.remove(worker)
        worker.end()
        if not worker.ready:
            self._died_at_start += 1
            if self._died_at_start > self._queue.retries:
                raise WorkerFailed(
                    f"{reason} before it was ready, the {self._died_at_start}. in a row",
                    bad_input=False,
                )
        elif worker.seed is not None:
            error = self._queue.lose(worker.seed, reason)
            if error is not None:
                yield error

    def _end_idle(self) -> None:
        """Let the processes close what they have, and write their traces."""
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):
                worker.connection.send(None)
        deadline_s = time.monotonic() + END_WITHIN_S
        for worker in self._workers:
            worker.process.join(max(0.0, deadline_s - time.monotonic()))

    def close(self) -> None:
        """Kill the processes that still run. Idempotent."""
        while self._workers:
            self._workers.pop().end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _work(
    make_worker: Callable[[], EpisodeWorker],
    trace_path: Path | None,
    driver: Connection[_Message, int | None],
) -> None:
    """Run in a worker process: send what the episodes report, or a ``WorkerFailed``."""
    keep_freed_memory()
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        die_with_parent(parent.pid)
    try:
        own_trace = trace.sibling(trace_path, f"worker-{os.getpid()}")
        with trace.tracing(own_trace, "eval_sim worker"), make_worker() as worker:
            driver.send(worker.info)
            while (seed := driver.recv()) is not None:
                for report in worker.run(seed):
                    driver.send(report)
                driver.send(_Finished())
    except WorkerFailed as error:
        with contextlib.suppress(BrokenPipeError):
            driver.send(error)
    except (BrokenPipeError, EOFError):
        pass  # the parent process has ended


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Let processes started in this block ignore Ctrl-C: the parent handles it and ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
