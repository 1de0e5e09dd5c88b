"""A ring of fixed slots from one process to one other, without a lock.

Two segments, one per direction of writing: each side writes its own and maps the other's
read-only. A direction's slots and ``head`` (messages published) are in the writer's segment, its
``tail`` (messages released) is in the reader's; every counter has cache lines of its own.

Order is the whole protocol. Writer: payload, slot header, store-release ``head``. Reader:
load-acquire ``head``, copy the slot header, believe the copy only when it fits, store-release
``tail``. A death at any instruction leaves a slot unpublished or unreleased; nothing to repair.

Rejected: a lock or a semaphore around the slots (its owner's death would hold it for ever), and
one segment for both directions (a reader that runs wild could then overwrite what it reads).
"""

from __future__ import annotations

import struct
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from transport.atomics import load_acquire, spin, store_release
from transport.base import KINDS, Record
from transport.channel import MAX_BODY_BYTES, Arrays, Kind
from transport.errors import ProtocolError
from transport.layout import Layout
from transport.schema import Schema
from transport.shm import Mapping
from transport.window import Window

_HEADER = struct.Struct("<16sqqqIi")
"""Epoch, sequence, request id, budget_ns, kind, length of the payload."""


class RingWriter:
    """The sending end. ``own`` is written, ``peer`` only read."""

    def __init__(
        self, own: Mapping, peer: Mapping, epoch: bytes, schema: Schema, layout: Layout
    ) -> None:
        self._own, self._layout, self._epoch = own, layout, epoch
        self._head_at = own.address + layout.head_offset
        self._tail_at = peer.address + layout.tail_offset
        self._length = schema.nbytes
        self._head = load_acquire(self._head_at)
        self._tail = 0
        self._views: list[dict[str, NDArray[Any]]] = [
            schema.views(layout.payload(own.bytes, slot), writable=True)
            for slot in range(layout.slots)
        ]

    def claim(self) -> dict[str, NDArray[Any]] | None:
        """Views of the next slot, or None while the reader still holds it.

        Raises:
            ProtocolError: The reader's tail is impossible.
        """
        return self._views[self._head % self._layout.slots] if self._free() else None

    def publish(self, kind: Kind, request_id: int, budget_ns: int, body: bytes | None) -> bool:
        """Make the next slot visible, DATA as it is or with ``body``; False while it is taken."""
        if not self._free():
            return False
        slot = self._head % self._layout.slots
        length = self._length
        if body is not None:
            length = len(body)
            start = self._layout.payload_offset(slot)
            self._own.buffer[start : start + length] = body
        _HEADER.pack_into(
            self._own.buffer,
            self._layout.header_offset(slot),
            self._epoch,
            self._head,
            request_id,
            budget_ns,
            kind,
            length,
        )
        self._head += 1
        store_release(self._head_at, self._head)
        return True

    def close(self) -> None:
        """Let go of the memory; the mappings are the channel's to close."""
        self._views.clear()

    def _free(self) -> bool:
        if self._head - self._tail < self._layout.slots:
            return True
        tail = load_acquire(self._tail_at)
        if not self._tail <= tail <= self._head:
            raise ProtocolError(f"tail: got {tail}, expected {self._tail} to {self._head}")
        self._tail = tail
        return self._head - tail < self._layout.slots


class RingReader:
    """The receiving end. ``own`` is written (the tail), ``peer`` only read.

    Attributes:
        dropped_epoch, dropped_malformed: Slots passed over, by cause.
    """

    def __init__(
        self, own: Mapping, peer: Mapping, epoch: bytes, schema: Schema, layout: Layout
    ) -> None:
        self._peer, self._layout, self._epoch = peer, layout, epoch
        self._head_at = peer.address + layout.head_offset
        self._tail_at = own.address + layout.tail_offset
        self._length = schema.nbytes
        self._window = Window(layout.slots)
        self._views: list[Arrays] = [
            MappingProxyType(schema.views(layout.payload(peer.bytes, slot)))
            for slot in range(layout.slots)
        ]
        self.dropped_epoch = self.dropped_malformed = 0

    @property
    def unread(self) -> bool:
        """Whether something is published that was not taken."""
        return load_acquire(self._head_at) != self._window.cursor

    def spin(self, rounds: int) -> bool:
        """As ``unread``, but watch for that many rounds (tens of nanoseconds each)."""
        cursor = self._window.cursor
        return spin(self._head_at, cursor, rounds) != cursor

    def take(self) -> Record | None:
        """The next valid message, held until ``release``; None when there is none.

        Raises:
            ProtocolError: The writer's head is impossible.
        """
        window = self._window
        while True:
            head = load_acquire(self._head_at)
            if head == window.cursor:
                return None
            if not window.cursor < head <= window.tail + window.slots:
                raise ProtocolError(
                    f"head: got {head}, expected {window.cursor} to {window.tail + window.slots}"
                )
            sequence = window.take()
            record = self._read(sequence)
            if record is not None:
                return record
            self.release(sequence)

    def release(self, sequence: int) -> None:
        if self._views and self._window.release(sequence):
            store_release(self._tail_at, self._window.tail)

    def close(self) -> None:
        """Let go of the memory; releases that come later do nothing."""
        self._views.clear()

    def _read(self, sequence: int) -> Record | None:
        slot = sequence % self._layout.slots
        start = self._layout.header_offset(slot)
        # A copy first: the slot belongs to the peer, and what was checked must be what is used.
        header = bytes(self._peer.buffer[start : start + _HEADER.size])
        epoch, written, request_id, budget_ns, number, length = _HEADER.unpack(header)
        if epoch != self._epoch:
            self.dropped_epoch += 1
            return None
        kind = KINDS.get(number)
        valid = kind is not None and written == sequence and request_id >= 0 and budget_ns >= 0
        if kind is Kind.DATA:
            if valid and length == self._length:
                return Record(kind, request_id, budget_ns, sequence, self._views[slot], b"")
        elif kind is not None and valid and 0 <= length <= MAX_BODY_BYTES:
            start = self._layout.payload_offset(slot)
            body = bytes(self._peer.buffer[start : start + length])
            return Record(kind, request_id, budget_ns, sequence, None, body)
        self.dropped_malformed += 1
        return None
