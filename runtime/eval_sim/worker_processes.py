"""An evaluation's seeds dealt out to processes side by side."""

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


def in_processes(
    evaluate: Callable[[tuple[int, ...]], Iterator[Report]],
    seeds: tuple[int, ...],
    count: int,
    trace_path: Path | None,
) -> Generator[Report, None, None]:
    """What ``evaluate`` gives for all ``seeds`` together, as it comes.

    Args:
        evaluate: Called in each process with its share of the seeds; raises ``WorkerFailed``. It
            and what it gives can be pickled.
        count: Processes at most.
        trace_path: Where this process is traced; the others write beside it.

    Raises:
        WorkerFailed: Nothing more will come.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection[None, Report | _Failure | None], SpawnProcess] = {}
    with contextlib.ExitStack() as stack:
        for index in range(min(count, len(seeds))):
            ours, theirs = context.Pipe(duplex=False)
            stack.callback(ours.close)
            share = seeds[index::count]
            process = context.Process(
                target=_work, args=(evaluate, share, trace_path, theirs), daemon=True
            )
            with _ignoring_interrupts():
                process.start()
            theirs.close()
            stack.callback(_end, process)
            workers[ours] = process
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
    """A worker process: its reports, then None; or the failure."""
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
        pass  # whoever wanted the reports is gone


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """What is started meanwhile ignores Ctrl-C: its parent hears it, and ends its children."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(process: SpawnProcess) -> None:
    if process.is_alive():
        process.terminate()
    process.join()
