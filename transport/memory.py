"""A pair of channels within one process, with the semantics of the other channels.

For tests, and for a client and a server in one process. It neither survives nor detects the death
of a peer, which only matters between processes. The two ends may belong to two threads.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from numpy.typing import NDArray

from transport.base_channel import SLOTS, BaseChannel, ReceivedMessage
from transport.channel import Kind
from transport.receive_window import ReceiveWindow
from transport.schema import Schema
from transport.slot_views import SlotViews


class _Lane:
    """One direction: slots, published messages and released ones. Guarded by the pair's lock."""

    def __init__(self, schema: Schema) -> None:
        slots = [bytearray(max(1, schema.nbytes)) for _ in range(SLOTS)]
        self.writable = [schema.views(slot, writable=True) for slot in slots]
        self.readable = [SlotViews(schema, slot) for slot in slots]
        self.published: deque[tuple[Kind, int, int, bytes | None]] = deque()
        self.head = 0
        self.window = ReceiveWindow(SLOTS)

    @property
    def full(self) -> bool:
        """Whether every slot holds a message that is not released."""
        return self.head - self.window.tail >= SLOTS


class MemoryChannel(BaseChannel):
    """One end of ``memory_pair``."""

    transport = "memory"
    transport_reason = "both ends are in this process"

    def __init__(
        self,
        send_schema: Schema,
        recv_schema: Schema,
        lanes: tuple[_Lane, _Lane],
        changed: threading.Condition,
    ) -> None:
        super().__init__(send_schema, recv_schema)
        self._out, self._in = lanes
        self._changed = changed
        self._other: MemoryChannel | None = None

    @property
    def unread(self) -> bool:
        """See ``BaseChannel.unread``."""
        return self._closed is None and bool(self._in.published)

    def _claim(self) -> dict[str, NDArray[Any]] | None:
        with self._changed:
            return None if self._out.full else self._out.writable[self._out.head % SLOTS]

    def _publish(self, kind: Kind, request_id: int, budget_ns: int, body: bytes | None) -> bool:
        with self._changed:
            if self._out.full:
                return False
            self._out.published.append((kind, request_id, budget_ns, body))
            self._out.head += 1
            self._changed.notify_all()
        return True

    def _take(self) -> ReceivedMessage | None:
        with self._changed:
            if not self._in.published:
                return None
            kind, request_id, budget_ns, body = self._in.published.popleft()
            sequence = self._in.window.take()
        views = self._in.readable[sequence % SLOTS] if body is None else None
        return ReceivedMessage(kind, request_id, budget_ns, sequence, views, body or b"")

    def _release(self, sequence: int) -> None:
        with self._changed:
            self._in.window.release(sequence)

    def _check_peer(self) -> None:
        """Nothing to check: the peer's ``close`` sets ``gone_reason`` itself."""

    def _wait(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._in.published or self.gone_reason is not None, timeout=timeout_s
            )

    def _close(self, reason: str) -> None:
        with self._changed:
            if self._other is not None and self._other.gone_reason is None:
                self._other.gone_reason = (
                    f"the peer closed: {reason}" if reason else "the peer closed"
                )
            self._changed.notify_all()

    @staticmethod
    def _connect(left: MemoryChannel, right: MemoryChannel) -> None:
        left._other, right._other = right, left


def memory_pair(forth: Schema, back: Schema) -> tuple[MemoryChannel, MemoryChannel]:
    """Two connected channels: the first sends ``forth``, the second sends ``back``."""
    changed = threading.Condition()
    first, second = _Lane(forth), _Lane(back)
    left = MemoryChannel(forth, back, (first, second), changed)
    right = MemoryChannel(back, forth, (second, first), changed)
    MemoryChannel._connect(left, right)
    return left, right
