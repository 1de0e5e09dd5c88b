"""The server's half of the handshake: which client gets a session, and over which transport.

DESCRIBE is answered without any state. HELLO makes a pending session, with an offer of shared
memory where possible. CONFIRM, over the same connection, starts it. A session that is not confirmed
in time is dropped: the segments' names after ``OFFER_TIMEOUT_S``, the rest after
``PENDING_TIMEOUT_S``.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from transport.errors import (
    PeerGone,
    ProtocolError,
    Refused,
    SchemaMismatch,
    TransportError,
    TransportUnavailable,
)
from transport.handshake_messages import (
    EPOCH_BYTES,
    NO_EPOCH,
    PROTOCOL_VERSION,
    Hello,
    Opcode,
    Peer,
    Welcome,
    decode_body,
    encode,
    object_field,
    text_field,
)
from transport.server.listener_records import PendingSession
from transport.server.shm_acceptor import ShmAcceptor
from transport.shm.segment_offer import SegmentOffer
from transport.zeromq.server_socket import ServerSocket

OFFER_TIMEOUT_S = 2.0
PENDING_TIMEOUT_S = 10.0
AdminHandler = Callable[[str, Mapping[str, Any], "Peer"], dict[str, Any]]
"""Runs an admin command: called with command, arguments and sender; returns JSON values."""
_log = logging.getLogger(__name__)


class Handshake:
    """Answers the control messages of one listener.

    Args:
        running: Returns the number of running sessions.
        start: Starts a confirmed session: (pending, transport, reason).
        counts: The counters of the listener's statistics.
    """

    def __init__(
        self,
        server_socket: ServerSocket,
        acceptor: ShmAcceptor | None,
        *,
        describe: Callable[[], dict[str, Any]],
        accept: Callable[[Hello], Welcome],
        admin_handler: AdminHandler | None,
        transports: tuple[str, ...],
        max_sessions: int,
        running: Callable[[], int],
        start: Callable[[PendingSession, str, str], None],
        counts: Counter[str],
    ) -> None:
        self._server_socket, self._acceptor = server_socket, acceptor
        self._describe, self._accept, self._start = describe, accept, start
        self._admin_handler = admin_handler
        self._transports, self._max_sessions, self._running = transports, max_sessions, running
        self._counts = counts
        self._pending: dict[bytes, PendingSession] = {}
        self._last_id = 0

    @property
    def pending(self) -> list[Hello]:
        """The requests of clients that were granted a session and have not confirmed it."""
        return [pending.hello for pending in self._pending.values()]

    @property
    def deadline(self) -> float | None:
        """Monotonic time at which ``expire`` must be called; None if it need not be."""
        return min(
            (p.until if p.offer is None else p.offer_until for p in self._pending.values()),
            default=None,
        )

    def handle(  # noqa: PLR0917  the parts of a message
        self, identity: bytes, version: int, number: int, epoch: bytes, text: bytes, peer: Peer
    ) -> None:
        """Handle and answer one control message."""
        if version != PROTOCOL_VERSION:
            self._counts["version_mismatches"] += 1
            self._refuse(identity, "protocol version", str(version), str(PROTOCOL_VERSION))
            return
        try:
            body = decode_body(text)
            if number == Opcode.DESCRIBE:
                self._reply(identity, Opcode.DESCRIPTION, NO_EPOCH, self._describe())
            elif number == Opcode.HELLO:
                self._hello(identity, body, peer)
            elif number == Opcode.CONFIRM:
                self._confirm(
                    identity, epoch, text_field(body, "transport"), text_field(body, "reason")
                )
            elif number == Opcode.ADMIN_COMMAND and self._admin_handler is not None:
                answer = self._admin_handler(
                    text_field(body, "command"), object_field(body, "arguments"), peer
                )
                self._reply(identity, Opcode.ADMIN_REPLY, NO_EPOCH, answer)
            elif number == Opcode.BYE:
                self._drop(epoch, identity)
            else:
                raise ProtocolError(f"opcode: got {number}, expected one that a client sends")
        except ProtocolError as error:
            self._counts["malformed"] += 1
            self._refuse(identity, "message", str(error), f"protocol version {PROTOCOL_VERSION}")
        except (Refused, SchemaMismatch) as error:
            self._counts["refused"] += 1
            self._refuse(identity, error.field, error.got, error.expected)
        except Exception:
            # An error in a callback must not end the sessions of other clients.
            _log.exception("the handshake of a client failed")
            self._counts["failures"] += 1
            self._refuse(identity, "server", "an internal error", "a session; see the server's log")

    def accept_proof(self, epoch: bytes, proof: bytes, unix_socket: socket.socket) -> str | None:
        """Check a client's proof that it mapped the offered segments, and send it the eventfds.

        Returns:
            None, and the offer keeps ``unix_socket``; or the reason for the refusal.
        """
        pending = self._pending.get(epoch)
        if pending is None or pending.offer is None or not pending.offer.check(proof):
            return "not the segments on offer"
        try:
            pending.offer.accept(unix_socket)
        except OSError as error:
            pending.offer.withdraw()
            pending.offer = None
            return f"no shared memory: {error.strerror or error}"
        pending.offer_until = pending.until
        return None

    def expire(self, now: float) -> None:
        """Drop the offers and the pending sessions whose time is over. ``now``: monotonic."""
        for epoch, pending in list(self._pending.items()):
            if now >= pending.until:
                _log.info("session %d was never confirmed by %s", pending.id, pending.hello.client)
                self._drop(epoch, pending.identity)
            elif pending.offer is not None and now >= pending.offer_until:
                self._counts["offers_expired"] += 1
                pending.offer.withdraw()
                pending.offer = None

    def close(self, reason: str) -> None:
        """Drop all pending sessions and send ``reason`` to their clients. Idempotent."""
        for epoch, pending in list(self._pending.items()):
            self._reply(pending.identity, Opcode.BYE, epoch, {"reason": reason})
            self._drop(epoch, pending.identity)

    def _hello(self, identity: bytes, body: Mapping[str, Any], peer: Peer) -> None:
        hello = Hello.from_body(body)
        common = tuple(name for name in self._transports if name in hello.transports)
        if not common:
            raise Refused("transport", f"{hello.transports}", f"one of {self._transports}")
        if self._running() + len(self._pending) >= self._max_sessions:
            raise Refused("sessions", "one more", f"at most {self._max_sessions} at a time")
        welcome = self._accept(hello)
        offer, reason = self._offer(hello, welcome, common)
        if offer is None and "zmq" not in common:
            raise Refused("transport", reason, "shm")
        now = time.monotonic()
        self._last_id += 1
        pending = PendingSession(
            self._last_id,
            identity,
            os.urandom(EPOCH_BYTES),
            hello,
            peer,
            welcome,
            common,
            offer,
            reason,
            now + OFFER_TIMEOUT_S,
            now + PENDING_TIMEOUT_S,
        )
        self._pending[pending.epoch] = pending
        answer = {
            "session": pending.id,
            "schema": welcome.schema.to_json(),
            "attributes": welcome.attributes,
            "reason": reason,
            "shm": None,
        }
        if offer is not None and self._acceptor is not None:
            answer["shm"] = offer.describe(self._acceptor.name).to_body()
        try:
            self._reply(identity, Opcode.WELCOME, pending.epoch, answer)
        except TransportError:
            self._drop(pending.epoch, identity)
            raise

    def _offer(
        self, hello: Hello, welcome: Welcome, common: tuple[str, ...]
    ) -> tuple[SegmentOffer | None, str]:
        if "shm" not in hello.transports:
            return None, "client: zmq was asked for"
        if "shm" not in common or self._acceptor is None:
            return None, "server: it offers zmq only"
        try:
            return SegmentOffer(hello.schema, welcome.schema), ""
        except TransportUnavailable as error:
            return None, f"server: {error}"

    def _confirm(self, identity: bytes, epoch: bytes, transport: str, reason: str) -> None:
        pending = self._pending.get(epoch)
        if pending is None or pending.identity != identity:
            # Too late, or a guessed epoch: the sender is told that it has no session.
            self._reply(identity, Opcode.BYE, epoch, {"reason": "the handshake took too long"})
            return
        proven = pending.offer is not None and pending.offer.unix_socket is not None
        if transport not in pending.transports or (transport == "shm" and not proven):
            self._drop(epoch, identity)
            raise ProtocolError(f"transport: got {transport!r:.80}, expected what was proven")
        if transport != "shm" and pending.offer is not None:
            pending.offer.withdraw()
            pending.offer = None
        del self._pending[epoch]
        reason = reason[:1024]
        # The agreement is sent before any message of the session.
        agreed = {"transport": transport, "reason": reason}
        if self._reply(identity, Opcode.CONFIRM, epoch, agreed):
            self._start(pending, transport, reason)
        elif pending.offer is not None:
            pending.offer.withdraw()

    def _drop(self, epoch: bytes, identity: bytes) -> None:
        pending = self._pending.get(epoch)
        if pending is not None and pending.identity == identity:
            del self._pending[epoch]
            if pending.offer is not None:
                pending.offer.withdraw()

    def _refuse(self, identity: bytes, field: str, got: str, expected: str) -> None:
        body = {"field": field[:200], "got": got[:1000], "expected": expected[:1000]}
        self._reply(identity, Opcode.REFUSED, NO_EPOCH, body)

    def _reply(
        self, identity: bytes, opcode: Opcode, epoch: bytes, body: Mapping[str, Any]
    ) -> bool:
        """Send a control message; False if the client has left."""
        try:
            self._server_socket.send(identity, encode(opcode, epoch, body))
        except PeerGone:
            _log.debug("a client left before its %s", opcode.name)
            return False
        return True
