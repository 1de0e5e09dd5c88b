"""Records of a listener: pending sessions, running sessions and statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transport.base_channel import BaseChannel
from transport.handshake_messages import Hello, Peer, Welcome

if TYPE_CHECKING:
    from transport.shm.segment_offer import SegmentOffer


@dataclass(frozen=True, slots=True)
class ListenerStatistics:
    """Counts since the listener was made.

    Attributes:
        running: Sessions that run now; ``opened``: all that were ever started.
        refused: Requests for a session or a command that were refused.
        malformed: Messages that break the protocol, or that their sender may not send.
        version_mismatches: Clients of another protocol version.
        dropped_epoch: Messages of sessions that have ended.
        noise: Connections that failed ZMQ's handshake.
        offers_expired: Offers of shared memory that no client accepted in time.
        failures: Exceptions in callbacks such as ``describe`` or ``accept``; each is logged.
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
class PendingSession:
    """A session that was granted and is not yet confirmed.

    Attributes:
        identity: ZMQ identity of the client's connection.
        peer: The client's address and user.
        transports: The transports that both sides accept.
        offer: The offer of shared memory; None if it was withdrawn or impossible.
        reason: Why there is no offer.
        offer_until, until: Monotonic times at which the offer and the whole session expire.
    """

    id: int
    identity: bytes
    epoch: bytes
    hello: Hello
    peer: Peer
    welcome: Welcome
    transports: tuple[str, ...]
    offer: SegmentOffer | None
    reason: str
    offer_until: float
    until: float


@dataclass(slots=True, eq=False)
class ServerSession:
    """A session with one client.

    Attributes:
        peer: The client's address and user.
        channel: The server's side. The listener closes it after the session has ended.
        transport_reason: Why this transport was chosen, as both sides were told.
        ended: Why the session ended; None while it runs. Messages that arrived can still be read.
    """

    id: int
    hello: Hello
    channel: BaseChannel
    transport_reason: str
    peer: Peer
    ended: str | None = None
