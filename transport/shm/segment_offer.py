"""A server's offer of shared memory: two segments, and the door where a client proves it has them.

The proof is what decides, not a guess from host names: only who mapped both segments knows both
nonces, and only a process of this network namespace reaches the door.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket

from transport.errors import TransportUnavailable
from transport.handshake_messages import EPOCH_BYTES, ShmOffer
from transport.schema import Schema
from transport.shm.eventfd import new_eventfd
from transport.shm.segment import Mapping, Parts, create_all
from transport.shm.segment_layout import NONCE_BYTES, SegmentLayout

PROOF_BYTES = EPOCH_BYTES + 2 * NONCE_BYTES
"""Epoch, nonce of the client's segment, nonce of the server's."""
ACCEPTED = b"ok"


class Offer:
    """Both segments, from WELCOME until the session is over.

    Attributes:
        link: The socket over which the nonces were proven, once they were.
        bells: Its eventfds (the server waits on, the client waits on), once they were.
    """

    def __init__(self, client_schema: Schema, server_schema: Schema) -> None:
        """Raises ``TransportUnavailable`` with the reason."""
        layouts = SegmentLayout.of(client_schema), SegmentLayout.of(server_schema)
        self._segments = create_all([layout.nbytes for layout in layouts])
        self._nonces = [secrets.token_bytes(NONCE_BYTES) for _ in layouts]
        self._mapped: list[Mapping] = []
        self.link: socket.socket | None = None
        self.eventfds: tuple[int, int] | None = None
        try:
            for segment, layout, nonce in zip(self._segments, layouts, self._nonces, strict=True):
                segment.write(layout.identity(nonce))
        except OSError as error:
            self.withdraw()
            raise TransportUnavailable(f"no shared memory: {error.strerror}") from error

    def describe(self, door: str) -> ShmOffer:
        client, server = self._segments
        return ShmOffer((client.name, server.name), (client.nbytes, server.nbytes), door)

    def check(self, proof: bytes) -> bool:
        """Whether ``proof`` (what follows the epoch) is both nonces. Only the first may try."""
        return self.link is None and hmac.compare_digest(proof, b"".join(self._nonces))

    def accept(self, link: socket.socket) -> None:
        """The client has both segments: hand it the eventfds and unlink the names at once.

        Raises:
            OSError: No descriptors left, or the client hung up.
        """
        for segment in self._segments:
            self._mapped.append(segment.map(writable=segment is self._segments[1]))
        first = new_eventfd()
        try:
            eventfds = first, new_eventfd()
        except OSError:
            os.close(first)
            raise
        try:
            socket.send_fds(link, [ACCEPTED], list(eventfds))
        except OSError:
            for eventfd in eventfds:
                os.close(eventfd)
            raise
        finally:
            self.unlink()
        self.link, self.eventfds = link, eventfds

    def take(self) -> Parts:
        """The server's side of it: the session's from now on."""
        link, eventfds = self.link, self.eventfds
        if link is None or eventfds is None:
            raise TransportUnavailable("the segments were not proven")
        client, server = self._mapped
        self._mapped, self.link, self.eventfds = [], None, None
        return Parts(server, client, *eventfds, link)

    def unlink(self) -> None:
        """Give up the names. Idempotent."""
        for segment in self._segments:
            segment.close()

    def withdraw(self) -> None:
        """Give up everything that ``take`` has not handed over. Idempotent."""
        self.unlink()
        for mapping in self._mapped:
            mapping.close()
        if self.link is not None:
            self.link.close()
        for eventfd in self.eventfds or ():
            os.close(eventfd)
        self._mapped, self.link, self.eventfds = [], None, None
