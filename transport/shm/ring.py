"""A ring of fixed slots from one process to one other, without a lock.

Two segments, one per direction of writing: each side writes its own and maps the other's
read-only. A direction's headers, payloads and ``head`` (messages published) are in the writer's
segment, its ``tail`` (messages released) is in the reader's; every counter has cache lines of its
own.

Order is the whole protocol. Writer: payload, header, store-release ``head``. Reader: load-acquire
``head``, copy the header, believe the copy only when it fits, store-release ``tail``. A death at
any instruction leaves a slot unpublished or unreleased; nothing to repair.

Sleeping needs one thing more. A reader that is about to sleep stores ``asleep``, then looks at
``head`` again; a writer stores ``head``, then looks at ``asleep``; both with a full fence in
between. Whatever the interleaving, one of the two sees the other: either the reader does not go to
sleep, or the writer rings its bell. Acquire and release alone allow both to miss.

Headers go round by sequence; a header says where its payload is, and the writer takes the lowest
place that is free. So an exchange of one question and one answer stays in one payload, warm in the
caches, and the others cost nothing until they are needed.

Rejected: a lock or a semaphore around the slots (its owner's death would hold it for ever); one
segment for both directions (a reader that runs wild could then overwrite what it reads); ringing
the bell always (a system call per message, the dearest part of it, mostly for nobody). What runs
once per message is compiled, in ``transport.shm.ring_kernels``: in Python the same few loads and
stores cost ten times as much.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transport.base import KINDS, Record
from transport.channel import MAX_BODY_BYTES, Kind
from transport.errors import ProtocolError
from transport.schema import Schema
from transport.shm import ring_kernels
from transport.shm.atomics import load_acquire, spin, store_release
from transport.shm.segment import Mapping
from transport.shm.segment_layout import SegmentLayout
from transport.slot_views import Views


def _state(
    dtype: np.dtype[Any], own: Mapping, peer: Mapping, epoch: bytes, layout: SegmentLayout
) -> NDArray[Any]:
    """What ``steps.WRITER`` and ``steps.READER`` have in common, filled in."""
    state = np.zeros((), dtype)
    state["own"], state["peer"], state["slots"] = own.address, peer.address, layout.slots
    state["epoch_low"], state["epoch_high"] = np.frombuffer(epoch, np.int64)
    return state


class RingWriter:
    """The sending end. ``own`` is written, ``peer`` only read.

    Attributes:
        reader_sleeps: Whether the last ``publish`` found a reader whose bell must be rung.
    """

    def __init__(
        self, own: Mapping, peer: Mapping, epoch: bytes, schema: Schema, layout: SegmentLayout
    ) -> None:
        self._own, self._layout, self._length = own, layout, schema.nbytes
        self._closed_at = own.address + layout.closed_offset
        self._reader_asleep_at = peer.address + layout.asleep_offset
        self._reader_tail_at = peer.address + layout.tail_offset
        self._record = _state(ring_kernels.WRITER, own, peer, epoch, layout)
        self._record["published"] = load_acquire(own.address + layout.head_offset)
        self._state: int = self._record.ctypes.data
        self.reader_sleeps = False
        self._views: list[dict[str, NDArray[Any]]] = [
            schema.views(layout.payload(own.bytes, place), writable=True)
            for place in range(layout.slots)
        ]
        self._claimed = ring_kernels.NO_PLACE

    def claim(self) -> dict[str, NDArray[Any]] | None:
        """Views of where the next payload goes, or None while the reader holds every place.

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
        """Make the next message visible, DATA as it is or with ``body``; False without a place."""
        if self._claimed < 0 and self.claim() is None:
            return False
        number, length = ring_kernels.DATA, self._length
        if body is not None:
            number, length = int(kind), len(body)
            start = self._layout.payload_offset(self._claimed)
            self._own.buffer[start : start + length] = body
        said = ring_kernels.publish(self._state, request_id, budget_ns, number, length)
        self._claimed = ring_kernels.NO_PLACE
        self.reader_sleeps = said == ring_kernels.PUBLISHED_TO_A_SLEEPER
        return True

    @property
    def reader_asleep(self) -> bool:
        """Whether the reader has asked for its bell. A hint: ``publish`` looks with a fence."""
        return bool(self._views and load_acquire(self._reader_asleep_at))

    def close(self) -> None:
        """Say that nothing will follow; let go of the memory. The mappings are the channel's."""
        if self._views:
            # SYNC POINT: pairs with take.closed: publishes that the last head is stored.
            store_release(self._closed_at, 1)
            self._views.clear()

    def _bad_tail(self) -> ProtocolError:
        tail = load_acquire(self._reader_tail_at)
        first, last = self._record["released"], self._record["published"]
        return ProtocolError(f"tail: got {tail}, expected {first} to {last}")


class RingReader:
    """The receiving end. ``own`` is written (the tail), ``peer`` only read.

    Attributes:
        dropped_epoch, dropped_malformed: Slots passed over, by cause.
        closed: Whether the writer has said that nothing will follow.
    """

    def __init__(
        self, own: Mapping, peer: Mapping, epoch: bytes, schema: Schema, layout: SegmentLayout
    ) -> None:
        self._peer, self._layout = peer, layout
        self._head_at = peer.address + layout.head_offset
        self._asleep_at = own.address + layout.asleep_offset
        self._record = _state(ring_kernels.READER, own, peer, epoch, layout)
        self._record["data_length"] = schema.nbytes
        self._state: int = self._record.ctypes.data
        self._cursor = 0
        self._views: list[Views] = [
            Views(schema, peer.buffer, layout.payload_offset(place))
            for place in range(layout.slots)
        ]
        self.dropped_epoch = self.dropped_malformed = 0
        self.closed = False

    @property
    def unread(self) -> bool:
        """Whether something is published that was not taken. A hint: ``take`` synchronizes."""
        return bool(load_acquire(self._head_at) != self._cursor)

    def spin(self, rounds: int) -> bool:
        """As ``unread``, but watch for that many rounds (tens of nanoseconds each)."""
        return bool(spin(self._head_at, self._cursor, rounds) != self._cursor)

    def take(self) -> Record | None:
        """The next valid message, held until ``release``; None when there is none.

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
                    return Record(Kind.DATA, request_id, budget_ns, sequence, views, b"")
                if number in KINDS and length <= MAX_BODY_BYTES:
                    self._cursor = sequence + 1
                    start = self._layout.payload_offset(place)
                    body = bytes(self._peer.buffer[start : start + length])
                    return Record(KINDS[number], request_id, budget_ns, sequence, None, body)
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

    def fall_asleep(self) -> bool:
        """From now on the writer rings; False when something came first: then do not sleep."""
        return bool(ring_kernels.fall_asleep(self._state))

    def wake_up(self) -> None:
        """The writer need not ring any more. Not a sync point: it may ring once too often."""
        store_release(self._asleep_at, 0)

    def close(self) -> None:
        """Let go of the memory; releases that come later do nothing."""
        self._views.clear()
