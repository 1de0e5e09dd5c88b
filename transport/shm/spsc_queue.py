"""A queue in shared memory: one writer, one reader, no lock.

Guaranteed, even if ``kill -9`` ends either process between two instructions: the reader gets every
published value once and in order. The counters are in the memory, so a new writer or reader
continues where a dead one stopped.
"""

from __future__ import annotations

from transport.channel import Arrays
from transport.schema import Schema
from transport.shm.atomics import CACHE_LINES, AtomicInt64
from transport.shm.segment import MappedSegment
from transport.shm.slot_array import SlotArray


def queue_nbytes(schema: Schema, count: int) -> int:
    """Bytes for a queue of ``count`` values; a multiple of ``CACHE_LINES``."""
    return 2 * CACHE_LINES + SlotArray.nbytes(schema, count)


class _Queue:
    """The shared state: counters of published and released values, and the slots."""

    def __init__(self, memory: MappedSegment, offset: int, schema: Schema, count: int) -> None:
        self._head = AtomicInt64(memory, offset)
        self._tail = AtomicInt64(memory, offset + CACHE_LINES)
        self._slots = SlotArray(memory, offset + 2 * CACHE_LINES, schema, count)


class QueueWriter(_Queue):
    """The sending end of a queue of ``count`` values.

    Attributes:
        published: Number of values published so far.
        refused: How often ``claim`` found the queue full.
    """

    def __init__(self, memory: MappedSegment, offset: int, schema: Schema, count: int) -> None:
        super().__init__(memory, offset, schema, count)
        self.published = self._head.load()
        self.refused = 0

    def take_over(self) -> None:
        """Continue where a previous writer, which has ended, stopped."""
        self.published = self._head.load()

    def claim(self) -> Arrays | None:
        """Return the next value's arrays; None, counted in ``refused``, while the queue is full."""
        # SYNC POINT: pairs with QueueReader.release.tail: the reader is done with values below it.
        if self.published - self._tail.load() >= self._slots.count:
            self.refused += 1
            return None
        return self._slots.views[self.published % self._slots.count]

    def publish(self) -> None:
        """Append the claimed value."""
        self.published += 1
        # SYNC POINT: pairs with QueueReader.peek.head: publishes the value's arrays.
        self._head.store(self.published)


class QueueReader(_Queue):
    """The receiving end of a queue."""

    def __init__(self, memory: MappedSegment, offset: int, schema: Schema, count: int) -> None:
        super().__init__(memory, offset, schema, count)
        self._released = self._tail.load()

    def peek(self) -> Arrays | None:
        """Return the oldest value's arrays, valid until ``release``; None if the queue is empty."""
        # SYNC POINT: pairs with QueueWriter.publish.head: the values below it are whole.
        if self._head.load() == self._released:
            return None
        return self._slots.views[self._released % self._slots.count]

    def release(self) -> None:
        """Give the slot of the peeked value back to the writer."""
        self._released += 1
        # SYNC POINT: pairs with QueueWriter.claim.tail: all reads of the value are done.
        self._tail.store(self._released)
