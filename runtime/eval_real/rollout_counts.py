"""What is counted of a rollout while it runs, and written into every row of its recording."""

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
"""Names in a row: whole numbers, but for ``seam_jump``."""


@dataclass(frozen=True, slots=True)
class RolloutCounts:
    """Figures of a rollout up to some command.

    Attributes:
        executor: Of chunks and policy ticks.
        clamped_ticks: Commands that the limits changed.
    """

    executor: ExecutorStatistics
    clamped_ticks: int

    @classmethod
    def of(cls, stream: CommandStream) -> RolloutCounts:
        """Since the last reset of ``stream``."""
        return cls(stream.executor.statistics(), stream.limiter.clamped_ticks)

    @classmethod
    def read(cls, row: Mapping[str, NDArray[Any]]) -> RolloutCounts:
        """What ``write`` wrote."""
        values = {name: row[name].item() for name in COUNTED}
        clamped = values.pop("clamped_ticks")
        return cls(ExecutorStatistics(**values), clamped)

    def write(self, row: Mapping[str, NDArray[Any]]) -> None:
        for name in COUNTED[:-1]:
            row[name][...] = getattr(self.executor, name)
        row["clamped_ticks"][...] = self.clamped_ticks

    def __add__(self, later: RolloutCounts) -> RolloutCounts:
        """Of both together, one after the other."""
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
        stream: Whose own counts begin anew with each reset.
        before: What a control process that died had counted of the same rollout.
    """

    def __init__(self, stream: CommandStream, before: RolloutCounts) -> None:
        self._stream, self._before = stream, before

    @contextlib.contextmanager
    def across_reset(self) -> Iterator[None]:
        """Keep what was counted so far, where what is done meanwhile resets the stream."""
        counted = RolloutCounts.of(self._stream)
        yield
        if RolloutCounts.of(self._stream) != counted:
            self._before += counted

    def begin(self) -> None:
        """A rollout starts, with a stream that has just been reset."""
        self._before = _NOTHING

    def write(self, row: Mapping[str, NDArray[Any]]) -> None:
        """The rollout's counts up to now, into ``row``."""
        (self._before + RolloutCounts.of(self._stream)).write(row)


def last_counts(rows: Mapping[str, NDArray[Any]]) -> RolloutCounts:
    """Of all ``rows`` of a rollout, at least one, by column."""
    return RolloutCounts.read({name: np.asarray(rows[name][-1]) for name in COUNTED})
