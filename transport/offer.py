"""A server's offer of shared memory: two segments, and the door where a client proves it has them.

The proof is what decides, not a guess from host names: only who mapped both segments knows both
nonces, and only a process of this network namespace reaches the door.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket

from transport.control import EPOCH_BYTES, ShmOffer
from transport.errors import TransportUnavailable
from transport.layout import NONCE_BYTES, Layout
from transport.schema import Schema
from transport.shm import Mapping, Parts, create_all

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
        layouts = Layout.of(client_schema), Layout.of(server_schema)
        self._segments = create_all([layout.nbytes for layout in layouts])
        self._nonces = [secrets.token_bytes(NONCE_BYTES) for _ in layouts]
        self._mapped: list[Mapping] = []
        self.link: socket.socket | None = None
        self.bells: tuple[int, int] | None = None
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

    def redeem(self, link: socket.socket) -> None:
        """The client has both segments: hand it the eventfds and unlink the names at once.

        Raises:
            OSError: No descriptors left, or the client hung up.
        """
        for segment in self._segments:
            self._mapped.append(segment.map(writable=segment is self._segments[1]))
        first = new_bell()
        try:
            bells = first, new_bell()
        except OSError:
            os.close(first)
            raise
        try:
            socket.send_fds(link, [ACCEPTED], list(bells))
        except OSError:
            for bell in bells:
                os.close(bell)
            raise
        finally:
            self.unlink()
        self.link, self.bells = link, bells

    def take(self) -> Parts:
        """The server's side of it: the session's from now on."""
        link, bells = self.link, self.bells
        if link is None or bells is None:
            raise TransportUnavailable("the segments were not proven")
        client, server = self._mapped
        self._mapped, self.link, self.bells = [], None, None
        return Parts(server, client, *bells, link)

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
        for bell in self.bells or ():
            os.close(bell)
        self._mapped, self.link, self.bells = [], None, None


def new_bell() -> int:
    """An eventfd that never blocks."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
