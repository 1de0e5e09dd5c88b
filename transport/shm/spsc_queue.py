"""A queue in memory that processes share: one writer, one reader, no lock.

Guaranteed, wherever one of the two dies, even by ``kill -9`` between two instructions: the reader
gets every value that was published, once and in order. The counters are in the memory, so a
successor of the writer, or of the reader, goes on where the dead one stopped.
"""

from __future__ import annotations

from transport.channel import Arrays
from transport.schema import Schema
from transport.shm.atomics import CACHE_LINES, AtomicInt64
from transport.shm.segment import Mapping
from transport.shm.slot_array import SlotArray


def queue_nbytes(schema: Schema, count: int) -> int:
    """Bytes that a queue of ``count`` values takes; a multiple of ``CACHE_LINES``."""
    return 2 * CACHE_LINES + SlotArray.nbytes(schema, count)


class _Queue:
    """What both ends see: the counters of values published and released, and the slots."""

    def __init__(self, memory: Mapping, offset: int, schema: Schema, count: int) -> None:
        self._head = AtomicInt64(memory, offset)
        self._tail = AtomicInt64(memory, offset + CACHE_LINES)
        self._slots = SlotArray(memory, offset + 2 * CACHE_LINES, schema, count)


class QueueWriter(_Queue):
    """The sending end of a queue of ``count`` values.

    Attributes:
        refused: How often the queue was full.
    """

    def __init__(self, memory: Mapping, offset: int, schema: Schema, count: int) -> None:
        super().__init__(memory, offset, schema, count)
        self.published = self._head.load()
        self.refused = 0

    def take_over(self) -> None:
        """Go on where another writer, dead by now, stopped."""
        self.published = self._head.load()

    def claim(self) -> Arrays | None:
        """The next value's arrays; None, and counted in ``refused``, while the queue is full."""
        # SYNC POINT: pairs with QueueReader.release.tail: the reader is done with what is below.
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
    """The receiving end."""

    def __init__(self, memory: Mapping, offset: int, schema: Schema, count: int) -> None:
        super().__init__(memory, offset, schema, count)
        self._released = self._tail.load()

    def peek(self) -> Arrays | None:
        """The oldest value's arrays, valid until ``release``; None when the queue is empty."""
        # SYNC POINT: pairs with QueueWriter.publish.head: the values below it are whole.
        if self._head.load() == self._released:
            return None
        return self._slots.views[self._released % self._slots.count]

    def release(self) -> None:
        """Give the slot of what was peeked back to the writer."""
        self._released += 1
        # SYNC POINT: pairs with QueueWriter.claim.tail: what was read of the value is read.
        self._tail.store(self._released)
