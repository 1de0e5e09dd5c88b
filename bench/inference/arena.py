"""Contestants in turns on the same cores, and what is to be said about each.

A round gives every contestant a block of calls; the order rotates. So a slow minute of the machine
is everybody's, and ratios mean something where times do not.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from bench.inference.contestants import (
    CONTESTANTS,
    CONVOLUTION,
    COPY,
    CUDA_COPY,
    CUDA_GEMM,
    GEMM,
    Absent,
    Contestant,
    Setting,
)
from bench.inference.nets import checkpoint_of, load, observations
from bench.inference.roofline import Machine
from bench.inference.worker import ANSWER_WITHIN_S, START_WITHIN_S, Block, Started, Worker
from policies.act.config import ActConfig
from policies.act.weights import ActWeights

_LIMITS = {"cpu": ((GEMM, CONVOLUTION), COPY), "cuda": ((CUDA_GEMM,), CUDA_COPY)}
"""What says how fast each device computes, and how fast it moves."""
LIMITS = tuple(name for products, copy in _LIMITS.values() for name in (*products, copy))
LIMIT_CALLS = 10
BLOCK_S, WARM_S, LONG_S = 0.4, 0.05, 0.25
"""A block takes about this long; calls before it are not counted for this long, but where one call
takes ``LONG_S`` itself, what it finds in the caches does not matter."""
PACED_CALLS = 100
"""A block of paced calls: two seconds at 50 Hz."""
COLD, CACHED = "cold", "cached"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a comparison waits for a worker that says nothing, before it is killed.

    Attributes:
        start_s: For its start.
        answer_s: For a block of calls.
        ends_s: No worker is started after this time, monotonic, and none later than it is waited
            for; those that are ready are timed for their whole time.
        cached_starts: Whether a contestant that caches is started twice.
    """

    start_s: float = START_WITHIN_S
    answer_s: float = ANSWER_WITHIN_S
    ends_s: float = math.inf
    cached_starts: bool = True


@dataclass(slots=True)
class Entry:
    """What one contestant did.

    Attributes:
        starts: ``COLD``, and ``CACHED`` for a contestant that caches.
        error: Of its actions against the plain module's: max|a - b| / max|b|, in the network's
            units, over all observations.
        samples_s: One for each counted call, in order.
        paced_s: One for each call at a fixed rate.
        cores, waited: Of each block, as ``worker.Block``.
    """

    contestant: Contestant
    starts: dict[str, Started]
    error: float = math.nan
    samples_s: list[float] = field(default_factory=list)
    paced_s: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    def percentile_s(self, percent: float) -> float:
        return float(np.percentile(self.samples_s, percent))

    @property
    def jitter_s(self) -> float:
        """How much two calls in a row differ, on average (RFC 3550, 6.4.1, without smoothing)."""
        return float(np.abs(np.diff(self.samples_s)).mean()) if len(self.samples_s) > 1 else 0.0


@dataclass(slots=True)
class Comparison:
    """A network at a number of threads.

    Attributes:
        entries: By contestant; those that could not run, or not to the end, are in ``absent`` with
            the reason.
        machine: The best that the limits reached in the same run; None where one of them failed.
        pace_hz: Rate of ``Entry.paced_s``; 0 where there are none.
    """

    net: str
    config: ActConfig
    threads: int
    device: str
    entries: dict[str, Entry]
    absent: dict[str, str]
    machine: Machine | None
    pace_hz: float = 0.0


