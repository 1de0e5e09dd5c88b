"""A channel over ZMQ frames, with the slots of a ring.

A message is one frame: a fixed header, then the payload in the schema's layout. One frame and not
two, because each costs a call, a lookup and an allocation on either side. The sender writes header
and payload into one buffer of its own, which ZMQ sends from there; the receiver looks at the frame
where ZMQ put it. So the only copies are the caller's and the kernel's.

Every header says two counts of its sender: messages released, and messages received. The first
tells how many of the four slots are free: ``send`` says ``WouldBlock`` exactly where a
shared-memory ring would, and a peer that stopped reading costs four messages of memory, not a
queue. The second tells which buffers ZMQ is done with, as soon as an answer says that the question
arrived: an exchange of one request and one answer stays in one buffer, warm in the cache. A credit
message of its own is only sent when half of the slots were released and nothing else was there to
carry the news.

ZMQ delivers whole messages in order while a connection lasts. When it breaks the session is over:
a client sees the disconnect, and what an earlier epoch left under way is dropped and counted.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from transport.base import KINDS, SLOTS, BaseChannel, Record
from transport.channel import MAX_BODY_BYTES, Kind
from transport.errors import PeerGone
from transport.handshake_messages import EPOCH_BYTES, MAGIC, PROTOCOL_VERSION, Opcode
from transport.receive_window import Window
from transport.schema import USED, Schema
from transport.slot_views import Views
from transport.zeromq.client_socket import HEADER_ROOM
from transport.zeromq.send_buffers import Staging

_HEADER = struct.Struct(f"<4sHH{EPOCH_BYTES}sqqqqqI")
"""The control prefix; then sequence, released, received, request id, budget_ns, kind."""
PAYLOAD_OFFSET = HEADER_ROOM
"""Where the payload begins in a frame that has one: on a cache line, behind the header's two."""


class Carrier(Protocol):
    """Brings frames to the peer and hands back what came: a client's own socket, or the server's
    one socket that all its sessions share."""

    def send(self, frame: Any) -> bool:
        """Queue one frame; False when the queue is full. A large one is not copied.

        Raises:
            PeerGone: As it says.
        """

    def pump(self, timeout_s: float) -> str | None:
        """Deliver what has come, waiting for it at most so long; why the peer is gone, if so."""

    def close(self, reason: str) -> None:
        """End the session; the peer is told."""


