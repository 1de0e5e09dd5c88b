"""What the three channels have in common: counting, closing, timeouts, loans and messages.

A driver overrides the underscore methods; it never counts and never looks at a clock.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

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
from transport.slot_views import Views

SLOTS = 4
"""Messages per direction: two requests in flight, and two more for what replaces them."""
MAX_KEPT = SLOTS - 2
"""A released message's slot waits for its arrays' last holder this many messages long. Slots come
back in order, so one more would leave the peer none."""
KINDS: Mapping[int, Kind] = MappingProxyType({int(kind): kind for kind in Kind})
_NO_ARRAYS: Arrays = MappingProxyType({})
_LARGEST = 2**63 - 1


class Record(Message):
    """One message as a driver hands it over.

    Attributes:
        sequence: Its place in the ring.
        views: The arrays of its slot; None unless it is DATA.
        content: What ``body`` gives once somebody reads it.
    """

    __slots__ = ("_channel", "budget_ns", "content", "kind", "request_id", "sequence", "views")

    def __init__(  # noqa: PLR0917  once per message: a keyword costs more than it tells here
        self,
        kind: Kind,
        request_id: int,
        budget_ns: int,
        sequence: int,
        views: Views | None,
        body: bytes,
    ) -> None:
        self.kind, self.request_id, self.budget_ns = kind, request_id, budget_ns
        self.sequence, self.views, self.content = sequence, views, body
        self._channel: BaseChannel | None = None

    def give_to_reader(self, channel: BaseChannel) -> None:
        """From now on ``release`` gives the slot back to ``channel``."""
        self._channel = channel

    @property
    def arrays(self) -> Arrays:
        if self._channel is None:
            raise self._released()
        return _NO_ARRAYS if self.views is None else self.views.arrays

    @property
    def body(self) -> bytes:
        if self._channel is None:
            raise self._released()
        return self.content

    def release(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.let_go(self)

    def _released(self) -> ChannelClosed:
        return ChannelClosed(f"message {self.request_id} was released; its slot is reused")


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

    def announce(self) -> None:
        if self._channel is not None:
            self._channel.announce_loan()

    def publish(self, request_id: int, *, budget_ns: int = 0) -> None:
        channel, self._channel = self._channel, None
        if channel is None:
            raise ChannelClosed("the loan has ended: it was published or cancelled before")
        channel.end_loan(request_id, budget_ns)

    def cancel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.cancel_loan()


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
        self._kept: list[Record] = []
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
        """Set ``gone`` if the peer has ended the session or died. Never blocks, and is called for
        every message: what is dear is done now and then."""

    @abc.abstractmethod
    def _wait(self, timeout_s: float) -> None:
        """Return when there may be something to take, the peer may be gone, or time is up."""

    @abc.abstractmethod
    def _close(self, reason: str) -> None:
        """Tell the peer and release everything; called once."""

    def _spin(self) -> bool:
        """Watch for a message for a bounded time without sleeping; whether one came."""
        return False

    def _waited(self, duration_ns: int) -> None:
        """How long the last ``recv`` that had to wait did; where a driver learns from it."""

    # --- Channel

    def loan(self) -> Loan:
        if self.gone is None and self._closed is None:
            self._look_for_peer()
        if self._lent or self._closed is not None or self.gone is not None:
            self._require_free()
        views = self._claim()
        if views is None:
            raise self._full()
        self._lent = True
        return SlotLoan(self, views)

    def cancel_loan(self) -> None:
        self._lent = False

    def announce_loan(self) -> None:
        """What is lent will be published at once; where a peer's sleep can be ended for that."""

    def end_loan(self, request_id: int, budget_ns: int) -> None:
        """Publish what was lent."""
        self._lent = False
        if self._closed is not None or self.gone is not None:
            self._require_free()
        if not 0 <= request_id <= _LARGEST or not 0 <= budget_ns <= _LARGEST:
            _require_id(request_id)
            # A budget that is already used up stays a limit: 0 would mean "none".
            budget_ns = 1 if budget_ns < 0 else min(budget_ns, _LARGEST)
        if not self._publish(Kind.DATA, request_id, budget_ns, None):
            raise self._full()
        self._sent += 1

    def send_body(self, kind: Kind, request_id: int, body: bytes = b"") -> None:
        if kind is Kind.DATA:
            raise TransportError("send_body: got DATA, expected a kind that carries a body")
        _require_id(request_id)
        self._require_free()
        if not self._publish(kind, request_id, 0, body[:MAX_BODY_BYTES]):
            raise self._full()
        self._sent += 1

    def poll(self) -> Message | None:
        if self._closed is not None:
            self._require_open()
        if self._kept:
            self._let_go_of_kept()
        record = self._take()
        if record is None:
            if self.gone is None:
                self._look_for_peer()
            if self.gone is None:
                return None
            # What was published just before the end may have arrived between the two looks.
            record = self._take()
            if record is None:
                self._require_peer()
                return None
        self._received += 1
        record.give_to_reader(self)
        return record

    def recv(self, timeout_s: float) -> Message:
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
        self._waited(time.monotonic_ns() - began_ns)
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
            self._kept.clear()
            self._close(reason)

    # --- shared

    def let_go(self, record: Record) -> None:
        """Give the slot back, or later where somebody still looks at it.

        Raising at once was tried: a local variable that outlives its ``with`` block by a line, or
        a policy that looks at the last two frames, is not worth stopping a robot for.

        Raises:
            ViewsHeld: Somebody has looked for so long that the peer has no slot left.
        """
        if record.views is not None and self._closed is None and record.views.in_use:
            self._kept.append(record)
        else:
            self._release(record.sequence)
        if self._kept:
            age = record.sequence - min(kept.sequence for kept in self._kept)
            if age > MAX_KEPT:
                raise ViewsHeld(
                    f"arrays of a message are still held {age} messages after its release, "
                    f"expected at most {MAX_KEPT}: copy what must outlive its message"
                )

    def _let_go_of_kept(self) -> None:
        kept, self._kept = self._kept, []
        for record in kept:
            self.let_go(record)

    def _full(self) -> TransportError:
        """Why there is no slot: nobody is there to release one, or they have not yet."""
        if self.gone is None:
            self._look_for_peer()
        self._require_peer()
        self._would_block += 1
        return WouldBlock(f"all {SLOTS} slots are taken: the peer has released none of them")

    def _require_free(self) -> None:
        """Whether something may be sent now."""
        self._require_open()
        if self._lent:
            raise TransportError("a loan is open: publish or cancel it first")
        if self.gone is None:
            self._look_for_peer()
        self._require_peer()

    def _require_open(self) -> None:
        if self._closed is not None:
            raise ChannelClosed(f"the channel is closed ({self._closed})")

    def _require_peer(self) -> None:
        if self.gone is not None:
            raise PeerGone(self.gone)


def _require_id(request_id: int) -> None:
    if not 0 <= request_id <= _LARGEST:
        raise TransportError(f"request_id: got {request_id}, expected 0 to 2**63 - 1")
