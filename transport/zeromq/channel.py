"""A channel over ZMQ frames, with the slots of a ring.

A message is one frame: a fixed header, then the payload in the schema's layout. It is not two
frames, because each costs a call, a lookup and an allocation on either side. The sender writes
header and payload into one buffer, and ZMQ sends from that buffer. The receiver reads the frame
where ZMQ put it, and copies a short one into a slot. So the only copies of long messages are the
caller's and the kernel's.

Every header holds two counts of its sender: messages released and messages received. The first
gives the number of free slots. So ``send`` raises ``WouldBlock`` exactly where a shared-memory ring
would, and a peer that stopped reading costs four messages of memory, not a queue. The second shows
which buffers may be reused: a reply shows that the request arrived, so an exchange of one request
and one reply stays in one buffer, which the cache holds. A separate CREDIT message is sent only
when half of the slots were released and no other message carried the count.

ZMQ delivers whole messages in order while a connection lasts. A broken connection ends the session:
a client sees the disconnect, and late messages of an earlier epoch are dropped and counted.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from transport.base_channel import KINDS, SLOTS, BaseChannel, ReceivedMessage
from transport.channel import MAX_BODY_BYTES, Kind
from transport.errors import PeerGone
from transport.handshake_messages import EPOCH_BYTES, MAGIC, PROTOCOL_VERSION, Opcode
from transport.receive_window import ReceiveWindow
from transport.schema import USED, Schema
from transport.slot_views import SlotViews
from transport.zeromq.client_socket import HEADER_ROOM
from transport.zeromq.receive_slots import MAX_SLOT_BYTES, ReceiveSlots
from transport.zeromq.send_buffers import SendBuffers

_HEADER = struct.Struct(f"<4sHH{EPOCH_BYTES}sqqqqqI")
"""The control prefix; then sequence, released, received, request id, budget_ns, kind."""
_CHECK_EVERY_NS = 1_000_000
"""How often a caller that never waits looks whether its peer is still there."""
_MESSAGE, _CREDIT = int(Opcode.MESSAGE), int(Opcode.CREDIT)  # an enum costs more
PAYLOAD_OFFSET = HEADER_ROOM
"""Where the payload begins in a DATA frame: on a cache line, after the header's two."""


class FrameConnection(Protocol):
    """Sends and receives the frames of one session: over a client's own socket, or over the
    server's socket, which all sessions share."""

    def send(self, frame: Any) -> bool:
        """Queue one frame; False if the queue is full. A large frame is not copied.

        Raises:
            PeerGone: The connection broke.
        """

    def pump(self, timeout_s: float) -> str | None:
        """Deliver received frames, waiting at most ``timeout_s``; why the peer is gone, or None."""

    def close(self, reason: str) -> None:
        """End the session and send ``reason`` to the peer."""


