"""The code that all channels share: counting, closing, timeouts, loans and messages.

A driver overrides the underscore methods. It counts no messages and reads no clock for timeouts.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
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
    ViewsHeld,
    WouldBlock,
)
from transport.schema import Schema
from transport.slot_views import SlotViews

SLOTS = 4
"""Slots per direction: two requests in flight, and two more for the requests that replace them."""
MAX_DEFERRED = SLOTS - 2
"""Messages for which a slot's return may be deferred while its arrays are still referenced.

Slots come back in order, so one message more would leave the peer without a slot."""
KINDS: Mapping[int, Kind] = MappingProxyType({int(kind): kind for kind in Kind})
_NO_ARRAYS: Arrays = MappingProxyType({})
_MAX_INT64 = 2**63 - 1


class ReceivedMessage(Message):
    """One message as a driver returns it.

    Attributes:
        sequence: Its sequence number in the ring.
        views: The arrays of its slot; None unless the message is DATA.
        raw_body: The bytes that ``body`` returns until ``release``.
    """

    __slots__ = ("_channel", "budget_ns", "kind", "raw_body", "request_id", "sequence", "views")

    def __init__(  # noqa: PLR0917  runs once per message, and keyword arguments cost time
        self,
        kind: Kind,
        request_id: int,
        budget_ns: int,
        sequence: int,
        views: SlotViews | None,
        body: bytes,
    ) -> None:
        self.kind, self.request_id, self.budget_ns = kind, request_id, budget_ns
        self.sequence, self.views, self.raw_body = sequence, views, body
        self._channel: BaseChannel | None = None

    def attach_channel(self, channel: BaseChannel) -> None:
        """Set the channel to which ``release`` gives the slot back."""
        self._channel = channel

    @property
    def arrays(self) -> Arrays:
        """See ``Message.arrays``."""
        if self._channel is None:
            raise self._released()
        return _NO_ARRAYS if self.views is None else self.views.arrays

    @property
    def body(self) -> bytes:
        """See ``Message.body``."""
        if self._channel is None:
            raise self._released()
        return self.raw_body

    def release(self) -> None:
        """See ``Message.release``."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.release_when_unused(self)

    def _released(self) -> ChannelClosed:
        return ChannelClosed(f"message {self.request_id} was released; its slot is reused")


