"""Samples of a run as a small file: every published percentile is kept, the rest is thinned.

Of a sorted series of n samples these order statistics are kept, and nothing of their sequence:

* the two around each of ``PUBLISHED``, so that those percentiles are those of all samples;
* the smallest, the next, and from there on each four times as far from the smallest as the last;
* the largest, the next, and from there on each ``growth`` times as far from the largest as the
  last, or one further. So any other percentile lies between two that are kept, and the distances
  of these from the largest differ by at most ``growth`` times, or by one.

Times are kept in 1/64 µs, finer than the clock is steady: whole numbers, as differences of
neighbours, byte by byte, which is what packs best.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PUBLISHED = (50.0, 99.0, 99.9, 100.0)
TICKS_PER_US = 64
COARSE, FINE = 1.5, 1.1
"""``growth`` for what is published as percentiles, and for what is drawn as a distribution."""


def in_ticks(samples_us: NDArray[Any]) -> NDArray[np.int64]:
    return np.round(np.asarray(samples_us, np.float64) * TICKS_PER_US).astype(np.int64)


def kept_ranks(count: int, growth: float = COARSE) -> NDArray[np.int64]:
    """Ranks of the order statistics that are kept of ``count`` samples, rising, from 0."""
    last, ranks = count - 1, set[int]()
    for percent in PUBLISHED:
        ranks |= {int(np.floor(last * percent / 100)), int(np.ceil(last * percent / 100))}
    distance = 0
    while distance < count:
        ranks.add(distance)
        distance = max(1, 4 * distance)
    distance = 0
    while distance < count:
        ranks.add(last - distance)
        distance = max(distance + 1, int(distance * growth))
    return np.array(sorted(ranks) if count else [], np.int64)


def write_samples(
    path: Path, samples_us: Mapping[str, NDArray[Any]], *, growth: float = COARSE
) -> None:
    """Write what is kept of each series, all together, as four arrays in an ``.npz``."""
    counts = [series.size for series in samples_us.values()]
    kept = [np.sort(in_ticks(each))[kept_ranks(each.size, growth)] for each in samples_us.values()]
    steps = [np.diff(ticks, prepend=0) for ticks in kept]
    packed = np.concatenate([np.empty(0, np.int64), *steps]).astype("<i8")
    np.savez_compressed(
        path,
        allow_pickle=False,
        names=np.frombuffer("\n".join(samples_us).encode(), np.uint8),
        counts=np.array(counts, np.int32),
        growth=np.float64(growth),
        bytes=packed.view(np.uint8).reshape(-1, 8).T,
    )


def read_samples(path: Path) -> dict[str, NDArray[np.float32]]:
    """µs, float32, sorted, as many as there were: between those kept, in even steps."""
    with np.load(path, allow_pickle=False) as file:
        names, counts, packed = file["names"], file["counts"], file["bytes"]
        growth = float(file["growth"])
    steps = np.ascontiguousarray(packed.T).view("<i8").ravel()
    found, start = {}, 0
    for name, count in zip(names.tobytes().decode().split("\n"), counts.tolist(), strict=False):
        ranks = kept_ranks(count, growth)
        ticks = np.cumsum(steps[start : start + ranks.size])
        start += ranks.size
        filled = np.interp(np.arange(count), ranks, ticks) if count else ticks
        found[name] = (filled / TICKS_PER_US).astype(np.float32)
    return found
