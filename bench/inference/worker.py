"""One contestant in a process of its own: ``python -m bench.inference.worker FD``.

Its memory, its start-up and its thread pools are its own, and it sleeps while others are timed. It
dies with its parent, whatever the parent dies of.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bench.inference.contestants import CONTESTANTS, Absent, Run, Setting

ROOT = Path(__file__).resolve().parents[2]
START_WITHIN_S = 300.0
ANSWER_WITHIN_S = 120.0
_PR_SET_PDEATHSIG = 1

Inputs: TypeAlias = list[tuple[NDArray[np.uint8], NDArray[np.float32]]]


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is told first.

    Attributes:
        cores: The cores it may use, as many as its threads.
        born_ns: When its process was started, monotonic.
    """

    contestant: str
    checkpoint: Path
    setting: Setting
    cores: tuple[int, ...]
    born_ns: int


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

    Raises:
        Absent: It cannot run here.
        RuntimeError: It died, or did not start in time.
    """

    def __init__(
        self, contestant: str, checkpoint: Path, setting: Setting, cores: tuple[int, ...]
    ) -> None:
        self.name = contestant
        ours, theirs = socket.socketpair()
        born_ns = time.monotonic_ns()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.inference.worker", str(theirs.fileno())],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": str(setting.threads)},
            )
        self._link = Connection(ours.detach())
        try:
            self._link.send(Task(contestant, checkpoint, setting, cores, born_ns))
            said = self._receive(START_WITHIN_S)
            if isinstance(said, str):
                raise Absent(said)
            self.started: Started = said
        except BaseException:
            self.close()
            raise

    def run(self, calls: int, uncounted: int) -> Block:
        """``calls`` after ``uncounted`` ones that warm the caches again."""
        self._link.send((calls, uncounted))
        block: Block = self._receive(ANSWER_WITHIN_S)
        return block

    def close(self) -> None:
        """Kill it; it owns nothing that outlives it. Idempotent."""
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        self._link.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self, within_s: float) -> Any:
        try:
            if not self._link.poll(within_s):
                raise RuntimeError(f"{self.name}: nothing within {within_s:g} s")
            return self._link.recv()
        except (EOFError, ConnectionError) as error:
            status = self._process.wait()
            raise RuntimeError(f"{self.name}: its process died, status {status}") from error


def main(fd: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    link = Connection(fd)
    task: Task = link.recv()
    # Before torch is imported: whatever starts threads starts them on these cores.
    os.sched_setaffinity(0, task.cores)
    from bench.inference.nets import load, observations

    imported_s = _since_s(task.born_ns)
    base_bytes = _resident_bytes()
    contestant = CONTESTANTS[task.contestant]
    inputs: Inputs = [(np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0, np.float32))]
    try:
        if contestant.side == "limit":
            run = contestant.load_limit()(task.setting)
        else:
            weights = load(task.checkpoint)
            inputs = observations(weights.config)
            run = contestant.load()(weights, task.setting)
            del weights
    except Absent as reason:
        link.send(str(reason))
        return
    built_s = _since_s(task.born_ns)
    began_s = time.perf_counter()
    run(*inputs[0])
    first_s = time.perf_counter() - began_s
    outputs = np.stack([np.array(run(*each)) for each in inputs])
    gc.collect()
    gc.freeze()
    link.send(Started(imported_s, built_s, first_s, base_bytes, _resident_bytes(), outputs))
    with suppress(EOFError):
        while True:
            calls, uncounted = link.recv()
            link.send(_block(run, inputs, calls, uncounted))


def _block(run: Run, inputs: Inputs, calls: int, uncounted: int) -> Block:
    for number in range(uncounted):
        run(*inputs[number % len(inputs)])
    samples_s = np.empty(calls)
    waited_s, worked_s, began_s = _waited_s(), time.process_time(), time.perf_counter()
    for number in range(calls):
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
