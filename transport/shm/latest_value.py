"""Words, latest values and queues in memory that processes share. No lock, one writer each.

Guaranteed, wherever a writer dies, even by ``kill -9`` between two instructions:

* A ``LatestReader`` gets the newest value that was published whole. A value goes into a slot that
  nobody reads and becomes visible with one store; what was half written never was.
* A ``QueueReader`` gets every value that was published, once and in order. Counters live in the
  memory, so that a successor of the writer, or of the reader, goes on where the dead one stopped.

Rejected: one slot with a sequence number around it (a writer that dies inside leaves it odd for
ever), and any lock (its owner's death would hold it).
"""

from __future__ import annotations

from collections.abc import Mapping as MappingType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.compiled import compiled
from transport.schema import Schema
from transport.shm.atomics import fence, load_acquire, store_release
from transport.shm.segment import Mapping

LINE = 128
"""Counters are this far apart: processors fetch cache lines in pairs."""
LATEST_SLOTS = 4
"""One visible, one being written; two more, so that a reader is overtaken only when it was held up
for two whole publications, and then reads again."""

Views = MappingType[str, NDArray[Any]]


def _fence_impl() -> None:
    fence()


_fence = compiled("void()", _fence_impl)


class AtomicInt64:
    """One int64 that one process writes and others read."""

    NBYTES = LINE

    def __init__(self, memory: Mapping, offset: int) -> None:
        self._address = memory.address + offset

    def load(self) -> int:
        """The value, and with it everything its writer wrote before."""
        return int(load_acquire(self._address))

    def store(self, value: int) -> None:
        store_release(self._address, value)


class _Slots:
    """Room for ``count`` values of ``schema``, behind two counters."""

    def __init__(self, memory: Mapping, offset: int, schema: Schema, count: int) -> None:
        self.schema, self.count = schema, count
        self.head, self.tail = AtomicInt64(memory, offset), AtomicInt64(memory, offset + LINE)
        stride = _stride(schema)
        begin = offset + 2 * LINE
        self.blocks: list[NDArray[np.uint8]] = [
            memory.bytes[begin + i * stride : begin + i * stride + schema.nbytes]
            for i in range(count)
        ]
        self.views: list[Views] = [schema.views(block, writable=True) for block in self.blocks]


def slots_nbytes(schema: Schema, count: int) -> int:
    """Bytes that ``count`` values of ``schema`` and their counters take; a multiple of ``LINE``."""
    return 2 * LINE + count * _stride(schema)


def _stride(schema: Schema) -> int:
    return -(-max(1, schema.nbytes) // LINE) * LINE


class LatestWriter:
    """Publishes the newest value; older ones are forgotten. Allocates nothing per value."""

    def __init__(self, memory: Mapping, offset: int, schema: Schema) -> None:
        self._slots = _Slots(memory, offset, schema, LATEST_SLOTS)
        self._head = self._slots.head.load()

    def take_over(self) -> None:
        """Go on where another writer, dead by now, stopped."""
        self._head = self._slots.head.load()

    def claim(self) -> Views:
        """The next value's arrays, to be filled in wholly before ``publish``."""
        # What is written from here on must not be seen before the last publication is.
        _fence()
        return self._slots.views[(self._head + 1) % LATEST_SLOTS]

    def publish(self) -> None:
        self._head += 1
        self._slots.head.store(self._head)


class LatestReader:
    """Copies the newest value out.

    Attributes:
        values: The copy, by name; changed by ``refresh`` alone.
        sequence: Which value it is, counted from 1; 0 before the first.
    """

    def __init__(self, memory: Mapping, offset: int, schema: Schema) -> None:
        self._slots = _Slots(memory, offset, schema, LATEST_SLOTS)
        self._copy = np.zeros(schema.nbytes, np.uint8)
        self.values: Views = schema.views(self._copy)
        self.sequence = 0

    def refresh(self) -> bool:
        """Copy the newest value, if there is one that was not seen yet; whether there was."""
        head = self._slots.head.load()
        if head == self.sequence:
            return False
        while True:
            np.copyto(self._copy, self._slots.blocks[head % LATEST_SLOTS])
            _fence()
            newest = self._slots.head.load()
            # The writer may be at work in slot newest + 1: ours only when that is a lap ahead.
            if newest - head < LATEST_SLOTS - 1:
                break
            head = newest
        self.sequence = head
        return True


class QueueWriter:
    """The sending end of a queue of ``count`` values."""

    def __init__(self, memory: Mapping, offset: int, schema: Schema, count: int) -> None:
        self._slots = _Slots(memory, offset, schema, count)
        self._head = self._slots.head.load()
        self.refused = 0

    def take_over(self) -> None:
        """Go on where another writer, dead by now, stopped."""
        self._head = self._slots.head.load()

    def claim(self) -> Views | None:
        """The next value's arrays; None, and counted in ``refused``, while the queue is full."""
        if self._head - self._slots.tail.load() >= self._slots.count:
            self.refused += 1
            return None
        return self._slots.views[self._head % self._slots.count]

    def publish(self) -> None:
        self._head += 1
        self._slots.head.store(self._head)


class QueueReader:
    """The receiving end."""

    def __init__(self, memory: Mapping, offset: int, schema: Schema, count: int) -> None:
        self._slots = _Slots(memory, offset, schema, count)
        self._tail = self._slots.tail.load()

    def peek(self) -> Views | None:
        """The oldest value's arrays, valid until ``release``; None when the queue is empty."""
        if self._slots.head.load() == self._tail:
            return None
        return self._slots.views[self._tail % self._slots.count]

    def release(self) -> None:
        """Give the slot of what was peeked back to the writer."""
        self._tail += 1
        self._slots.tail.store(self._tail)
