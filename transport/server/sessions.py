"""A server's sessions: those being agreed on, and those that run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transport.base import BaseChannel
from transport.handshake_messages import Hello, Peer, Welcome

if TYPE_CHECKING:
    from transport.shm.segment_offer import Offer


@dataclass(frozen=True, slots=True)
class ListenerStatistics:
    """Counts since the listener was made.

    Attributes:
        running: Sessions now; ``opened``: all there ever were.
        refused: Clients that asked for what they cannot have.
        malformed: Messages that are not of this protocol, or not for whom they came from.
        version_mismatches: Clients of another protocol version.
        dropped_epoch: Messages of sessions that are over.
        noise: Connections that never spoke ZMQ.
        offers_expired: Shared memory that nobody claimed in time.
        failures: Faults inside ``describe`` or ``accept``; the log has each.
    """

    running: int = 0
    opened: int = 0
    refused: int = 0
    malformed: int = 0
    version_mismatches: int = 0
    dropped_epoch: int = 0
    noise: int = 0
    offers_expired: int = 0
    failures: int = 0


@dataclass(slots=True, eq=False)
class Pending:
    """Welcomed, not yet confirmed.

    Attributes:
        identity: Of its connection.
        peer: Who it is.
        transports: What both sides accept.
        offer: Shared memory on offer; None once it is confirmed, withdrawn or was impossible.
        reason: Why there is no offer.
        offer_until, until: Monotonic times at which the names, and the whole session, are given up.
    """

    id: int
    identity: bytes
    epoch: bytes
    hello: Hello
    peer: Peer
    welcome: Welcome
    transports: tuple[str, ...]
    offer: Offer | None
    reason: str
    offer_until: float
    until: float


@dataclass(slots=True, eq=False)
class ServerSession:
    """One client.

    Attributes:
        peer: Who it is.
        channel: The server's side. Once the session has ended the listener closes it, too.
        transport_reason: Why it is this transport, as both sides were told.
        ended: Why it is over, once it is. What had arrived can still be read.
    """

    id: int
    hello: Hello
    channel: BaseChannel
    transport_reason: str
    peer: Peer
    ended: str | None = None
