"""The sessions that run on one listener, and how each of them gets its news."""

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
from transport.server.polled_sessions import PolledSessions
from transport.server.sessions import Pending, ServerSession
from transport.zeromq.channel import ZmqChannel
from transport.zeromq.client_socket import farewell
from transport.zeromq.server_socket import ServerSocket

if TYPE_CHECKING:
    from transport.shm.channel import ShmChannel

_log = logging.getLogger(__name__)


class SessionTable:
    """Makes confirmed sessions run, routes to them, notices their end.

    Args:
        receive: Hands out what has arrived on the router, waiting at most so long for it.

    Attributes:
        sessions: Those that run, by id.
        awake: Those over shared memory that are looked at without their ringing.
    """

    def __init__(
        self,
        event_loop: EventLoop,
        router: ServerSocket,
        receive: Callable[[float], None],
        counts: Counter[str],
        spin_us: float,
    ) -> None:
        self._event_loop, self._router, self._receive = event_loop, router, receive
        self._counts, self._spin_us = counts, spin_us
        self.sessions: dict[int, ServerSession] = {}
        self.polled_sessions = PolledSessions()
        self._carriers: dict[bytes, ServerSocketCarrier] = {}
        self._ready: dict[int, ServerSession] = {}
        self._opened: list[ServerSession] = []
        self._over: list[ServerSession] = []
        self._told: list[ServerSession] = []

    def start(self, pending: Pending, transport: str, reason: str) -> None:
        """Make a confirmed session run."""
        _log.debug("session %d (%s): %s, %s", pending.id, pending.hello.client, transport, reason)
        self._counts["opened"] += 1
        start = self._start_shm if transport == "shm" else self._start_zmq
        session = self.sessions[pending.id] = start(pending, reason)
        self._opened.append(session)

    def route(self, identity: bytes, number: int, epoch: bytes, frames: list[zmq.Frame]) -> bool:
        """Take a message that belongs to a ZMQ session; whether it does."""
        carrier = self._carriers.get(epoch)
        if carrier is None or carrier.identity != identity:
            return False
        if number in (Opcode.MESSAGE, Opcode.CREDIT):
            # What is of more frames than a message has is let in as none, to be counted.
            head = frames[0].buffer
            carrier.channel.deliver(head if len(frames) == 1 else head[:0])
            self._ready[carrier.session.id] = carrier.session
        elif number == Opcode.BYE:
            self._end(carrier.session, farewell(frames))
        else:
            self._counts["malformed"] += 1
        return True

    @property
    def filled(self) -> bool:
        """Whether something came over ZMQ that was not collected."""
        return bool(self._ready)

    def probe(self) -> None:
        """Find the ZMQ sessions whose connection is no more."""
        for carrier in list(self._carriers.values()):
            try:
                self._router.send(carrier.identity, encode(Opcode.PING, NO_EPOCH))
            except PeerGone as error:
                self._end(carrier.session, str(error))

    def collect(self) -> list[ServerSession]:
        """Those with something to read, and those opened or ended since the last call."""
        telling = self.polled_sessions.telling()
        calm = all(session.channel.gone is None for session in telling)
        if calm and not self._ready and not self._over and not self._opened:
            return telling
        self._ready.update((session.id, session) for session in telling)
        for number, session in list(self._ready.items()):
            if session.channel.gone is not None:
                # Found out by whoever reads or writes it: no descriptor would tell.
                self._end(session, session.channel.gone)
            if not session.channel.unread:
                del self._ready[number]
        opened, self._opened = self._opened, []
        over, self._over = self._over, []
        self._told += over
        news = {one.id: one for one in (*self._ready.values(), *opened, *over)}
        return list(news.values())

    def close_ended(self) -> None:
        """Close the channels of the ended sessions that were handed out before."""
        if not self._told:
            return
        told, self._told = self._told, []
        for session in told:
            session.channel.close(session.ended or "")
            self._ready.pop(session.id, None)

    def close(self, reason: str) -> None:
        for session in [*self.sessions.values(), *self._over, *self._told]:
            session.channel.close(reason)

    def _start_zmq(self, pending: Pending, reason: str) -> ServerSession:
        channel: ZmqChannel
        session: ServerSession
        carrier = ServerSocketCarrier(
            self._router,
            pending.identity,
            pending.epoch,
            self._receive,
            on_close=lambda why: self._forget(session, why),
            on_gone=lambda why: self._end(session, why),
        )
        channel = ZmqChannel(pending.welcome.schema, pending.hello.schema, pending.epoch, carrier)
        channel.transport_reason = reason
        session = ServerSession(pending.id, pending.hello, channel, reason, pending.peer)
        carrier.channel, carrier.session = channel, session
        self._carriers[pending.epoch] = carrier
        return session

    def _start_shm(self, pending: Pending, reason: str) -> ServerSession:
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
            on_close=lambda why: self._leave(session, channel, why),
        )
        channel.transport_reason = reason
        session = ServerSession(pending.id, pending.hello, channel, reason, pending.peer)
        self._event_loop.watch(channel.eventfd, lambda: self.polled_sessions.ring(session, channel))
        self._event_loop.watch(channel.link.fileno(), lambda: self._spoke(session, channel))
        self.polled_sessions.wake(session, channel)
        return session

    def _spoke(self, session: ServerSession, channel: ShmChannel) -> None:
        reason = channel.look_for_peer()
        if reason is not None:
            self._unwatch(session, channel)
            self._end(session, reason)

    def _leave(self, session: ServerSession, channel: ShmChannel, reason: str) -> None:
        self._unwatch(session, channel)
        self._forget(session, reason)

    def _unwatch(self, session: ServerSession, channel: ShmChannel) -> None:
        self.polled_sessions.discard(session)
        self._event_loop.forget(channel.eventfd)
        self._event_loop.forget(channel.link.fileno())

    def _end(self, session: ServerSession, reason: str) -> None:
        """The client ended it, or died: whoever serves it will be told."""
        if session.ended is None:
            session.channel.gone = session.channel.gone or reason
            if session.channel.unread:
                self._ready[session.id] = session
            self._remove(session, reason)
            self._over.append(session)

    def _forget(self, session: ServerSession, reason: str) -> None:
        """Whoever serves it closed its channel."""
        if session.ended is None:
            self._remove(session, f"closed here: {reason}" if reason else "closed here")

    def _remove(self, session: ServerSession, reason: str) -> None:
        session.ended = reason
        self.sessions.pop(session.id, None)
        for epoch, carrier in list(self._carriers.items()):
            if carrier.session is session:
                del self._carriers[epoch]
        _log.debug("session %d ended: %s", session.id, reason)


class ServerSocketCarrier:
    """The ``Carrier`` of one session on the server's shared socket."""

    channel: ZmqChannel
    session: ServerSession

    def __init__(
        self,
        router: ServerSocket,
        identity: bytes,
        epoch: bytes,
        receive: Callable[[float], None],
        *,
        on_close: Callable[[str], None],
        on_gone: Callable[[str], None],
    ) -> None:
        self.identity = identity
        self._router, self._epoch, self._receive = router, epoch, receive
        self._on_close, self._on_gone = on_close, on_gone

    def send(self, frame: Any) -> bool:
        try:
            return self._router.send(self.identity, (frame,))
        except PeerGone as error:
            self._on_gone(str(error))
            raise

    def pump(self, timeout_s: float) -> str | None:
        self._receive(timeout_s)
        return self.session.ended

    def close(self, reason: str) -> None:
        over = self.session.ended is not None
        self._on_close(reason)
        if not over:
            with contextlib.suppress(PeerGone):
                self._router.send(
                    self.identity, encode(Opcode.BYE, self._epoch, {"reason": reason})
                )
