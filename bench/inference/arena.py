"""Contestants in turns on the same cores, and what is to be said about each.

A round gives every contestant a block of calls; the order rotates. So a slow minute of the machine
is everybody's, and ratios mean something where times do not.
"""

from __future__ import annotations

import math
import os
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
from bench.inference.worker import Started, Worker
from policies.act.config import ActConfig
from policies.act.weights import ActWeights

_LIMITS = {"cpu": ((GEMM, CONVOLUTION), COPY), "cuda": ((CUDA_GEMM,), CUDA_COPY)}
"""What says how fast each device computes, and how fast it moves."""
LIMITS = tuple(name for products, copy in _LIMITS.values() for name in (*products, copy))
LIMIT_CALLS = 10
BLOCK_S, WARM_S, LONG_S = 0.4, 0.05, 0.25
"""A block takes about this long; calls before it are not counted for this long, but where one call
takes ``LONG_S`` itself, what it finds in the caches does not matter."""
COLD, CACHED = "cold", "cached"


@dataclass(slots=True)
class Entry:
    """What one contestant did.

    Attributes:
        starts: ``COLD``, and ``CACHED`` for a contestant that caches.
        error: Of its actions against the plain module's: max|a - b| / max|b|, in the network's
            units, over all observations.
        samples_s: One for each counted call, in order.
        cores, waited: Of each block, as ``worker.Block``.
    """

    contestant: Contestant
    starts: dict[str, Started]
    error: float = math.nan
    samples_s: list[float] = field(default_factory=list)
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
        entries: By contestant; those that could not run are in ``absent`` with the reason.
        machine: The best that the limits reached in the same run.
    """

    net: str
    config: ActConfig
    threads: int
    device: str
    entries: dict[str, Entry]
    absent: dict[str, str]
    machine: Machine


def compare(
    net: str, names: Iterable[str], *, threads: int, calls: int, budget_s: float, device: str
) -> Comparison:
    """Start every contestant, check its actions, then time them in turns.

    Args:
        net: One of ``nets.NETS``.
        calls: Stop at so many of each.
        budget_s: Stop after about this long, starts not counted.

    Raises:
        RuntimeError: A contestant's process died, or too few cores.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < threads:
        raise RuntimeError(f"threads: got {threads}, this process may use {len(allowed)} cores")
    cores = tuple(allowed[-threads:])
    absent: dict[str, str] = {}
    with checkpoint_of(net) as checkpoint, ExitStack() as stack:
        weights = load(checkpoint)
        entries: dict[str, Entry] = {}
        workers: dict[str, Worker] = {}
        products, copy = _LIMITS[device]
        for name in (*products, copy, *names):
            try:
                starting = _started(name, checkpoint, threads, cores, device)
                workers[name], entries[name] = stack.enter_context(starting)
            except Absent as reason:
                absent[name] = str(reason)
        _check(entries, weights)
        _take_turns(workers, entries, calls, budget_s)
        machine = _machine(entries, device)
    return Comparison(
        net=net,
        config=weights.config,
        threads=threads,
        device=device,
        entries={n: e for n, e in entries.items() if n not in LIMITS},
        absent=absent,
        machine=machine,
    )


@contextmanager
def _started(
    name: str, checkpoint: Path, threads: int, cores: tuple[int, ...], device: str
) -> Iterator[tuple[Worker, Entry]]:
    """A worker, ready: of a contestant that caches, the second of two."""
    contestant = CONTESTANTS[name]
    with TemporaryDirectory(prefix="metronome-bench-") as cache:
        setting = Setting(threads=threads, cache=Path(cache), device=device)
        starts = {}
        if contestant.caches:
            with Worker(name, checkpoint, setting, cores) as first:
                starts[COLD] = first.started
        with Worker(name, checkpoint, setting, cores) as worker:
            starts[CACHED if contestant.caches else COLD] = worker.started
            yield worker, Entry(contestant, starts)


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


def _take_turns(
    workers: Mapping[str, Worker], entries: Mapping[str, Entry], calls: int, budget_s: float
) -> None:
    order = list(workers)
    ends_s = time.monotonic() + budget_s
    while time.monotonic() < ends_s:
        unfinished = [n for n in order if n not in LIMITS and len(entries[n].samples_s) < calls]
        if not unfinished:
            break
        for name in order:
            if name in LIMITS:
                block, uncounted = LIMIT_CALLS, 1
            elif name in unfinished:
                block, uncounted = _block_size(entries[name])
                block = min(block, calls - len(entries[name].samples_s))
            else:
                continue
            result = workers[name].run(block, uncounted)
            entries[name].samples_s.extend(result.samples_s)
            entries[name].cores.append(result.cores)
            entries[name].waited.append(result.waited)
        order.append(order.pop(0))


def _block_size(entry: Entry) -> tuple[int, int]:
    """(counted calls, uncounted calls before them)."""
    if entry.samples_s:
        call_s = float(np.median(entry.samples_s))
    else:
        call_s = next(reversed(entry.starts.values())).first_s
    calls = max(1, round(BLOCK_S / call_s))
    return calls, 0 if call_s > LONG_S else math.ceil(WARM_S / call_s)


def _machine(entries: Mapping[str, Entry], device: str) -> Machine:
    def best(name: str) -> float:
        return entries[name].contestant.work / float(min(entries[name].samples_s))

    products, copy = _LIMITS[device]
    return Machine(flops_per_s=max(map(best, products)), bytes_per_s=best(copy))
