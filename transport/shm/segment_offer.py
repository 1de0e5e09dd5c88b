"""A server's offer of shared memory: two segments, and the proof that a client mapped them.

The proof decides, not a comparison of host names. Only a client that mapped both segments knows
both nonces, and only a process of this network namespace can connect to the socket.
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
from transport.shm.segment import MappedSegment, ShmResources, create_all
from transport.shm.segment_layout import NONCE_BYTES, SegmentLayout

PROOF_BYTES = EPOCH_BYTES + 2 * NONCE_BYTES
"""Epoch, nonce of the client's segment, nonce of the server's."""
ACCEPTED = b"ok"


class SegmentOffer:
    """Both segments of a session, from WELCOME until ``take`` or ``withdraw``.

    Attributes:
        unix_socket: The socket over which the client sent its proof; None before.
        eventfds: The server's and the client's eventfd; None before the proof.
    """

    def __init__(self, client_schema: Schema, server_schema: Schema) -> None:
        """Create both segments. Raises ``TransportUnavailable`` with the reason."""
        layouts = SegmentLayout.of(client_schema), SegmentLayout.of(server_schema)
        self._segments = create_all([layout.nbytes for layout in layouts])
        self._nonces = [secrets.token_bytes(NONCE_BYTES) for _ in layouts]
        self._mapped: list[MappedSegment] = []
        self.unix_socket: socket.socket | None = None
        self.eventfds: tuple[int, int] | None = None
        try:
            for segment, layout, nonce in zip(self._segments, layouts, self._nonces, strict=True):
                segment.write(layout.identity(nonce))
        except OSError as error:
            self.withdraw()
            raise TransportUnavailable(f"no shared memory: {error.strerror}") from error

    def describe(self, socket_name: str) -> ShmOffer:
        """The offer as a message. ``socket_name``: where the client sends its proof."""
        client, server = self._segments
        return ShmOffer((client.name, server.name), (client.nbytes, server.nbytes), socket_name)

    def check(self, proof: bytes) -> bool:
        """Whether ``proof`` (the bytes after the epoch) is both nonces. False after ``accept``."""
        return self.unix_socket is None and hmac.compare_digest(proof, b"".join(self._nonces))

    def accept(self, unix_socket: socket.socket) -> None:
        """After a correct proof: send the eventfds to the client and unlink both names.

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
            socket.send_fds(unix_socket, [ACCEPTED], list(eventfds))
        except OSError:
            for eventfd in eventfds:
                os.close(eventfd)
            raise
        finally:
            self.unlink()
        self.unix_socket, self.eventfds = unix_socket, eventfds

    def take(self) -> ShmResources:
        """Hand over the server's side of the session, which the caller closes."""
        unix_socket, eventfds = self.unix_socket, self.eventfds
        if unix_socket is None or eventfds is None:
            raise TransportUnavailable("the segments were not proven")
        client, server = self._mapped
        self._mapped, self.unix_socket, self.eventfds = [], None, None
        return ShmResources(server, client, *eventfds, unix_socket)

    def unlink(self) -> None:
        """Unlink the names of both segments. Idempotent."""
        for segment in self._segments:
            segment.close()

    def withdraw(self) -> None:
        """Release everything that ``take`` has not handed over. Idempotent."""
        self.unlink()
        for mapping in self._mapped:
            mapping.close()
        if self.unix_socket is not None:
            self.unix_socket.close()
        for eventfd in self.eventfds or ():
            os.close(eventfd)
        self._mapped, self.unix_socket, self.eventfds = [], None, None
