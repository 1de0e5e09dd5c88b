"""What the three channels have in common: counting, closing, timeouts, loans and messages.

A driver overrides the underscore methods; it never counts and never looks at a clock.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from numpy.typing import NDArray

from transport.channel import (
    MAX_BODY_BYTES,
    Arrays,
    Channel,
    ChannelStatistics,
    Kind,
    Loan,
    Message,
)
from transport.errors import (
    ChannelClosed,
    PeerGone,
    TransportError,
    TransportTimeout,
    WouldBlock,
)
from transport.schema import Schema

SLOTS = 4
"""Messages per direction: two requests in flight, and two more for what replaces them."""
KINDS: Mapping[int, Kind] = MappingProxyType({int(kind): kind for kind in Kind})
_NO_ARRAYS: Arrays = MappingProxyType({})
_LARGEST = 2**63 - 1


class Record(NamedTuple):
    """One message as a driver hands it over; ``arrays`` is None unless it is DATA."""

    kind: Kind
    request_id: int
    budget_ns: int
    sequence: int
    arrays: Arrays | None
    body: bytes


class HeldMessage(Message):
    """A message that occupies its slot until it is released."""

    __slots__ = ("_record", "_release", "budget_ns", "kind", "request_id")

    def __init__(self, record: Record, release: Callable[[int], None]) -> None:
        self.kind = record.kind
        self.request_id = record.request_id
        self.budget_ns = record.budget_ns
        self._record: Record | None = record
        self._release = release

    @property
    def arrays(self) -> Arrays:
        arrays = self._held().arrays
        return _NO_ARRAYS if arrays is None else arrays

    @property
    def body(self) -> bytes:
        return self._held().body

    def release(self) -> None:
        record, self._record = self._record, None
        if record is not None:
            self._release(record.sequence)

    def _held(self) -> Record:
        if self._record is None:
            raise ChannelClosed(f"message {self.request_id} was released; its slot is reused")
        return self._record


class SlotLoan(Loan):
    """The slot that a driver claimed."""

    __slots__ = ("_arrays", "_channel")

    def __init__(self, channel: BaseChannel, arrays: dict[str, NDArray[Any]]) -> None:
        self._channel: BaseChannel | None = channel
        self._arrays = arrays

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        if self._channel is None:
            raise ChannelClosed("the loan has ended; its slot is the peer's, or reused")
        return self._arrays

    def publish(self, request_id: int, *, budget_ns: int = 0) -> None:
        channel, self._channel = self._channel, None
        if channel is None:
            raise ChannelClosed("the loan has ended: it was published or cancelled before")
        channel.finish_loan()
        channel.publish_data(request_id, budget_ns)

    def cancel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.finish_loan()


class BaseChannel(Channel):
    """Policy of a channel; see ``Channel`` for what callers may rely on.

    Attributes:
        transport_reason: Why this transport and not the other.
    """

    transport_reason = ""

    def __init__(self, send_schema: Schema, recv_schema: Schema) -> None:
        self.send_schema, self.recv_schema = send_schema, recv_schema
        self._sent = self._received = self._would_block = 0
        self.dropped_epoch = self.dropped_malformed = 0
        self._lent = False
        self._closed: str | None = None
        self.gone: str | None = None
        """Why the peer is no more, once that is known."""

    # --- what a driver implements

    @property
    @abc.abstractmethod
    def unread(self) -> bool:
        """Whether something has arrived that was not polled."""

    @abc.abstractmethod
    def _claim(self) -> dict[str, NDArray[Any]] | None:
        """Writable views of the next free slot, or None when every slot is taken."""

    @abc.abstractmethod
    def _publish(self, kind: Kind, request_id: int, budget_ns: int, body: bytes | None) -> bool:
        """Send the claimed slot (``body`` None) or a body; False when every slot is taken."""

    @abc.abstractmethod
    def _take(self) -> Record | None:
        """The next valid message, held; what is not valid is dropped, counted and passed over."""

    @abc.abstractmethod
    def _release(self, sequence: int) -> None:
        """Give a slot back. Also called after ``close``, and does nothing then."""

    @abc.abstractmethod
    def _look_for_peer(self) -> None:
        """Set ``gone`` if the peer has ended the session or died. Never blocks."""

    @abc.abstractmethod
    def _wait(self, timeout_s: float) -> None:
        """Return when there may be something to take, the peer may be gone, or time is up."""

    @abc.abstractmethod
    def _close(self, reason: str) -> None:
        """Tell the peer and release everything; called once."""

    def _spin(self) -> bool:
        """Watch for a message for a bounded time without sleeping; whether one came."""
        return False

    # --- Channel

    def loan(self) -> Loan:
        self._ready_to_send()
        views = self._claim()
        if views is None:
            raise self._full()
        self._lent = True
        return SlotLoan(self, views)

    def finish_loan(self) -> None:
        self._lent = False

    def publish_data(self, request_id: int, budget_ns: int) -> None:
        self._require_open()
        self._require_peer()
        self._send(Kind.DATA, request_id, budget_ns, None)

    def send_body(self, kind: Kind, request_id: int, body: bytes = b"") -> None:
        if kind is Kind.DATA:
            raise TransportError("send_body: got DATA, expected a kind that carries a body")
        self._ready_to_send()
        self._send(kind, request_id, 0, body[:MAX_BODY_BYTES])

    def poll(self) -> Message | None:
        self._require_open()
        record = self._take()
        if record is None:
            if self.gone is None:
                self._look_for_peer()
            # What was published just before the end may have arrived between the two looks.
            record = self._take()
            if record is None:
                self._require_peer()
                return None
        self._received += 1
        return HeldMessage(record, self._release)

    def recv(self, timeout_s: float) -> Message:
        message = self.poll()
        if message is not None:
            return message
        deadline = time.monotonic() + timeout_s
        if timeout_s > 0 and self._spin():
            message = self.poll()
        while message is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TransportTimeout(f"nothing came over {self.transport} in {timeout_s:g} s")
            self._wait(left)
            message = self.poll()
        return message

    def statistics(self) -> ChannelStatistics:
        return ChannelStatistics(
            self._sent,
            self._received,
            self._would_block,
            self.dropped_epoch,
            self.dropped_malformed,
        )

    def close(self, reason: str = "") -> None:
        if self._closed is None:
            self._closed = reason or "closed"
            self._close(reason)

    # --- shared

    def _ready_to_send(self) -> None:
        self._require_open()
        if self._lent:
            raise TransportError("a loan is open: publish or cancel it first")
        if self.gone is None:
            self._look_for_peer()
        self._require_peer()

    def _send(self, kind: Kind, request_id: int, budget_ns: int, body: bytes | None) -> None:
        if not 0 <= request_id <= _LARGEST:
            raise TransportError(f"request_id: got {request_id}, expected 0 to 2**63 - 1")
        # A budget that is already used up stays a limit: 0 would mean "none".
        budget_ns = 1 if budget_ns < 0 else min(budget_ns, _LARGEST)
        if not self._publish(kind, request_id, budget_ns, body):
            raise self._full()
        self._sent += 1

    def _full(self) -> WouldBlock:
        self._would_block += 1
        return WouldBlock(f"all {SLOTS} slots are taken: the peer has released none of them")

    def _require_open(self) -> None:
        if self._closed is not None:
            raise ChannelClosed(f"the channel is closed ({self._closed})")

    def _require_peer(self) -> None:
        if self.gone is not None:
            raise PeerGone(self.gone)
