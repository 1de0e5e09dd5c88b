"""The running sessions of one listener: start them, route messages to them, end them."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import zmq

from transport.errors import PeerGone, TransportError
from transport.handshake_messages import NO_EPOCH, Opcode, encode
from transport.server.event_loop import EventLoop
from transport.server.listener_records import PendingSession, ServerSession
from transport.server.polled_sessions import PolledSessions
from transport.zeromq.channel import ZmqChannel
from transport.zeromq.client_socket import bye_reason
from transport.zeromq.server_socket import ServerSocket

if TYPE_CHECKING:
    from transport.shm.channel import ShmChannel

_SESSION_OPCODES = int(Opcode.MESSAGE), int(Opcode.CREDIT)  # an enum costs more
_log = logging.getLogger(__name__)


class SessionTable:
    """Starts confirmed sessions, routes messages to them and detects their end.

    Args:
        receive: Routes the messages that arrive on ``server_socket`` within a time in seconds.
        counts: The counters of the listener's statistics.
        spin_us: For channels over shared memory; see ``ShmChannel``.

    Attributes:
        sessions: The running sessions, by id.
        polled_sessions: Those over shared memory that are polled.
    """

    def __init__(
        self,
        event_loop: EventLoop,
        server_socket: ServerSocket,
        receive: Callable[[float], None],
        counts: Counter[str],
        spin_us: float,
    ) -> None:
        self._event_loop, self._server_socket, self._receive = event_loop, server_socket, receive
        self._counts, self._spin_us = counts, spin_us
        self.sessions: dict[int, ServerSession] = {}
        self.polled_sessions = PolledSessions()
        self._connections: dict[bytes, ServerFrameConnection] = {}
        self._ready: dict[int, ServerSession] = {}
        self._opened: list[ServerSession] = []
        self._ended: list[ServerSession] = []
        self._reported: list[ServerSession] = []

    def start(self, pending: PendingSession, transport: str, reason: str) -> None:
        """Start a confirmed session."""
        _log.debug("session %d (%s): %s, %s", pending.id, pending.hello.client, transport, reason)
        self._counts["opened"] += 1
        start = self._start_shm if transport == "shm" else self._start_zmq
        session = self.sessions[pending.id] = start(pending, reason)
        self._opened.append(session)

    def route(self, identity: bytes, number: int, epoch: bytes, frames: list[zmq.Frame]) -> bool:
        """Deliver a message to its ZMQ session; False if it belongs to none."""
        connection = self._connections.get(epoch)
        if connection is None or connection.identity != identity:
            return False
        if number in _SESSION_OPCODES:
            # Too many frames are delivered as an empty frame, which the channel counts.
            head = frames[0].buffer
            connection.channel.deliver(head if len(frames) == 1 else head[:0])
            self._ready[connection.session.id] = connection.session
        elif number == Opcode.BYE:
            self._end(connection.session, bye_reason(frames))
        else:
            self._counts["malformed"] += 1
        return True

    @property
    def has_zmq_input(self) -> bool:
        """Whether a ZMQ session has messages that ``collect`` has not returned."""
        return bool(self._ready)

    def probe(self) -> None:
        """End the ZMQ sessions whose connection is lost."""
        for connection in list(self._connections.values()):
            try:
                self._server_socket.send(connection.identity, encode(Opcode.PING, NO_EPOCH))
            except PeerGone as error:
                self._end(connection.session, str(error))

    def collect(self) -> list[ServerSession]:
        """Sessions with unread messages, and those opened or ended since the last call."""
        if self.polled_sessions:
            ready = self.polled_sessions.ready()
            no_ended = all(session.channel.gone_reason is None for session in ready)
            if no_ended and not self._ready and not self._ended and not self._opened:
                return ready
            self._ready.update((session.id, session) for session in ready)
        for number, session in list(self._ready.items()):
            if session.channel.gone_reason is not None:
                # The serving code found this while reading or writing; no descriptor reports it.
                self._end(session, session.channel.gone_reason)
            if not session.channel.unread:
                del self._ready[number]
        opened, self._opened = self._opened, []
        over, self._ended = self._ended, []
        self._reported += over
        if not over and not opened:
            return list(self._ready.values())
        changed = {one.id: one for one in (*self._ready.values(), *opened, *over)}
        return list(changed.values())

    def close_ended(self) -> None:
        """Close the channels of the ended sessions that ``collect`` has returned."""
        if not self._reported:
            return
        reported, self._reported = self._reported, []
        for session in reported:
            session.channel.close(session.ended or "")
            self._ready.pop(session.id, None)

    def close(self, reason: str) -> None:
        """Close the channels of all sessions."""
        for session in [*self.sessions.values(), *self._ended, *self._reported]:
            session.channel.close(reason)

    def _start_zmq(self, pending: PendingSession, reason: str) -> ServerSession:
        channel: ZmqChannel
        session: ServerSession
        self._server_socket.allow(pending.identity, pending.hello.schema.nbytes)
        connection = ServerFrameConnection(
            self._server_socket,
            pending.identity,
            pending.epoch,
            self._receive,
            on_close=lambda why: self._on_closed_locally(session, why),
            on_gone=lambda why: self._end(session, why),
        )
        channel = ZmqChannel(
            pending.welcome.schema, pending.hello.schema, pending.epoch, connection
        )
        channel.transport_reason = reason
        session = ServerSession(pending.id, pending.hello, channel, reason, pending.peer)
        connection.channel, connection.session = channel, session
        self._connections[pending.epoch] = connection
        return session

    def _start_shm(self, pending: PendingSession, reason: str) -> ServerSession:
        from transport.shm.channel import ShmChannel

        channel: ShmChannel
        session: ServerSession
        if pending.offer is None:
            raise TransportError("a session over shared memory without its segments")
        channel = ShmChannel(
            pending.welcome.schema,
            pending.hello.schema,
            pending.epoch,
            pending.offer.take(),
            spin_us=self._spin_us,
            on_close=lambda why: self._on_shm_closed(session, channel, why),
        )
        channel.transport_reason = reason
        session = ServerSession(pending.id, pending.hello, channel, reason, pending.peer)
        self._event_loop.register(
            channel.eventfd, lambda: self.polled_sessions.add_signalled(session, channel)
        )
        self._event_loop.register(
            channel.unix_socket.fileno(), lambda: self._on_socket_readable(session, channel)
        )
        self.polled_sessions.add(session, channel)
        return session

    def _on_socket_readable(self, session: ServerSession, channel: ShmChannel) -> None:
        reason = channel.check_peer()
        if reason is not None:
            self._unwatch(session, channel)
            self._end(session, reason)

    def _on_shm_closed(self, session: ServerSession, channel: ShmChannel, reason: str) -> None:
        self._unwatch(session, channel)
        self._on_closed_locally(session, reason)

    def _unwatch(self, session: ServerSession, channel: ShmChannel) -> None:
        self.polled_sessions.discard(session)
        self._event_loop.unregister(channel.eventfd)
        self._event_loop.unregister(channel.unix_socket.fileno())

    def _end(self, session: ServerSession, reason: str) -> None:
        """The client closed or died: ``collect`` will return the session."""
        if session.ended is None:
            session.channel.gone_reason = session.channel.gone_reason or reason
            if session.channel.unread:
                self._ready[session.id] = session
            self._remove(session, reason)
            self._ended.append(session)

    def _on_closed_locally(self, session: ServerSession, reason: str) -> None:
        """The server's own code closed the channel."""
        if session.ended is None:
            self._remove(session, f"closed here: {reason}" if reason else "closed here")

    def _remove(self, session: ServerSession, reason: str) -> None:
        session.ended = reason
        self.sessions.pop(session.id, None)
        for epoch, connection in list(self._connections.items()):
            if connection.session is session:
                del self._connections[epoch]
        _log.debug("session %d ended: %s", session.id, reason)


class ServerFrameConnection:
    """The ``FrameConnection`` of one session, on the socket that all sessions share."""

    channel: ZmqChannel
    session: ServerSession

    def __init__(
        self,
        server_socket: ServerSocket,
        identity: bytes,
        epoch: bytes,
        receive: Callable[[float], None],
        *,
        on_close: Callable[[str], None],
        on_gone: Callable[[str], None],
    ) -> None:
        self.identity = identity
        self._server_socket, self._epoch, self._receive = server_socket, epoch, receive
        self._on_close, self._on_gone = on_close, on_gone

    def send(self, frame: Any) -> bool:
        """See ``FrameConnection.send``."""
        try:
            return self._server_socket.send(self.identity, (frame,))
        except PeerGone as error:
            self._on_gone(str(error))
            raise

    def pump(self, timeout_s: float) -> str | None:
        """See ``FrameConnection.pump``."""
        self._receive(timeout_s)
        return self.session.ended

    def close(self, reason: str) -> None:
        """See ``FrameConnection.close``."""
        over = self.session.ended is not None
        self._on_close(reason)
        if not over:
            with contextlib.suppress(PeerGone):
                self._server_socket.send(
                    self.identity, encode(Opcode.BYE, self._epoch, {"reason": reason})
                )
