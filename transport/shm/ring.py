"""A lock-free ring of fixed slots, from one writing process to one reading process.

There are two segments. Each side writes its own and maps the other's read-only. A direction's
headers, payloads and ``head`` (messages published) are in the writer's segment. Its ``tail``
(messages released) is in the reader's. Every counter has its own cache lines.

The protocol is the order of accesses. Writer: payload, header, store-release ``head``. Reader:
load-acquire ``head``, copy the header, check the copy, store-release ``tail``. A death at any
instruction leaves a slot unpublished or unreleased, and nothing has to be repaired.

Sleeping needs a full fence as well. A reader that is about to sleep stores ``asleep``, then loads
``head`` again. A writer stores ``head``, then loads ``asleep``. Both have the fence in between, so
in every interleaving at least one sees the other's store: either the reader does not sleep, or the
writer signals its eventfd. Acquire and release alone would allow both to miss it.

Headers are indexed by sequence number. A header says where its payload is, and the writer uses the
lowest free place. So an exchange of one request and one reply stays in one payload, which the
caches hold, and the other places cost nothing until they are needed.

Rejected: a lock or a semaphore around the slots (a dead owner would hold it forever); one segment
for both directions (a faulty reader could overwrite what it reads); a signal for every message (a
system call per message, its most expensive part, and mostly not needed). Everything that runs once
per message is compiled, in ``transport.shm.ring_kernels``: in Python the same few loads and stores
cost ten times as much.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transport.base_channel import KINDS, ReceivedMessage
from transport.channel import MAX_BODY_BYTES, Kind
from transport.errors import ProtocolError
from transport.schema import Schema
from transport.shm import ring_kernels
from transport.shm.atomics import load_acquire, spin, store_release
from transport.shm.segment import MappedSegment
from transport.shm.segment_layout import SegmentLayout
from transport.slot_views import SlotViews


def _state(
    dtype: np.dtype[Any],
    own: MappedSegment,
    peer: MappedSegment,
    epoch: bytes,
    layout: SegmentLayout,
) -> NDArray[Any]:
    """Make a ``ring_kernels.WRITER`` or ``READER`` record and fill in their common fields."""
    state = np.zeros((), dtype)
    state["own"], state["peer"], state["slots"] = own.address, peer.address, layout.slots
    state["epoch_low"], state["epoch_high"] = np.frombuffer(epoch, np.int64)
    return state


class RingWriter:
    """The sending end of a ring. It writes ``own`` and only reads ``peer``.

    Attributes:
        must_signal_reader: Whether the last ``publish`` found a sleeping reader, whose eventfd must
            be written.
    """

    def __init__(
        self,
        own: MappedSegment,
        peer: MappedSegment,
        epoch: bytes,
        schema: Schema,
        layout: SegmentLayout,
    ) -> None:
        self._own, self._layout, self._length = own, layout, schema.nbytes
        self._closed_at = own.address + layout.closed_offset
        self._reader_asleep_at = peer.address + layout.asleep_offset
        self._reader_tail_at = peer.address + layout.tail_offset
        self._record = _state(ring_kernels.WRITER, own, peer, epoch, layout)
        self._record["published"] = load_acquire(own.address + layout.head_offset)
        self._state: int = self._record.ctypes.data
        self.must_signal_reader = False
        self._views: list[dict[str, NDArray[Any]]] = [
            schema.views(layout.payload(own.bytes, place), writable=True)
            for place in range(layout.slots)
        ]
        self._claimed = ring_kernels.NO_PLACE

    def claim(self) -> dict[str, NDArray[Any]] | None:
        """Return views of the next payload's place, or None while the reader holds every place.

        Raises:
            ProtocolError: The reader's tail is impossible.
        """
        place = self._claimed
        if place < 0:
            place = ring_kernels.claim(self._state)
            if place < 0:
                if place == ring_kernels.BAD_TAIL:
                    raise self._bad_tail()
                return None
            self._claimed = place
        return self._views[place]

    def publish(self, kind: Kind, request_id: int, budget_ns: int, body: bytes | None) -> bool:
        """Publish the next message: the claimed DATA, or ``body``. False if no place is free."""
        if self._claimed < 0 and self.claim() is None:
            return False
        number, length = ring_kernels.DATA, self._length
        if body is not None:
            number, length = int(kind), len(body)
            start = self._layout.payload_offset(self._claimed)
            self._own.buffer[start : start + length] = body
        outcome = ring_kernels.publish(self._state, request_id, budget_ns, number, length)
        self._claimed = ring_kernels.NO_PLACE
        self.must_signal_reader = outcome == ring_kernels.PUBLISHED_READER_ASLEEP
        return True

    @property
    def reader_asleep(self) -> bool:
        """Whether the reader sleeps. A hint, without the fence that ``publish`` uses."""
        return bool(self._views and load_acquire(self._reader_asleep_at))

    def close(self) -> None:
        """Set the flag that no message follows, and drop all views. The channel unmaps them."""
        if self._views:
            # SYNC POINT: pairs with take.closed: publishes that the last head is stored.
            store_release(self._closed_at, 1)
            self._views.clear()

    def _bad_tail(self) -> ProtocolError:
        tail = load_acquire(self._reader_tail_at)
        first, last = self._record["released"], self._record["published"]
        return ProtocolError(f"tail: got {tail}, expected {first} to {last}")


class RingReader:
    """The receiving end of a ring. It writes the tail in ``own`` and only reads ``peer``.

    Attributes:
        dropped_epoch, dropped_malformed: Number of dropped messages, by cause.
        closed: Whether the writer has set the flag that no message follows.
    """

    def __init__(
        self,
        own: MappedSegment,
        peer: MappedSegment,
        epoch: bytes,
        schema: Schema,
        layout: SegmentLayout,
    ) -> None:
        self._peer, self._layout = peer, layout
        self._head_at = peer.address + layout.head_offset
        self._asleep_at = own.address + layout.asleep_offset
        self._record = _state(ring_kernels.READER, own, peer, epoch, layout)
        self._record["data_length"] = schema.nbytes
        self._state: int = self._record.ctypes.data
        self._cursor = 0
        self._views: list[SlotViews] = [
            SlotViews(schema, peer.buffer, layout.payload_offset(place))
            for place in range(layout.slots)
        ]
        self.dropped_epoch = self.dropped_malformed = 0
        self.closed = False

    @property
    def unread(self) -> bool:
        """Whether a message was published and not taken. A hint: ``take`` synchronizes."""
        return bool(load_acquire(self._head_at) != self._cursor)

    def spin(self, rounds: int) -> bool:
        """As ``unread``, but poll for ``rounds`` rounds of tens of nanoseconds each."""
        return bool(spin(self._head_at, self._cursor, rounds) != self._cursor)

    def take(self) -> ReceivedMessage | None:
        """Take the next valid message, held until ``release``; None if there is none.

        Raises:
            ProtocolError: The writer's head is impossible.
        """
        while True:
            found, sequence, request_id, budget_ns, number, length, place = ring_kernels.take(
                self._state
            )
            if found == ring_kernels.TAKEN:
                if number == ring_kernels.DATA:
                    self._cursor = sequence + 1
                    views = self._views[place]
                    return ReceivedMessage(Kind.DATA, request_id, budget_ns, sequence, views, b"")
                if number in KINDS and length <= MAX_BODY_BYTES:
                    self._cursor = sequence + 1
                    start = self._layout.payload_offset(place)
                    body = bytes(self._peer.buffer[start : start + length])
                    return ReceivedMessage(
                        KINDS[number], request_id, budget_ns, sequence, None, body
                    )
            if found <= ring_kernels.CLOSED:
                self.closed = found == ring_kernels.CLOSED
                return None
            if found == ring_kernels.IMPOSSIBLE:
                first = int(self._record["released"]) + self._layout.slots
                raise ProtocolError(f"head: got {sequence}, expected {self._cursor} to {first}")
            if found == ring_kernels.OTHER_EPOCH:
                self.dropped_epoch += 1
            else:
                self.dropped_malformed += 1
            self._cursor = sequence + 1
            self.release(sequence)

    def release(self, sequence: int) -> None:
        """Give a slot back. Does nothing after ``close``."""
        if self._views:
            ring_kernels.release(self._state, sequence)

    def prepare_to_wait(self) -> bool:
        """Have the writer signal; False if a message arrived first: then do not sleep."""
        return bool(ring_kernels.prepare_to_wait(self._state))

    def finish_wait(self) -> None:
        """Stop the writer's signals. Not a sync point: one surplus signal may still arrive."""
        store_release(self._asleep_at, 0)

    def close(self) -> None:
        """Drop all views; later calls of ``release`` do nothing."""
        self._views.clear()
