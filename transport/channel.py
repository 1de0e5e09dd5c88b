"""The interface of one side of a session's data plane, implemented by memory, shm and zmq.

Every implementation guarantees (``tests/contracts/channel.py`` checks each):

* Messages arrive whole and in order, or not at all. ``send`` never blocks: a full ring raises
  ``WouldBlock``, which is counted.
* ``poll`` never blocks. A message's arrays are read-only views that stay valid and unchanged until
  ``release``; several messages may be held at once (as many as there are slots), released in any
  order.
* A message with another epoch, a bad length or an unknown kind is dropped and counted.
* After the peer closed or died, the messages it had published can still be read. Then ``PeerGone``
  is raised.

Not thread-safe: a channel belongs to one thread.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transport.schema import Schema

Arrays = Mapping[str, NDArray[Any]]

MAX_BODY_BYTES = 4096
"""Maximum length of the body of a message that is not DATA. Every slot has room for it."""


class Kind(IntEnum):
    """Message kinds. DATA carries the schema's arrays; the others carry a short body."""

    DATA = 1
    ERROR = 2  # the request failed; body: UTF-8 JSON
    SUPERSEDED = 3  # the request was replaced by a newer one; body: id of the newer one
    RESET = 4  # the episode has ended; body: the next one's seed, or empty


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Counts since the channel was made."""

    sent: int = 0
    received: int = 0
    would_block: int = 0
    dropped_epoch: int = 0
    dropped_malformed: int = 0


class Message(abc.ABC):
    """One received message.

    Attributes:
        kind: The kind of message.
        request_id: Chosen by the requesting side; a reply repeats it.
        budget_ns: How long the requesting side will wait, a duration in ns; 0 for no limit.
    """

    kind: Kind
    request_id: int
    budget_ns: int

    @property
    @abc.abstractmethod
    def arrays(self) -> Arrays:
        """The schema's arrays by name, read-only views; empty unless the message is DATA.

        Raises:
            ChannelClosed: After ``release``.
        """

    @property
    @abc.abstractmethod
    def body(self) -> bytes:
        """A copy of the body; empty if the message is DATA."""

    @abc.abstractmethod
    def release(self) -> None:
        """Give the slot back. Idempotent. Views of ``arrays`` must not be used afterwards."""

    def __enter__(self) -> Message:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Loan(abc.ABC):
    """The next slot to send, written in place. A channel has at most one loan at a time."""

    @property
    @abc.abstractmethod
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The schema's arrays by name, writable views of the slot with undefined contents."""

    @abc.abstractmethod
    def announce(self) -> None:
        """Announce that ``publish`` follows within a millisecond.

        A sleeping peer then wakes up while the arrays are still being written. This is a hint;
        correctness does not depend on it."""

    @abc.abstractmethod
    def publish(self, request_id: int, *, budget_ns: int = 0) -> None:
        """Make the message visible to the peer and end the loan. Raises ``PeerGone``."""

    @abc.abstractmethod
    def cancel(self) -> None:
        """End the loan without sending. Idempotent; does nothing after ``publish``."""


class Channel(abc.ABC):
    """Sends arrays of ``send_schema``, receives arrays of ``recv_schema``."""

    transport: str
    """``"memory"``, ``"shm"`` or ``"zmq"``."""
    send_schema: Schema
    recv_schema: Schema

    @abc.abstractmethod
    def loan(self) -> Loan:
        """Borrow the next free slot, to write it in place.

        Raises:
            WouldBlock: Every slot is taken.
            PeerGone: The peer has closed or died.
            ChannelClosed: This side has closed.
        """

    @abc.abstractmethod
    def require_peer(self) -> None:
        """Check, without blocking, that the peer is there; for a caller that has a loan.

        Raises:
            PeerGone: The peer has closed or died.
        """

    def send(self, arrays: Arrays, request_id: int, *, budget_ns: int = 0) -> None:
        """Copy ``arrays`` into a slot and publish it.

        Raises:
            SchemaMismatch: An array is missing, unknown, or of another shape or dtype.
            WouldBlock, PeerGone, ChannelClosed: As ``loan``.
        """
        self.send_schema.check(arrays)
        loan = self.loan()
        loan.announce()
        try:
            for name, view in loan.arrays.items():
                np.copyto(view, arrays[name], casting="no")
        except BaseException:
            loan.cancel()
            raise
        loan.publish(request_id, budget_ns=budget_ns)

    @abc.abstractmethod
    def send_body(self, kind: Kind, request_id: int, body: bytes = b"") -> None:
        """Send a message that is not DATA, ``body`` cut at MAX_BODY_BYTES. Raises as ``send``."""

    @abc.abstractmethod
    def poll(self) -> Message | None:
        """Return the next message, or None if none has arrived.

        Raises:
            PeerGone: The peer is gone and all its messages were read.
            ChannelClosed: After ``close``.
        """

    @abc.abstractmethod
    def recv(self, timeout_s: float) -> Message:
        """Return the next message; wait for it with a bounded spin, then blocked.

        Raises:
            TransportTimeout: No message arrived within ``timeout_s``.
            PeerGone, ChannelClosed: As ``poll``.
        """

    @abc.abstractmethod
    def statistics(self) -> ChannelStatistics:
        """Counts since the channel was made."""

    @abc.abstractmethod
    def close(self, reason: str = "") -> None:
        """End the session and send ``reason`` to the peer. Idempotent."""

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
