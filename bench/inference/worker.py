"""One contestant in a process of its own: ``python -m bench.inference.worker FD``.

Its memory, its start-up and its thread pools are its own, and it sleeps while others are timed. It
dies with its parent, whatever the parent dies of.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bench.inference.contestants import Absent, Contestant, Run, Setting
from bench.inference.steps import die_with_parent, shorten

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "bench.inference.worker")
START_WITHIN_S = 300.0
ANSWER_WITHIN_S = 120.0
KILLED_WITHIN_S = 10.0

Inputs: TypeAlias = list[tuple[NDArray[np.uint8], NDArray[np.float32]]]


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is told first.

    Attributes:
        cores: The cores it may use, as many as its threads.
        born_ns: When its process was started, monotonic.
    """

    contestant: Contestant
    checkpoint: Path
    setting: Setting
    cores: tuple[int, ...]
    born_ns: int


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is told after that.

    Attributes:
        calls: So many are timed, after ``uncounted`` ones that warm the caches again.
        pace_hz: Calls per second; 0 for one after the other.
    """

    calls: int
    uncounted: int
    pace_hz: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """What a worker says, in words, before it ends."""

    words: str


@dataclass(frozen=True, slots=True)
class Started:
    """What a worker says when it is ready.

    Attributes:
        imported_s, built_s: From the start of its process until torch and the loaders were
            imported, and until the contestant could be called.
        first_s: The first call.
        base_bytes: Resident memory with the imports and nothing else.
        resident_bytes: Resident memory after some calls.
        outputs: (observations, T, A) actions in physical units.
    """

    imported_s: float
    built_s: float
    first_s: float
    base_bytes: int
    resident_bytes: int
    outputs: NDArray[np.float32]

    @property
    def ready_s(self) -> float:
        """From the start of the process to the first answer."""
        return self.built_s + self.first_s


@dataclass(frozen=True, slots=True)
class Block:
    """Calls one after the other.

    Attributes:
        samples_s: One for each call.
        cores: Processor time of all its threads by time elapsed.
        waited: Time in which a thread of it could have run and had no processor, by time elapsed:
            processes of others took it; the benchmark's own sleep then.
    """

    samples_s: NDArray[np.float64]
    cores: float
    waited: float


class Worker:
    """A contestant's process, ready.

    Args:
        start_within_s: From the start of the process to its answer.
        answer_within_s: For a block of calls, beyond what pacing takes.

    Raises:
        Absent: It cannot run here.
        RuntimeError: It failed, died, or did not start in time; says it in the worker's own words
            where there are any.
    """

    def __init__(
        self,
        contestant: Contestant,
        checkpoint: Path,
        setting: Setting,
        cores: tuple[int, ...],
        *,
        start_within_s: float = START_WITHIN_S,
        answer_within_s: float = ANSWER_WITHIN_S,
    ) -> None:
        self.name, self._answer_within_s = contestant.name, answer_within_s
        ours, theirs = socket.socketpair()
        born_ns = time.monotonic_ns()
        self._printed = TemporaryFile()  # noqa: SIM115 (as long as the process)
        with theirs:
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": str(setting.threads)},
                stderr=self._printed,
            )
        self._link = Connection(ours.detach())
        try:
            said = self._ask(Task(contestant, checkpoint, setting, cores, born_ns), start_within_s)
            if isinstance(said, str):
                raise Absent(said)
            self.started: Started = said
        except BaseException:
            self.close()
            raise

    def run(self, calls: int, uncounted: int, pace_hz: float = 0.0) -> Block:
        """Have it make ``calls`` calls; see ``Order``.

        Raises:
            RuntimeError: It failed, died, or did not answer in time.
        """
        paced_s = calls / pace_hz if pace_hz else 0.0
        within_s = self._answer_within_s + paced_s
        block: Block = self._ask(Order(calls, uncounted, pace_hz), within_s)
        return block

    def close(self) -> None:
        """Kill it; it owns nothing that outlives it. Idempotent."""
        with suppress(ProcessLookupError):
            self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # a process can be stuck in a driver
            self._process.wait(KILLED_WITHIN_S)
        self._link.close()
        self._printed.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, question: Task | Order, within_s: float) -> Any:
        try:
            self._link.send(question)
            if not self._link.poll(within_s):
                raise RuntimeError(f"{self.name}: no answer within {within_s:g} s{self._words()}")
            said = self._link.recv()
        except (EOFError, OSError) as error:
            self._link.close()
            try:
                status = f"status {self._process.wait(1.0)}"
            except subprocess.TimeoutExpired:
                status = "alive, but not listening"
            raise RuntimeError(f"{self.name}: its process died, {status}{self._words()}") from error
        if isinstance(said, Failed):
            self._words()
            raise RuntimeError(f"{self.name}: {said.words}")
        return said

    def _words(self) -> str:
        """Pass on what it printed as errors, and return the last line of it."""
        self._printed.seek(0)
        text = self._printed.read().decode(errors="replace")
        sys.stderr.write(text)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f": {shorten(lines[-1])}" if lines else ""


def main(fd: int) -> None:
    die_with_parent()
    link = Connection(fd)
    task: Task = link.recv()
    # Before torch is imported: whatever starts threads starts them on these cores.
    os.sched_setaffinity(0, task.cores)
    from bench.inference.nets import load, observations

    imported_s = _since_s(task.born_ns)
    base_bytes = _resident_bytes()
    contestant = task.contestant
    inputs: Inputs = [(np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0, np.float32))]
    try:
        if contestant.side == "limit":
            run = contestant.load_limit()(task.setting)
        else:
            weights = load(task.checkpoint)
            inputs = observations(weights.config)
            run = contestant.load()(weights, task.setting)
            del weights
        built_s = _since_s(task.born_ns)
        began_s = time.perf_counter()
        run(*inputs[0])
        first_s = time.perf_counter() - began_s
        outputs = np.stack([np.array(run(*each)) for each in inputs])
        gc.collect()
        gc.freeze()
        link.send(Started(imported_s, built_s, first_s, base_bytes, _resident_bytes(), outputs))
        while True:
            order: Order = link.recv()
            link.send(_block(run, inputs, order))
    except Absent as reason:
        link.send(str(reason))
    except EOFError:
        pass
    except Exception as error:
        traceback.print_exc()
        link.send(Failed(shorten(f"{type(error).__name__}: {error}")))


def _block(run: Run, inputs: Inputs, order: Order) -> Block:
    for number in range(order.uncounted):
        run(*inputs[number % len(inputs)])
    samples_s = np.empty(order.calls)
    period_s = 1 / order.pace_hz if order.pace_hz else 0.0
    waited_s, worked_s, began_s = _waited_s(), time.process_time(), time.perf_counter()
    for number in range(order.calls):
        if period_s:
            time.sleep(max(0.0, began_s + (number + 1) * period_s - time.perf_counter()))
        start_s = time.perf_counter()
        run(*inputs[number % len(inputs)])
        samples_s[number] = time.perf_counter() - start_s
    elapsed_s = time.perf_counter() - began_s
    worked_s, waited_s = time.process_time() - worked_s, _waited_s() - waited_s
    return Block(samples_s, worked_s / elapsed_s, waited_s / elapsed_s)


def _since_s(born_ns: int) -> float:
    return (time.monotonic_ns() - born_ns) / 1e9


def _waited_s() -> float:
    """Of all threads, on the kernel's run queues; 0 where it keeps no account."""
    waited_ns = 0
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            waited_ns += int((thread / "schedstat").read_text(encoding="ascii").split()[1])
    return waited_ns / 1e9


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    # Under its own name: what it sends is unpickled by that name on the other side.
    from bench.inference.worker import main as _main

    _main(int(sys.argv[1]))
