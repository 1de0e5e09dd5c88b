"""Runs an evaluation's seeds in several worker processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TypeVar

from runtime.errors import RuntimeFault
from runtime.trace import recorder as trace
from transport.zeromq.malloc import keep_freed_memory

Report = TypeVar("Report")


class WorkerFailed(RuntimeFault):
    """The evaluation cannot continue.

    Attributes:
        bad_input: Whether the user's input is invalid; otherwise a server, a process or the
            policy's device was lost.
    """

    def __init__(self, message: str, *, bad_input: bool) -> None:
        super().__init__(message)
        self.bad_input = bad_input


@dataclass(frozen=True, slots=True)
class _Failure:
    """A ``WorkerFailed`` as it is sent between processes."""

    message: str
    bad_input: bool


def run_in_processes(
    evaluate: Callable[[tuple[int, ...]], Iterator[Report]],
    seeds: tuple[int, ...],
    count: int,
    trace_path: Path | None,
) -> Generator[Report, None, None]:
    """Yield the reports of all workers as they arrive.

    Args:
        evaluate: Called in each process with its share of ``seeds``; yields reports and raises
            ``WorkerFailed``. It and its reports must be picklable.
        seeds: One per episode; worker i gets every ``count``-th, from the i-th on.
        count: Largest number of processes.
        trace_path: This process' trace file; the workers write theirs beside it. None: no trace.

    Raises:
        WorkerFailed: A worker failed or died; the other workers are ended.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection[None, Report | _Failure | None], SpawnProcess] = {}
    with contextlib.ExitStack() as stack:
        for index in range(min(count, len(seeds))):
            receiver, sender = context.Pipe(duplex=False)
            stack.callback(receiver.close)
            share = seeds[index::count]
            process = context.Process(
                target=_work, args=(evaluate, share, trace_path, sender), daemon=True
            )
            with _ignoring_interrupts():
                process.start()
            sender.close()
            stack.callback(_end, process)
            workers[receiver] = process
        yield from _collect(workers)


def _collect(
    workers: dict[Connection[None, Report | _Failure | None], SpawnProcess],
) -> Iterator[Report]:
    while workers:
        ready = wait(list(workers))
        for connection in [one for one in workers if one in ready]:
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
            else:
                yield report


def _work(
    evaluate: Callable[[tuple[int, ...]], Iterator[Report]],
    seeds: tuple[int, ...],
    trace_path: Path | None,
    reports: Connection[Report | _Failure | None, None],
) -> None:
    """Run in a worker process: send each report, then None; or a ``_Failure``."""
    keep_freed_memory()
    try:
        with trace.tracing(trace.sibling(trace_path, f"worker-{os.getpid()}"), "eval_sim worker"):
            for report in evaluate(seeds):
                reports.send(report)
        reports.send(None)
    except WorkerFailed as error:
        with contextlib.suppress(BrokenPipeError):
            reports.send(_Failure(str(error), error.bad_input))
    except BrokenPipeError:
        pass  # the parent process has ended


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Let processes started in this block ignore Ctrl-C: the parent handles it and ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(process: SpawnProcess) -> None:
    if process.is_alive():
        process.terminate()
    process.join()