class ZmqChannel(BaseChannel):
    """One side. Frames come in through ``deliver``."""

    transport = "zmq"

    def __init__(
        self, send_schema: Schema, recv_schema: Schema, epoch: bytes, carrier: Carrier
    ) -> None:
        super().__init__(send_schema, recv_schema)
        self._epoch, self._carrier = epoch, carrier
        self._staging = Staging(send_schema, PAYLOAD_OFFSET)
        self._head = self._peer_tail = self._told = 0
        self._looked = False
        self._window = Window(SLOTS)
        self._inbox: deque[Record] = deque()

    @property
    def unread(self) -> bool:
        return self._closed is None and bool(self._inbox)

    def deliver(self, frame: memoryview) -> None:
        """Take in a MESSAGE or a CREDIT. What does not belong here is counted and dropped."""
        if len(frame) < _HEADER.size:
            self.dropped_malformed += 1
            return
        _, _, opcode, epoch, sequence, released, received, request_id, budget, number = (
            _HEADER.unpack_from(frame)
        )
        if epoch != self._epoch:
            self.dropped_epoch += 1
            return
        window = self._window
        expected = opcode == Opcode.CREDIT or (sequence == window.cursor and not window.full)
        if not self._peer_tail <= released <= received <= self._head or not expected:
            self.dropped_malformed += 1
            return
        self._peer_tail = released
        self._staging.reclaim(received)
        if opcode == Opcode.CREDIT:
            return
        window.take()
        record = self._record(frame, sequence, request_id, budget, number)
        if record is None:
            self.dropped_malformed += 1
            self._release(sequence)
        else:
            self._inbox.append(record)

    def end(self, reason: str) -> None:
        """The peer is no more."""
        if self.gone is None:
            self.gone = reason

    def _record(
        self, frame: memoryview, sequence: int, request_id: int, budget: int, number: int
    ) -> Record | None:
        """The message, if it is what its header says; no payload is believed without."""
        kind = KINDS.get(number)
        if kind is None or request_id < 0 or budget < 0:
            return None
        if kind is Kind.DATA:
            schema = self.recv_schema.cut(len(frame) - PAYLOAD_OFFSET)
            if schema is None:
                return None
            views = Views(schema, *_aligned(frame))
            if (
                schema.tail is not None
                and views.arrays[schema.tail + USED] != (schema.specs[schema.tail].shape[0])
            ):
                return None
            return Record(kind, request_id, budget, sequence, views, b"")
        if len(frame) > _HEADER.size + MAX_BODY_BYTES:
            return None
        return Record(kind, request_id, budget, sequence, None, bytes(frame[_HEADER.size :]))

    def _claim(self) -> dict[str, NDArray[Any]] | None:
        return self._staging.claim().arrays if self._free() else None

    def _publish(self, kind: Kind, request_id: int, budget_ns: int, body: bytes | None) -> bool:
        if not self._free():
            return False
        frame: Any
        if body is None:
            buffer = self._staging.claim()
            frame = buffer.frame
            if self.send_schema.tail is not None:
                frame = frame[: PAYLOAD_OFFSET + self.send_schema.length(buffer.arrays)]
            self._write_header(frame, Opcode.MESSAGE, request_id, budget_ns, kind)
        else:
            frame = bytearray(_HEADER.size)
            self._write_header(frame, Opcode.MESSAGE, request_id, budget_ns, kind)
            frame += body
        try:
            if not self._carrier.send(frame):
                return False
        except PeerGone as error:
            self.end(str(error))
            raise
        if body is None:
            self._staging.sent(self._head)
        self._head += 1
        self._told = self._window.tail
        return True

    def _take(self) -> Record | None:
        self._give_credit()
        if not self._inbox and self.gone is None:
            self._pump(0.0)
            self._looked = True
        return self._inbox.popleft() if self._inbox else None

    def _release(self, sequence: int) -> None:
        if self._closed is None and self._window.release(sequence):
            self._give_credit()

    def _look_for_peer(self) -> None:
        """Not again right after ``_take`` did: the socket's thread waits for this processor."""
        if not self._looked:
            self._pump(0.0)
        self._looked = False

    def _wait(self, timeout_s: float) -> None:
        self._pump(timeout_s)

    def _close(self, reason: str) -> None:
        self._inbox.clear()
        self._carrier.close(reason)

    def _free(self) -> bool:
        if self._head - self._peer_tail >= SLOTS and self.gone is None:
            self._pump(0.0)
        return self._head - self._peer_tail < SLOTS

    def _pump(self, timeout_s: float) -> None:
        gone = self._carrier.pump(timeout_s)
        if gone is not None:
            self.end(gone)

    def _give_credit(self) -> None:
        """Say what was released, once it is worth a message of its own."""
        if self._window.tail - self._told < SLOTS // 2 or self.gone is not None:
            return
        frame = bytearray(_HEADER.size)
        self._write_header(frame, Opcode.CREDIT)
        try:
            if self._carrier.send(frame):
                self._told = self._window.tail
        except PeerGone as error:
            self.end(str(error))

    def _write_header(
        self, frame: Any, opcode: Opcode, request_id: int = 0, budget_ns: int = 0, kind: int = 0
    ) -> None:
        _HEADER.pack_into(
            frame,
            0,
            MAGIC,
            PROTOCOL_VERSION,
            opcode,
            self._epoch,
            self._head,
            self._window.tail,
            self._window.cursor,
            request_id,
            budget_ns,
            kind,
        )


def _aligned(frame: memoryview) -> tuple[Any, int]:
    """The payload's memory and its offset there; a copy where ZMQ put a small frame at an odd
    address."""
    short = len(frame) < PAYLOAD_OFFSET + np.dtype(np.int64).itemsize
    if not short and np.frombuffer(frame, np.int64, 1, PAYLOAD_OFFSET).flags.aligned:
        return frame, PAYLOAD_OFFSET
    # One byte at least: numpy makes no array of none, and a schema may have no arrays.
    return bytes(frame[PAYLOAD_OFFSET:]) or b"\0", 0
