"""The newest value of a schema in shared memory: one writer, any number of readers, no lock.

Guaranteed, even if ``kill -9`` ends the writer between two instructions: a reader gets the newest
value that was published completely. A value is written to a slot that no reader uses and becomes
visible with one store, so a half-written value is never visible. The counter of published values is
in the memory, so a new writer continues where a dead one stopped.

Readers never wait and never delay the writer. A reader copies a slot and then checks whether the
writer may have reached that slot again meanwhile. If so, it drops the copy. This is a seqlock whose
sequence number is that of the newest value and covers several slots.

Rejected: one slot with a sequence number around it (a writer that dies inside leaves it odd for
ever), and any lock (its owner's death would hold it).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transport.channel import Arrays
from transport.schema import Schema
from transport.shm.atomics import CACHE_LINES, AtomicInt64, full_fence
from transport.shm.segment import MappedSegment
from transport.shm.slot_array import SlotArray

LATEST_SLOTS = 4
"""One visible, one being written, and two more. So a reader has to copy again only if it was
delayed for two whole publications."""
_NOT_THERE = 2**63 - 1


def latest_value_nbytes(schema: Schema, slots: int = LATEST_SLOTS) -> int:
    """Bytes for a value of ``schema`` and its counter; a multiple of ``CACHE_LINES``."""
    return CACHE_LINES + SlotArray.nbytes(schema, slots)


class LatestValueWriter:
    """Publishes the newest value. Allocates nothing per value.

    Args:
        memory: Mapped writable; zeros before the first writer.
        offset: Where the value's ``latest_value_nbytes`` begin.
        slots: At least 3. Readers can read ``slots - 1`` values: the newest and those before it.
    """

    def __init__(
        self, memory: MappedSegment, offset: int, schema: Schema, slots: int = LATEST_SLOTS
    ) -> None:
        self._head = AtomicInt64(memory, offset)
        self._slots = SlotArray(memory, offset + CACHE_LINES, schema, slots)
        self._published = self._head.load()

    def take_over(self) -> None:
        """Continue where a previous writer, which has ended, stopped."""
        self._published = self._head.load()

    def claim(self) -> Arrays:
        """Return the next value's arrays, to be filled completely before ``publish``."""
        # SYNC POINT: pairs with LatestValueReader._copy.fence: a reader that sees any of what is
        # written from here on sees the last head as well.
        full_fence()
        return self._slots.views[(self._published + 1) % self._slots.count]

    def publish(self) -> None:
        """Make the claimed value the newest."""
        self._published += 1
        # SYNC POINT: pairs with LatestValueReader.newest.head: publishes the value's arrays.
        self._head.store(self._published)


class LatestValueReader:
    """Copies values out of the shared memory.

    Attributes:
        values: The arrays that ``refresh`` copied, by name.
        sequence: Sequence number of ``values``, counted from 1; 0 before the first.
    """

    def __init__(
        self, memory: MappedSegment, offset: int, schema: Schema, slots: int = LATEST_SLOTS
    ) -> None:
        self._head = AtomicInt64(memory, offset)
        self._slots = SlotArray(memory, offset + CACHE_LINES, schema, slots)
        self._own = np.zeros(schema.nbytes, np.uint8)
        self.values: Arrays = schema.views(self._own)
        self.sequence = 0

    @property
    def newest(self) -> int:
        """Sequence number of the newest value; 0 before the first."""
        # SYNC POINT: pairs with LatestValueWriter.publish.head: the newest value is whole.
        return self._head.load()

    def refresh(self) -> bool:
        """Copy the newest value to ``values`` if it is new; whether it was."""
        newest = self.newest
        if newest == self.sequence:
            return False
        while not self._copy(newest, self._own):
            newest = self.newest
        self.sequence = newest
        return True

    def read(self) -> tuple[int, Arrays] | None:
        """Return the newest value's sequence number and a new copy; None before the first value."""
        while newest := self.newest:
            if (arrays := self._read(newest)) is not None:
                return newest, arrays
        return None

    def nearest(self, name: str, to: int) -> tuple[int, Arrays] | None:
        """As ``read``, for the value still available whose scalar ``name`` is nearest to ``to``."""
        slots = self._slots.count
        while newest := self.newest:
            # The writer may be changing the column. ``_read`` returns None for a changed value.
            distances = np.abs(self._slots.column(name) - to)
            distances[(newest + 1) % slots] = _NOT_THERE  # being written
            if newest < slots:
                distances[0] = distances[newest + 1 :] = _NOT_THERE  # values are counted from 1
            sequence = newest - (newest - int(distances.argmin())) % slots
            if (arrays := self._read(sequence)) is not None:
                return sequence, arrays
        return None

    def _read(self, sequence: int) -> Arrays | None:
        copy = np.empty(self._slots.schema.nbytes, np.uint8)
        return self._slots.schema.views(copy, writable=True) if self._copy(sequence, copy) else None

    def _copy(self, sequence: int, target: NDArray[np.uint8]) -> bool:
        """Copy a value; False if the writer may have overwritten it meanwhile."""
        np.copyto(target, self._slots.blocks[sequence % self._slots.count])
        # SYNC POINT: pairs with LatestValueWriter.claim.fence: if any of the copy is of a later
        # value, the head before that value's is seen now.
        full_fence()
        # The writer may be at work in the slot behind the newest.
        return self._head.load() - sequence < self._slots.count - 1