class SlotLoan(Loan):
    """A loan of the slot that a driver claimed."""

    __slots__ = ("_arrays", "_channel")

    def __init__(self, channel: BaseChannel, arrays: dict[str, NDArray[Any]]) -> None:
        self._channel: BaseChannel | None = channel
        self._arrays = arrays

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """See ``Loan.arrays``."""
        if self._channel is None:
            raise ChannelClosed("the loan has ended; its slot is the peer's, or reused")
        return self._arrays

    def announce(self) -> None:
        """See ``Loan.announce``."""
        if self._channel is not None:
            self._channel.announce_loan()

    def publish(self, request_id: int, *, budget_ns: int = 0) -> None:
        """See ``Loan.publish``."""
        channel, self._channel = self._channel, None
        if channel is None:
            raise ChannelClosed("the loan has ended: it was published or cancelled before")
        channel.end_loan(request_id, budget_ns)

    def cancel(self) -> None:
        """See ``Loan.cancel``."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.cancel_loan()


class BaseChannel(Channel):
    """The driver-independent half of a channel; ``Channel`` states what callers may rely on.

    Attributes:
        transport_reason: Why this transport was chosen and not the other.
    """

    transport_reason = ""

    def __init__(self, send_schema: Schema, recv_schema: Schema) -> None:
        self.send_schema, self.recv_schema = send_schema, recv_schema
        self._sent = self._received = self._would_block = 0
        self.dropped_epoch = self.dropped_malformed = 0
        self._loan_open = False
        self._deferred: list[ReceivedMessage] = []
        self._closed: str | None = None
        self.gone_reason: str | None = None
        """Why the peer can no longer be reached; None while it can."""

    # --- what a driver implements

    @property
    @abc.abstractmethod
    def unread(self) -> bool:
        """Whether a message has arrived that was not polled."""

    @property
    def peer_memory(self) -> NDArray[np.uint8] | None:
        """The mapping that the peer writes all its messages into, read-only, (nbytes,); None where
        there is none, and after ``close``. It stays mapped while the array is referenced.
        """
        return None

    @abc.abstractmethod
    def _claim(self) -> dict[str, NDArray[Any]] | None:
        """Writable views of the next free slot, or None when every slot is taken."""

    @abc.abstractmethod
    def _publish(self, kind: Kind, request_id: int, budget_ns: int, body: bytes | None) -> bool:
        """Send the claimed slot (``body`` is None) or ``body``; False when every slot is taken."""

    @abc.abstractmethod
    def _take(self) -> ReceivedMessage | None:
        """Take and hold the next valid message. Invalid ones are dropped and counted."""

    @abc.abstractmethod
    def _release(self, sequence: int) -> None:
        """Give a slot back. Does nothing after ``close``."""

    @abc.abstractmethod
    def _check_peer(self) -> None:
        """Set ``gone_reason`` if the peer has ended the session or died.

        Never blocks. It is called for every message, so a driver limits the rate of expensive
        checks."""

    @abc.abstractmethod
    def _wait(self, timeout_s: float) -> None:
        """Block until a message may have arrived, the peer may be gone, or time is up."""

    @abc.abstractmethod
    def _close(self, reason: str) -> None:
        """Send ``reason`` to the peer and release all resources; called once."""

    def _spin(self) -> bool:
        """Poll for a message for a bounded time without sleeping; whether one arrived."""
        return False

    def _record_wait(self, duration_ns: int) -> None:
        """Report the duration of a ``recv`` that had to wait, to a driver that adapts to it."""

    # --- Channel

    def loan(self) -> Loan:
        """See ``Channel.loan``."""
        if self.gone_reason is None and self._closed is None:
            self._check_peer()
        if self._loan_open or self._closed is not None or self.gone_reason is not None:
            self._require_sendable()
        views = self._claim()
        if views is None:
            raise self._no_free_slot()
        self._loan_open = True
        return SlotLoan(self, views)

    def require_peer(self) -> None:
        """See ``Channel.require_peer``."""
        if self.gone_reason is None and self._closed is None:
            self._check_peer()
        self._require_peer()

    def cancel_loan(self) -> None:
        """End the loan without sending; the next ``loan`` gets the same slot."""
        self._loan_open = False

    def announce_loan(self) -> None:
        """Signal a sleeping peer that the loan will be published at once, where a driver can."""

    def end_loan(self, request_id: int, budget_ns: int) -> None:
        """Publish the loaned slot as message ``request_id``."""
        self._loan_open = False
        if self._closed is not None or self.gone_reason is not None:
            self._require_sendable()
        if not 0 <= request_id <= _MAX_INT64 or not 0 <= budget_ns <= _MAX_INT64:
            _require_request_id(request_id)
            # An exhausted budget stays a limit: 0 would mean "none".
            budget_ns = 1 if budget_ns < 0 else min(budget_ns, _MAX_INT64)
        if not self._publish(Kind.DATA, request_id, budget_ns, None):
            raise self._no_free_slot()
        self._sent += 1

    def send_body(self, kind: Kind, request_id: int, body: bytes = b"") -> None:
        """See ``Channel.send_body``."""
        if kind is Kind.DATA:
            raise TransportError("send_body: got DATA, expected a kind that carries a body")
        _require_request_id(request_id)
        self._require_sendable()
        if not self._publish(kind, request_id, 0, body[:MAX_BODY_BYTES]):
            raise self._no_free_slot()
        self._sent += 1

    def poll(self) -> Message | None:
        """See ``Channel.poll``."""
        if self._closed is not None:
            self._require_open()
        if self._deferred:
            self._release_deferred()
        record = self._take()
        if record is None:
            if self.gone_reason is None:
                self._check_peer()
            if self.gone_reason is None:
                return None
            # The last message may have arrived between ``_take`` and ``_check_peer``.
            record = self._take()
            if record is None:
                self._require_peer()
                return None
        self._received += 1
        record.attach_channel(self)
        return record

    def recv(self, timeout_s: float) -> Message:
        """See ``Channel.recv``."""
        message = self.poll()
        if message is not None:
            return message
        began_ns = time.monotonic_ns()
        if timeout_s > 0 and self._spin():
            message = self.poll()
        while message is None:
            left_s = timeout_s - (time.monotonic_ns() - began_ns) / 1e9
            if left_s <= 0:
                raise TransportTimeout(f"nothing came over {self.transport} in {timeout_s:g} s")
            self._wait(left_s)
            message = self.poll()
        self._record_wait(time.monotonic_ns() - began_ns)
        return message

    def statistics(self) -> ChannelStatistics:
        """See ``Channel.statistics``."""
        return ChannelStatistics(
            self._sent,
            self._received,
            self._would_block,
            self.dropped_epoch,
            self.dropped_malformed,
        )

    def close(self, reason: str = "") -> None:
        """See ``Channel.close``."""
        if self._closed is None:
            self._closed = reason or "closed"
            self._deferred.clear()
            self._close(reason)

    # --- shared

    def release_when_unused(self, record: ReceivedMessage) -> None:
        """Give the slot back, at once or after the last reference to its arrays is dropped.

        Rejected: an error for any reference after ``release``. A local variable that outlives its
        ``with`` block by a line, or a policy that reads the last two frames, is no reason to stop a
        robot.

        Raises:
            ViewsHeld: References were held for so long that the peer has no slot left.
        """
        if record.views is not None and self._closed is None and record.views.in_use:
            self._deferred.append(record)
        else:
            self._release(record.sequence)
        if self._deferred:
            age = record.sequence - min(kept.sequence for kept in self._deferred)
            if age > MAX_DEFERRED:
                raise ViewsHeld(
                    f"arrays of a message are still held {age} messages after its release, "
                    f"expected at most {MAX_DEFERRED}: copy what must outlive its message"
                )

    def _release_deferred(self) -> None:
        kept, self._deferred = self._deferred, []
        for record in kept:
            self.release_when_unused(record)

    def _no_free_slot(self) -> TransportError:
        """The error for a full ring. Raises ``PeerGone`` if there is no peer to release a slot."""
        if self.gone_reason is None:
            self._check_peer()
        self._require_peer()
        self._would_block += 1
        return WouldBlock(f"all {SLOTS} slots are taken: the peer has released none of them")

    def _require_sendable(self) -> None:
        """Raise unless a message may be sent now: channel open, no loan, peer there."""
        self._require_open()
        if self._loan_open:
            raise TransportError("a loan is open: publish or cancel it first")
        if self.gone_reason is None:
            self._check_peer()
        self._require_peer()

    def _require_open(self) -> None:
        if self._closed is not None:
            raise ChannelClosed(f"the channel is closed ({self._closed})")

    def _require_peer(self) -> None:
        if self.gone_reason is not None:
            raise PeerGone(self.gone_reason)


def _require_request_id(request_id: int) -> None:
    if not 0 <= request_id <= _MAX_INT64:
        raise TransportError(f"request_id: got {request_id}, expected 0 to 2**63 - 1")
