"""One side of a session's data plane: the interface that memory, shm and zmq implement.

What every implementation guarantees (``tests/contracts/channel.py`` checks each):

* Messages arrive whole and in order, or not at all. ``send`` never blocks: a full ring is
  ``WouldBlock``, counted.
* ``poll`` never blocks. A message's arrays are read-only views that stay valid and unchanged until
  ``release``; several messages may be held at once (as many as there are slots), released in any
  order.
* What carries another epoch, a bad length or an unknown kind is dropped and counted, never given.
* After the peer closed or died, what it had published can still be read; then ``PeerGone``.

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
"""Cap of a non-DATA message's body; every slot has room for it."""


class Kind(IntEnum):
    """What a message is. Only DATA carries the schema's arrays; the others a short body."""

    DATA = 1
    ERROR = 2  # the request failed; body: UTF-8 JSON
    SUPERSEDED = 3  # the request was passed over; body: id of the request that replaced it
    RESET = 4  # the episode is over; body empty


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
        kind: What it is.
        request_id: Chosen by whoever asked; a reply repeats it.
        budget_ns: How long the asker is willing to wait, a duration; 0 for no limit.
    """

    kind: Kind
    request_id: int
    budget_ns: int

    @property
    @abc.abstractmethod
    def arrays(self) -> Arrays:
        """The schema's arrays by name, read-only views; empty unless DATA.

        Raises:
            ChannelClosed: After ``release``.
        """

    @property
    @abc.abstractmethod
    def body(self) -> bytes:
        """The body of a message that is not DATA (a copy)."""

    @abc.abstractmethod
    def release(self) -> None:
        """Give the slot back. Idempotent. Views of ``arrays`` must not be used after."""

    def __enter__(self) -> Message:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Loan(abc.ABC):
    """The next slot to be sent, to be written in place. One loan at a time."""

    @property
    @abc.abstractmethod
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The schema's arrays by name, writable views of the slot; contents undefined."""

    @abc.abstractmethod
    def announce(self) -> None:
        """Say that ``publish`` follows within a millisecond: a peer that sleeps wakes up while the
        arrays are still being written. A hint; nothing depends on it."""

    @abc.abstractmethod
    def publish(self, request_id: int, *, budget_ns: int = 0) -> None:
        """Make it visible to the peer and end the loan. Raises ``PeerGone``."""

    @abc.abstractmethod
    def cancel(self) -> None:
        """End the loan, nothing is sent. Idempotent; a no-op after ``publish``."""


class Channel(abc.ABC):
    """Sends arrays of ``send_schema``, receives arrays of ``recv_schema``."""

    transport: str
    """``"memory"``, ``"shm"`` or ``"zmq"``."""
    send_schema: Schema
    recv_schema: Schema

    @abc.abstractmethod
    def loan(self) -> Loan:
        """A slot to write in place.

        Raises:
            WouldBlock: Every slot is taken.
            PeerGone, ChannelClosed: As they say.
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
        """Send one that is not DATA; ``body`` is cut at MAX_BODY_BYTES. Raises as ``send``."""

    @abc.abstractmethod
    def poll(self) -> Message | None:
        """The next message, or None.

        Raises:
            PeerGone: Nothing is left to read and the peer is gone.
            ChannelClosed: After ``close``.
        """

    @abc.abstractmethod
    def recv(self, timeout_s: float) -> Message:
        """The next message: a bounded spin, then a blocking wait.

        Raises:
            TransportTimeout: Nothing came in ``timeout_s``.
            PeerGone, ChannelClosed: As ``poll``.
        """

    @abc.abstractmethod
    def statistics(self) -> ChannelStatistics: ...

    @abc.abstractmethod
    def close(self, reason: str = "") -> None:
        """End the session; the peer is told ``reason``. Idempotent."""

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
