"""A channel over ZMQ frames, with the slots of a ring.

Frame 0 is a fixed header, frame 1 the payload in the schema's layout. Every header carries how
many messages its sender has released, so both ends know without asking how many of the four slots
are free: ``send`` says ``WouldBlock`` exactly where a shared-memory ring would, and a peer that
stopped reading costs four messages of memory, not a queue. A credit message of its own is only
sent when half of the slots were released and nothing else was there to carry the news.

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
from transport.control import EPOCH_BYTES, MAGIC, PROTOCOL_VERSION, Opcode
from transport.errors import PeerGone
from transport.schema import Schema
from transport.window import Window

_HEADER = struct.Struct(f"<4sHH{EPOCH_BYTES}sqqqqIi")
"""The control prefix; then sequence, released, request id, budget_ns, kind, length of frame 1."""
_WORD_BYTES = 8


class Carrier(Protocol):
    """Brings frames to the peer and hands back what came: a client's own socket, or the server's
    one socket that all its sessions share."""

    def send(self, head: bytes, payload: Any | None) -> bool:
        """Queue both frames; False when the queue is full. ``payload`` is not copied.

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
        # ZMQ sends large payloads from here without a copy. A buffer's turn comes again when the
        # peer has released what it held, so ZMQ has long been done with it.
        self._staging = [np.empty(max(1, send_schema.nbytes), np.uint8) for _ in range(SLOTS)]
        self._views = [send_schema.views(buffer, writable=True) for buffer in self._staging]
        self._head = self._peer_tail = self._told = 0
        self._window = Window(SLOTS)
        self._inbox: deque[Record] = deque()

    @property
    def unread(self) -> bool:
        return self._closed is None and bool(self._inbox)

    def deliver(self, head: bytes, payload: Any | None) -> None:
        """Take in a MESSAGE or a CREDIT; ``payload`` is a ``zmq.Frame`` or None.

        What does not belong here is counted and dropped.
        """
        if len(head) != _HEADER.size:
            self.dropped_malformed += 1
            return
        fields = _HEADER.unpack(head)
        _, _, opcode, epoch, sequence, released, *_ = fields
        if epoch != self._epoch:
            self.dropped_epoch += 1
            return
        window = self._window
        expected = opcode == Opcode.CREDIT or (sequence == window.cursor and not window.full)
        if not self._peer_tail <= released <= self._head or not expected:
            self.dropped_malformed += 1
            return
        self._peer_tail = released
        if opcode == Opcode.CREDIT:
            return
        window.take()
        record = self._record(fields, payload)
        if record is None:
            self.dropped_malformed += 1
            self._release(sequence)
        else:
            self._inbox.append(record)

    def end(self, reason: str) -> None:
        """The peer is no more."""
        if self.gone is None:
            self.gone = reason

    def _record(self, fields: tuple[Any, ...], payload: Any | None) -> Record | None:
        """The message, if it is what its header says; no payload is believed without."""
        sequence, _, request_id, budget, number, length = fields[4:]
        kind = KINDS.get(number)
        came = 0 if payload is None else len(payload)
        if kind is None or request_id < 0 or budget < 0 or length != came:
            return None
        if kind is Kind.DATA:
            if length != self.recv_schema.nbytes:
                return None
            arrays = self.recv_schema.views(_aligned(payload))
            return Record(kind, request_id, budget, sequence, arrays, b"")
        if length > MAX_BODY_BYTES:
            return None
        body = b"" if payload is None else bytes(payload)
        return Record(kind, request_id, budget, sequence, None, body)

    def _claim(self) -> dict[str, NDArray[Any]] | None:
        return self._views[self._head % SLOTS] if self._free() else None

    def _publish(self, kind: Kind, request_id: int, budget_ns: int, body: bytes | None) -> bool:
        if not self._free():
            return False
        if body is None:
            payload: Any = self._staging[self._head % SLOTS][: self.send_schema.nbytes]
        else:
            payload = body
        head = self._header(Opcode.MESSAGE, request_id, budget_ns, kind=kind, length=len(payload))
        try:
            if not self._carrier.send(head, payload if len(payload) else None):
                return False
        except PeerGone as error:
            self.end(str(error))
            raise
        self._head += 1
        self._told = self._window.tail
        return True

    def _take(self) -> Record | None:
        self._give_credit()
        return self._inbox.popleft() if self._inbox else None

    def _release(self, sequence: int) -> None:
        if self._closed is None and self._window.release(sequence):
            self._give_credit()

    def _look_for_peer(self) -> None:
        self._pump(0.0)

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
        if self.gone is not None or self._window.tail - self._told < SLOTS // 2:
            return
        try:
            if self._carrier.send(self._header(Opcode.CREDIT), None):
                self._told = self._window.tail
        except PeerGone as error:
            self.end(str(error))

    def _header(
        self,
        opcode: Opcode,
        request_id: int = 0,
        budget_ns: int = 0,
        *,
        kind: int = 0,
        length: int = 0,
    ) -> bytes:
        return _HEADER.pack(
            MAGIC,
            PROTOCOL_VERSION,
            opcode,
            self._epoch,
            self._head,
            self._window.tail,
            request_id,
            budget_ns,
            kind,
            length,
        )


def _aligned(payload: Any) -> NDArray[np.uint8]:
    """The frame's memory, or a copy where ZMQ put it (a small frame) at an odd address."""
    data = np.frombuffer(payload, np.uint8)
    misaligned = data.__array_interface__["data"][0] % _WORD_BYTES
    return data.copy() if misaligned else data
