"""Counts of a rollout, kept while it runs and written into every row of its recording."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.control.chunk_executor import ExecutorStatistics
from runtime.control.command_stream import CommandStream

COUNTED = (*(field.name for field in fields(ExecutorStatistics)), "clamped_ticks")
"""Columns of a row: integers, except ``seam_jump``."""


@dataclass(frozen=True, slots=True)
class RolloutCounts:
    """Counts of a rollout up to one of its commands.

    Attributes:
        executor: Counts of chunks and policy ticks.
        clamped_ticks: Commands that the limits changed.
    """

    executor: ExecutorStatistics
    clamped_ticks: int

    @classmethod
    def of(cls, stream: CommandStream) -> RolloutCounts:
        """The counts of ``stream`` since its last reset."""
        return cls(stream.executor.statistics(), stream.limiter.clamped_ticks)

    @classmethod
    def read(cls, row: Mapping[str, NDArray[Any]]) -> RolloutCounts:
        """The counts that ``write`` wrote into ``row``."""
        values = {name: row[name].item() for name in COUNTED}
        clamped = values.pop("clamped_ticks")
        return cls(ExecutorStatistics(**values), clamped)

    def write(self, row: Mapping[str, NDArray[Any]]) -> None:
        """Write the counts into the 0-d arrays of ``row``."""
        for name in COUNTED[:-1]:
            row[name][...] = getattr(self.executor, name)
        row["clamped_ticks"][...] = self.clamped_ticks

    def __add__(self, later: RolloutCounts) -> RolloutCounts:
        """Counts of two parts of a rollout, one after the other."""
        a, b = self.executor, later.executor
        return RolloutCounts(
            ExecutorStatistics(
                chunks=a.chunks + b.chunks,
                dropped_stale=a.dropped_stale + b.dropped_stale,
                discarded_actions=a.discarded_actions + b.discarded_actions,
                starved_ticks=a.starved_ticks + b.starved_ticks,
                seam_jump=max(a.seam_jump, b.seam_jump),
                staleness_ticks=max(a.staleness_ticks, b.staleness_ticks),
            ),
            self.clamped_ticks + later.clamped_ticks,
        )


_NOTHING = RolloutCounts(ExecutorStatistics(0, 0, 0, 0, 0.0, 0), 0)


class RolloutCounter:
    """Counts a rollout across the resets of its stream.

    Args:
        stream: Its own counts restart at 0 with each reset.
        before: Counts of the same rollout by a control process that died.
    """

    def __init__(self, stream: CommandStream, before: RolloutCounts) -> None:
        self._stream, self._before = stream, before

    @contextlib.contextmanager
    def across_reset(self) -> Iterator[None]:
        """Keep the counts so far if the block resets the stream."""
        counted = RolloutCounts.of(self._stream)
        yield
        if RolloutCounts.of(self._stream) != counted:
            self._before += counted

    def begin(self) -> None:
        """Start a rollout at 0. The stream has just been reset."""
        self._before = _NOTHING

    def write(self, row: Mapping[str, NDArray[Any]]) -> None:
        """Write the rollout's counts so far into ``row``."""
        (self._before + RolloutCounts.of(self._stream)).write(row)


def last_counts(rows: Mapping[str, NDArray[Any]]) -> RolloutCounts:
    """The counts in the last of ``rows``, the columns of a rollout with at least one row."""
    return RolloutCounts.read({name: np.asarray(rows[name][-1]) for name in COUNTED})