class ZmqChannel(BaseChannel):
    """One side of a session over ZMQ. Received frames are passed to ``deliver``."""

    transport = "zmq"

    def __init__(
        self, send_schema: Schema, recv_schema: Schema, epoch: bytes, connection: FrameConnection
    ) -> None:
        super().__init__(send_schema, recv_schema)
        self._epoch, self._connection = epoch, connection
        self._send_buffers = SendBuffers(send_schema, PAYLOAD_OFFSET)
        self._head = self._peer_tail = self._released_sent = 0
        self._next_check_ns = 0
        self._window = ReceiveWindow(SLOTS)
        self._inbox: deque[ReceivedMessage] = deque()
        short = recv_schema.tail is None and recv_schema.nbytes <= MAX_SLOT_BYTES
        self._slots = ReceiveSlots(recv_schema, SLOTS) if short else None

    @property
    def unread(self) -> bool:
        """See ``BaseChannel.unread``."""
        return self._closed is None and bool(self._inbox)

    def deliver(self, frame: memoryview) -> None:
        """Process a received MESSAGE or CREDIT frame. Invalid frames are dropped and counted."""
        if len(frame) < _HEADER.size:
            self.dropped_malformed += 1
            return
        magic, _, opcode, epoch, sequence, released, received, request_id, budget, number = (
            _HEADER.unpack_from(frame)
        )
        if epoch != self._epoch:
            self.dropped_epoch += 1
            return
        window = self._window
        if opcode == _MESSAGE:
            expected = magic == MAGIC and sequence == window.cursor and not window.full
        else:
            expected = magic == MAGIC and opcode == _CREDIT
        if not self._peer_tail <= released <= received <= self._head or not expected:
            self.dropped_malformed += 1
            return
        self._peer_tail = released
        self._send_buffers.reclaim(received)
        if opcode == _CREDIT:
            return
        window.take()
        record = self._record(frame, sequence, request_id, budget, number)
        if record is None:
            self.dropped_malformed += 1
            self._release(sequence)
        else:
            self._inbox.append(record)

    def end(self, reason: str) -> None:
        """Record that the peer is gone, with the first ``reason``."""
        if self.gone_reason is None:
            self.gone_reason = reason

    def _record(
        self, frame: memoryview, sequence: int, request_id: int, budget: int, number: int
    ) -> ReceivedMessage | None:
        """Make the message; None if the frame does not match its header or the schema."""
        kind = KINDS.get(number)
        if kind is None or request_id < 0 or budget < 0:
            return None
        if kind is Kind.DATA:
            if self._slots is not None:
                views = self._slots.fill(sequence, frame[PAYLOAD_OFFSET:])
            else:
                views = self._views(frame)
            if views is None:
                return None
            return ReceivedMessage(kind, request_id, budget, sequence, views, b"")
        if len(frame) > _HEADER.size + MAX_BODY_BYTES:
            return None
        return ReceivedMessage(
            kind, request_id, budget, sequence, None, bytes(frame[_HEADER.size :])
        )

    def _views(self, frame: memoryview) -> SlotViews | None:
        """The arrays in a DATA frame, where ZMQ put them; None if it does not match the schema."""
        schema = self.recv_schema.cut(len(frame) - PAYLOAD_OFFSET)
        if schema is None:
            return None
        views = SlotViews(schema, *_aligned(frame))
        tail = schema.tail
        if tail is not None and views.arrays[tail + USED] != schema.specs[tail].shape[0]:
            return None
        return views

    def _claim(self) -> dict[str, NDArray[Any]] | None:
        return self._send_buffers.claim().arrays if self._free() else None

    def _publish(self, kind: Kind, request_id: int, budget_ns: int, body: bytes | None) -> bool:
        if not self._free():
            return False
        frame: Any
        if body is None:
            buffer = self._send_buffers.claim()
            frame = buffer.sendable
            if self.send_schema.tail is not None:
                frame = buffer.frame[: PAYLOAD_OFFSET + self.send_schema.length(buffer.arrays)]
            self._write_header(buffer.header, _MESSAGE, request_id, budget_ns, kind)
        else:
            frame = bytearray(_HEADER.size)
            self._write_header(frame, _MESSAGE, request_id, budget_ns, kind)
            frame += body
        try:
            if not self._connection.send(frame):
                return False
        except PeerGone as error:
            self.end(str(error))
            raise
        if body is None:
            self._send_buffers.sent(self._head)
        self._head += 1
        self._released_sent = self._window.tail
        return True

    def _take(self) -> ReceivedMessage | None:
        self._give_credit()
        if not self._inbox and self.gone_reason is None:
            self._pump(0.0)
        return self._inbox.popleft() if self._inbox else None

    def _release(self, sequence: int) -> None:
        if self._closed is None and self._window.release(sequence):
            self._give_credit()

    def _check_peer(self) -> None:
        """Pump, unless that was done in the last millisecond."""
        if time.monotonic_ns() >= self._next_check_ns:
            self._pump(0.0)

    def _wait(self, timeout_s: float) -> None:
        self._pump(timeout_s)

    def _close(self, reason: str) -> None:
        self._inbox.clear()
        self._connection.close(reason)

    def _free(self) -> bool:
        if self._head - self._peer_tail >= SLOTS and self.gone_reason is None:
            self._pump(0.0)
        return self._head - self._peer_tail < SLOTS

    def _pump(self, timeout_s: float) -> None:
        gone = self._connection.pump(timeout_s)
        self._next_check_ns = time.monotonic_ns() + _CHECK_EVERY_NS
        if gone is not None:
            self.end(gone)

    def _give_credit(self) -> None:
        """Send the released count in a CREDIT message, once half of the slots were released."""
        if self._window.tail - self._released_sent < SLOTS // 2 or self.gone_reason is not None:
            return
        frame = bytearray(_HEADER.size)
        self._write_header(frame, _CREDIT)
        try:
            if self._connection.send(frame):
                self._released_sent = self._window.tail
        except PeerGone as error:
            self.end(str(error))

    def _write_header(
        self, frame: Any, opcode: int, request_id: int = 0, budget_ns: int = 0, kind: int = 0
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
    """The payload's memory and its offset there; a copy if ZMQ put a small frame at an unaligned
    address."""
    short = len(frame) < PAYLOAD_OFFSET + np.dtype(np.int64).itemsize
    if not short and np.frombuffer(frame, np.int64, 1, PAYLOAD_OFFSET).flags.aligned:
        return frame, PAYLOAD_OFFSET
    # At least one byte: a schema may have no arrays, and numpy accepts no empty buffer.
    return bytes(frame[PAYLOAD_OFFSET:]) or b"\0", 0
