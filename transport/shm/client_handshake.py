"""A client's half of the shared-memory offer: map, prove, receive the eventfds."""

from __future__ import annotations

import errno
import os
import socket

from transport.errors import ProtocolError, TransportUnavailable
from transport.handshake_messages import ShmOffer
from transport.schema import Schema
from transport.shm.segment import Mapping, Parts, Segment
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
) -> Parts:
    """Take up ``offer``.

    Raises:
        TransportUnavailable: With the reason, whatever it was; nothing is left behind.
    """
    mappings: list[Mapping] = []
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        nonces = b""
        for index, schema in enumerate((mine, theirs)):
            mapping, nonce = _map(offer, index, SegmentLayout.of(schema))
            mappings.append(mapping)
            nonces += nonce
        link.settimeout(timeout_s)
        eventfds = _prove(link, offer.socket, epoch + nonces)
        link.setblocking(False)
    except BaseException as error:
        link.close()
        for mapping in mappings:
            mapping.close()
        if isinstance(error, OSError | ProtocolError):
            raise TransportUnavailable(f"client: {error}") from error
        raise
    server_bell, client_bell = eventfds
    return Parts(mappings[0], mappings[1], client_bell, server_bell, link)


def _map(offer: ShmOffer, index: int, layout: SegmentLayout) -> tuple[Mapping, bytes]:
    """Segment ``index`` of the offer and its nonce; the client's own (0) is writable."""
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


def _prove(link: socket.socket, door: str, proof: bytes) -> tuple[int, int]:
    """The eventfds (the server waits on, the client waits on) that the proof is answered with."""
    try:
        link.connect(f"\0{door}")
    except ConnectionRefusedError as error:
        raise TransportUnavailable(
            "client: the server's socket cannot be reached (another network namespace)"
        ) from error
    try:
        link.send(proof)
        answer, eventfds, _, _ = socket.recv_fds(link, _ANSWER_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError as error:
        raise TransportUnavailable("client: the server's socket did not answer") from error
    if answer != ACCEPTED or len(eventfds) != 2:
        for eventfd in eventfds:
            os.close(eventfd)
        said = answer.decode("utf-8", "replace") or "it hung up"
        raise TransportUnavailable(f"server: {said}")
    return eventfds[0], eventfds[1]
