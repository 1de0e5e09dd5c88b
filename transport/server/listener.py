"""The server's side of all sessions: one wait for all of them.

Single-threaded, with all descriptors in one epoll and no periodic polling. An idle listener sleeps
until a client sends or hangs up, or a deadline of the handshake passes. Sessions over shared memory
that were recently active are polled first (``transport.server.polled_sessions``), and for a bounded
time before the listener sleeps.

Every message from a peer is checked before anything is allocated for it, then answered or counted.
No message ends the server.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from transport.errors import ProtocolError, TransportError
from transport.handshake_messages import (
    PROTOCOL_VERSION,
    TRANSPORTS,
    Hello,
    Opcode,
    Peer,
    Welcome,
    decode_prefix,
)
from transport.schema import MAX_MESSAGE_BYTES
from transport.server.event_loop import EventLoop
from transport.server.handshake import AdminHandler, Handshake
from transport.server.listener_records import ListenerStatistics, ServerSession
from transport.server.session_table import SessionTable
from transport.server.shm_acceptor import ShmAcceptor
from transport.shm.adaptive_spin import DEFAULT_SPIN_US, AdaptiveSpin
from transport.shm.segment import sweep
from transport.zeromq.curve import ServerKeys
from transport.zeromq.server_socket import ServerSocket

MAX_CONTROL_QUEUE = 1024
"""Control messages that may be queued until the next ``wait``; further ones are dropped."""
_PROBE_AFTER_S = (0.0, 0.05, 0.5)
"""When to probe the sessions after a lost connection. ZMQ reports the loss a little before sending
on that connection fails."""
_POLL_EVERY_S = 0.001
"""How often a server that is never idle handles its descriptors."""
_CONTROL_BUDGET_S = 0.001
"""Time for control messages before the sessions are served; the last message may exceed it."""
_RECEIVE_BATCH = 256
"""Messages taken from the ZMQ socket before other work is done."""
_log = logging.getLogger(__name__)


class Listener:
    """Listens at ``host:port`` and returns the sessions that have unread messages.

    Args:
        port: 0 for any free port; the attribute ``port`` then holds its number.
        describe: Returns the description that DESCRIBE is answered with; JSON values.
        accept: Grants a session or raises ``Refused``; nothing is allocated before it.
        admin_handler: Runs an admin command, or raises ``Refused``.
        curve: The server's keys and the admitted public keys; None for no encryption.
        transports: The transports that may be used, of ``TRANSPORTS``.
        max_message_bytes: Maximum length of one message over ZMQ.
        spin_us: How long to poll the shared memory of a client in a tight exchange before
            sleeping, in µs; see ``AdaptiveSpin``.

    Raises:
        AddressInUse: Another program listens on the port.
        TransportError: The host or port cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        describe: Callable[[], dict[str, Any]],
        accept: Callable[[Hello], Welcome],
        admin_handler: AdminHandler | None = None,
        curve: ServerKeys | None = None,
        transports: Sequence[str] = TRANSPORTS,
        max_sessions: int = 64,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        spin_us: float = DEFAULT_SPIN_US,
    ) -> None:
        if not transports or any(name not in TRANSPORTS for name in transports):
            raise TransportError(f"transports: got {transports}, expected some of {TRANSPORTS}")
        self._adaptive = AdaptiveSpin(spin_us)
        self._server_socket = ServerSocket(host, port, curve, max_message_bytes)
        self.host, self.port = self._server_socket.host, self._server_socket.port
        self._event_loop = EventLoop()
        try:
            self._open(describe, accept, admin_handler, tuple(transports), max_sessions, spin_us)
        except BaseException:
            self._event_loop.close()
            self._server_socket.close()
            raise

    def _open(  # noqa: PLR0917  the constructor's second half
        self,
        describe: Callable[[], dict[str, Any]],
        accept: Callable[[Hello], Welcome],
        admin_handler: AdminHandler | None,
        transports: tuple[str, ...],
        max_sessions: int,
        spin_us: float,
    ) -> None:
        self._counts: Counter[str] = Counter()
        self._session_table = SessionTable(
            self._event_loop, self._server_socket, self._receive, self._counts, spin_us
        )
        self._next_poll_s = 0.0
        self._control: deque[tuple[bytes, int, int, bytes, bytes, Peer]] = deque()
        self._probe_times: list[float] = []
        self._closed = False
        self._acceptor: ShmAcceptor | None = None
        if "shm" in transports:
            import transport.shm.channel  # noqa: F401  its atomics compile before the first client

            for name in sweep():
                _log.info("removed %s: its server died during a handshake", name)
            self._acceptor = ShmAcceptor(self._event_loop, self._accept_proof)
        self._handshake = Handshake(
            self._server_socket,
            self._acceptor,
            describe=describe,
            accept=accept,
            admin_handler=admin_handler,
            transports=transports,
            max_sessions=max_sessions,
            running=lambda: len(self._session_table.sessions),
            start=self._session_table.start,
            counts=self._counts,
        )
        self._event_loop.register(self._server_socket.fd, self._on_socket_readable)
        self._event_loop.register(self._server_socket.monitor_fd, self._on_zmq_readable)
        if self._server_socket.authenticator is not None:
            self._event_loop.register(self._server_socket.authenticator.fd, self._on_zmq_readable)

    @property
    def sessions(self) -> Mapping[int, ServerSession]:
        """The running sessions, by id."""
        return MappingProxyType(self._session_table.sessions)

    @property
    def hellos(self) -> list[Hello]:
        """The requests of all running sessions, and of granted ones that may still be confirmed."""
        running = [session.hello for session in self._session_table.sessions.values()]
        return [*running, *self._handshake.pending]

    def wait(self, timeout_s: float | None) -> list[ServerSession]:
        """Return sessions with unread messages, and once each those that opened or ended.

        Runs the handshakes meanwhile. Returns early, perhaps with no session, after ``wake``. A
        session that is not read until ``poll`` gives None is returned again. The channel of an
        ended session is closed by the next call of ``wait``.
        """
        if self._closed:
            raise TransportError("the listener is closed")
        self._session_table.close_ended()
        began = time.monotonic()
        until = None if timeout_s is None else began + timeout_s
        woken = False
        while True:
            # First the messages that have arrived, then the deadlines: the serving thread may have
            # been busy for longer than a timeout of the handshake, which is no client's fault.
            if time.monotonic() >= self._next_poll_s:
                woken = self._run_event_loop(0.0) or woken
            ready = self._session_table.collect()
            now = time.monotonic()
            signalled = self._session_table.polled_sessions.take_signalled()
            if ready or woken or (until is not None and now >= until):
                if ready and now > began:
                    self._adaptive.record_wait(round((now - began) * 1e9))
                return ready
            polled_sessions = self._session_table.polled_sessions
            watch = self._adaptive.spin_after_signal if signalled else self._adaptive.spin
            if polled_sessions and watch(polled_sessions.spin):
                continue
            if polled_sessions.stop_polling():
                woken = self._run_event_loop(self._sleep_timeout_s(time.monotonic(), until))

    def wake(self) -> None:
        """Make ``wait`` return. The only method for other threads and signal handlers."""
        self._event_loop.wake()

    def statistics(self) -> ListenerStatistics:
        """Counts since the listener was made."""
        return ListenerStatistics(running=len(self._session_table.sessions), **self._counts)

    def close(self, reason: str = "") -> None:
        """End every session and send ``reason`` to each client. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._session_table.close(reason)
        self._handshake.close(reason)
        if self._acceptor is not None:
            self._acceptor.close()
        self._event_loop.close()
        self._server_socket.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside

    def _run_event_loop(self, timeout_s: float | None) -> bool:
        """Handle readable descriptors, after at most ``timeout_s``; whether ``wake`` was called.

        Messages of sessions are taken first. A busy server does its other work once per
        millisecond.
        """
        woken = self._event_loop.run_once(timeout_s)
        self._receive(0.0)
        now = time.monotonic()
        if now >= self._next_poll_s or not self._session_table.has_zmq_input:
            self._do_due_work(now)
            self._next_poll_s = time.monotonic() + _POLL_EVERY_S
        return woken

    def _on_socket_readable(self) -> None:
        self._server_socket.signalled = True

    def _on_zmq_readable(self) -> None:
        """ZMQ's other descriptors only end the sleep: ``_do_due_work`` always reads them."""

    def _accept_proof(self, epoch: bytes, proof: bytes, unix_socket: socket.socket) -> str | None:
        return self._handshake.accept_proof(epoch, proof, unix_socket)

    def _sleep_timeout_s(self, now: float, deadline: float | None) -> float | None:
        if self._server_socket.waiting or self._control:
            return 0.0
        acceptor = None if self._acceptor is None else self._acceptor.deadline
        times = (deadline, acceptor, self._handshake.deadline, min(self._probe_times, default=None))
        until = min((at for at in times if at is not None), default=None)
        return None if until is None else max(0.0, until - now)

    def _do_due_work(self, now: float) -> None:
        """Do all other work that is due, without waiting."""
        if self._server_socket.authenticator is not None:
            self._server_socket.authenticator.answer_request()
        # Bounded: a client that sends faster than it is answered must not block the others.
        until = now + _CONTROL_BUDGET_S
        while self._control:
            self._handshake.handle(*self._control.popleft())
            self._receive(0.0)
            if time.monotonic() >= until:
                break
        self._handshake.expire(now)
        if self._acceptor is not None:
            self._acceptor.expire(now)
        lost, noise = self._server_socket.observe()
        self._counts["noise"] += noise
        if lost:
            self._probe_times = [now + after for after in _PROBE_AFTER_S]
        if self._probe_times and now >= self._probe_times[0]:
            self._probe_times = [at for at in self._probe_times if at > now]
            self._session_table.probe()

    def _receive(self, timeout_s: float) -> None:
        """Route the messages that have arrived on the ZMQ socket; queue control messages."""
        if timeout_s > 0:
            self._server_socket.wait(timeout_s)
        for _ in range(_RECEIVE_BATCH):
            message = self._server_socket.receive()
            if message is None:
                return
            identity, frames = message
            try:
                if not frames:
                    raise ProtocolError("a message of no or too many frames")
                version, number, epoch = decode_prefix(frames[0].buffer)
            except ProtocolError:
                self._counts["malformed"] += 1
                continue
            ours = version == PROTOCOL_VERSION
            if ours and self._session_table.route(identity, number, epoch, frames):
                continue
            if ours and number in (Opcode.MESSAGE, Opcode.CREDIT):
                self._counts["dropped_epoch"] += 1
            elif len(self._control) < MAX_CONTROL_QUEUE:
                text = frames[1].bytes if len(frames) == 2 else b""
                self._control.append((identity, version, number, epoch, text, Peer.of(frames[0])))
            else:
                self._counts["malformed"] += 1
