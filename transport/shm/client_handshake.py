"""The client's half of a shared-memory session: map both segments, prove it, receive eventfds."""

from __future__ import annotations

import errno
import os
import socket

from transport.errors import ProtocolError, TransportUnavailable
from transport.handshake_messages import ShmOffer
from transport.schema import Schema
from transport.shm.segment import MappedSegment, Segment, ShmResources
from transport.shm.segment_layout import SegmentLayout
from transport.shm.segment_offer import ACCEPTED

_ABSENT = {
    errno.ENOENT: "the server's segments are not in this /dev/shm "
    "(another host, container or mount namespace; or the offer was not taken up in time)",
    errno.EACCES: "the server's segments belong to another user",
}
_ANSWER_BYTES = 256


def client_handshake(
    offer: ShmOffer, epoch: bytes, mine: Schema, theirs: Schema, *, timeout_s: float
) -> ShmResources:
    """Accept ``offer`` and return the client's side of the session.

    Args:
        mine, theirs: Schemas that the client and the server send.
        timeout_s: For the server's answer to the proof.

    Raises:
        TransportUnavailable: With the reason. All resources are released.
    """
    mappings: list[MappedSegment] = []
    unix_socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        nonces = b""
        for index, schema in enumerate((mine, theirs)):
            mapping, nonce = _map(offer, index, SegmentLayout.of(schema))
            mappings.append(mapping)
            nonces += nonce
        unix_socket.settimeout(timeout_s)
        eventfds = _prove(unix_socket, offer.socket, epoch + nonces)
        unix_socket.setblocking(False)
    except BaseException as error:
        unix_socket.close()
        for mapping in mappings:
            mapping.close()
        if isinstance(error, OSError | ProtocolError):
            raise TransportUnavailable(f"client: {error}") from error
        raise
    server_eventfd, client_eventfd = eventfds
    return ShmResources(mappings[0], mappings[1], client_eventfd, server_eventfd, unix_socket)


def _map(offer: ShmOffer, index: int, layout: SegmentLayout) -> tuple[MappedSegment, bytes]:
    """Map segment ``index`` of the offer and read its nonce. The client's own (0) is writable."""
    if offer.sizes[index] != layout.nbytes:
        raise ProtocolError(f"segment: got {offer.sizes[index]} bytes, expected {layout.nbytes}")
    writable = index == 0
    try:
        segment = Segment.open(offer.names[index], layout.nbytes, writable=writable)
    except OSError as error:
        reason = _ABSENT.get(error.errno or 0, f"no shared memory: {error.strerror}")
        raise TransportUnavailable(f"client: {reason}") from error
    try:
        mapping = segment.map(writable=writable)
    finally:
        segment.close()
    try:
        return mapping, layout.read_nonce(mapping.buffer)
    except ProtocolError:
        mapping.close()
        raise


def _prove(unix_socket: socket.socket, socket_name: str, proof: bytes) -> tuple[int, int]:
    """Send the proof and receive the eventfds: the server's, then the client's."""
    try:
        unix_socket.connect(f"\0{socket_name}")
    except ConnectionRefusedError as error:
        raise TransportUnavailable(
            "client: the server's socket cannot be reached (another network namespace)"
        ) from error
    try:
        unix_socket.send(proof)
        answer, eventfds, _, _ = socket.recv_fds(
            unix_socket, _ANSWER_BYTES, 2, socket.MSG_CMSG_CLOEXEC
        )
    except TimeoutError as error:
        raise TransportUnavailable("client: the server's socket did not answer") from error
    if answer != ACCEPTED or len(eventfds) != 2:
        for eventfd in eventfds:
            os.close(eventfd)
        reason = answer.decode("utf-8", "replace") or "it hung up"
        raise TransportUnavailable(f"server: {reason}")
    return eventfds[0], eventfds[1]