def compare(
    net: str,
    names: Iterable[str],
    *,
    threads: int,
    calls: int,
    budget_s: float,
    device: str,
    pace_hz: float = 0.0,
    paced_calls: int = 0,
    timeouts: Timeouts = Timeouts(),
) -> Comparison:
    """Start every contestant, check its actions, then time them in turns.

    One that fails, dies or hangs is absent from the result, and the others go on.

    Args:
        net: One of ``nets.NETS``.
        calls: Stop at so many of each.
        budget_s: Stop after about this long, starts not counted.
        pace_hz, paced_calls: So many further calls of each, so many of them a second.

    Raises:
        RuntimeError: Too few cores.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < threads:
        raise RuntimeError(f"threads: got {threads}, this process may use {len(allowed)} cores")
    cores = tuple(allowed[-threads:])
    with checkpoint_of(net) as checkpoint, ExitStack() as stack:
        weights = load(checkpoint)
        products, copy = _LIMITS[device]
        turns = _Turns()
        for name in (*products, copy, *names):
            try:
                starting = _started(name, checkpoint, threads, cores, device, timeouts=timeouts)
                turns.workers[name], turns.entries[name] = stack.enter_context(starting)
            except (Absent, RuntimeError) as reason:
                turns.absent[name] = _without_name(name, reason)
        _check(turns.entries, weights)
        turns.take(calls, budget_s)
        if pace_hz:
            turns.take_paced(paced_calls, pace_hz)
        machine = _machine(turns.entries, device)
    for name, entry in turns.entries.items():
        if not entry.samples_s:
            turns.absent[name] = "no time was left for a call"
    return Comparison(
        net=net,
        config=weights.config,
        threads=threads,
        device=device,
        entries={n: e for n, e in turns.entries.items() if n not in LIMITS and e.samples_s},
        absent=turns.absent,
        machine=machine,
        pace_hz=pace_hz,
    )


@contextmanager
def _started(
    name: str,
    checkpoint: Path,
    threads: int,
    cores: tuple[int, ...],
    device: str,
    *,
    timeouts: Timeouts,
) -> Iterator[tuple[Worker, Entry]]:
    """A worker, ready: of a contestant that caches, the second of two."""
    contestant = CONTESTANTS[name]
    twice = contestant.caches and timeouts.cached_starts

    def start() -> Worker:
        left_s = timeouts.ends_s - time.monotonic()
        if left_s <= 0:
            raise Absent("no time was left to start it")
        return Worker(
            contestant,
            checkpoint,
            setting,
            cores,
            start_within_s=min(timeouts.start_s, left_s),
            answer_within_s=timeouts.answer_s,
        )

    with TemporaryDirectory(prefix="metronome-bench-") as cache:
        setting = Setting(threads=threads, cache=Path(cache), device=device)
        starts = {}
        if twice:
            with start() as first:
                starts[COLD] = first.started
        with start() as worker:
            starts[CACHED if twice else COLD] = worker.started
            yield worker, Entry(contestant, starts)


def _without_name(name: str, reason: Exception) -> str:
    return str(reason).removeprefix(f"{name}: ")


def _check(entries: Mapping[str, Entry], weights: ActWeights) -> None:
    """Fill in each one's error, against the plain module here and now on the CPU."""
    normalizer, model = weights.action_normalizer, weights.inference_model()
    with torch.inference_mode():
        expected = np.stack(
            [
                model(torch.from_numpy(images)[None], torch.from_numpy(state)[None])[0].numpy()
                for images, state in observations(weights.config)
            ]
        )
    for name, entry in entries.items():
        if name in LIMITS:
            continue
        actions = next(reversed(entry.starts.values())).outputs.astype(np.float64)
        # In the network's units, where no shift hides a difference.
        normalized = (actions - normalizer.shift) / normalizer.scale
        entry.error = float(np.abs(normalized - expected).max() / np.abs(expected).max())


class _Turns:
    """Workers that take turns. One that fails is closed and absent from then on."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.entries: dict[str, Entry] = {}
        self.absent: dict[str, str] = {}

    def take(self, calls: int, budget_s: float) -> None:
        """Blocks of calls, one after the other, until each has ``calls`` or the time is up."""
        order = list(self.workers)
        ends_s = time.monotonic() + budget_s
        while time.monotonic() < ends_s:
            unfinished = [
                name
                for name, entry in self.entries.items()
                if name not in LIMITS and len(entry.samples_s) < calls
            ]
            if not unfinished:
                break
            for name in order:
                entry = self.entries.get(name)
                if entry is None:
                    continue
                if name in LIMITS:
                    block, uncounted = LIMIT_CALLS, 1
                elif name in unfinished:
                    block, uncounted = _block_size(entry)
                    block = min(block, calls - len(entry.samples_s))
                else:
                    continue
                result = self._run(name, block, uncounted)
                if result is not None:
                    entry.samples_s.extend(result.samples_s)
                    entry.cores.append(result.cores)
                    entry.waited.append(result.waited)
            order.append(order.pop(0))

    def take_paced(self, calls: int, pace_hz: float) -> None:
        """Blocks of calls at a rate, with one contestant at a time."""
        order = [name for name in self.entries if name not in LIMITS]
        for done in range(0, calls, PACED_CALLS):
            for name in order:
                entry = self.entries.get(name)
                if entry is None:
                    continue
                result = self._run(name, min(PACED_CALLS, calls - done), 0, pace_hz)
                if result is not None:
                    entry.paced_s.extend(result.samples_s)
            order = [*order[1:], *order[:1]]

    def _run(self, name: str, calls: int, uncounted: int, pace_hz: float = 0.0) -> Block | None:
        try:
            return self.workers[name].run(calls, uncounted, pace_hz)
        except RuntimeError as error:
            self.workers.pop(name).close()
            done = len(self.entries.pop(name).samples_s)
            self.absent[name] = f"after {done} calls: {_without_name(name, error)}"
            print(f"  {name}: {self.absent[name]}", file=sys.stderr, flush=True)
            return None


def _block_size(entry: Entry) -> tuple[int, int]:
    """(counted calls, uncounted calls before them)."""
    if entry.samples_s:
        call_s = float(np.median(entry.samples_s))
    else:
        call_s = next(reversed(entry.starts.values())).first_s
    calls = max(1, round(BLOCK_S / call_s))
    return calls, 0 if call_s > LONG_S else math.ceil(WARM_S / call_s)


def _machine(entries: Mapping[str, Entry], device: str) -> Machine | None:
    def best(name: str) -> float:
        entry = entries.get(name)
        if entry is None or not entry.samples_s:
            return 0.0
        return entry.contestant.work / float(min(entry.samples_s))

    products, copy = _LIMITS[device]
    product_per_s, bytes_per_s = max(map(best, products)), best(copy)
    if not product_per_s or not bytes_per_s:
        return None
    return Machine(flops_per_s=product_per_s, bytes_per_s=bytes_per_s)
