"""A server's side of every session: one wait for all of them.

Single-threaded, all descriptors in one epoll, nothing looked at by the clock: an idle listener
sleeps until a client speaks, hangs up, or lets a deadline of the handshake pass. Clients that have
just spoken over shared memory are looked at there first (``transport.server.polled_sessions``), and
for a bounded moment before it sleeps.

Whatever a peer sends is checked before anything is made for it, answered or counted, and never
ends the server.
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
from transport.server.handshake import Ask, Handshake
from transport.server.session_table import SessionTable
from transport.server.sessions import ListenerStatistics, ServerSession
from transport.server.shm_acceptor import ShmAcceptor
from transport.shm.adaptive_spin import DEFAULT_SPIN_US, AdaptiveSpin
from transport.shm.segment import sweep
from transport.zeromq.curve import ServerKeys
from transport.zeromq.server_socket import ServerSocket

MAX_CONTROL_QUEUE = 1024
"""Control messages that may wait until ``wait`` is called again; further ones are dropped."""
_PROBE_AFTER_S = (0.0, 0.05, 0.5)
"""A lost connection is announced a little before its sessions can be told from the others."""
_LOOK_EVERY_S = 0.001
"""A server that is never idle looks away from shared memory this often."""
_CONTROL_S = 0.001
"""How long handshakes and questions may keep a server from its sessions, but for the last one."""
_AT_ONCE = 256
"""Messages taken from the ZMQ socket before anything else is looked at."""
_log = logging.getLogger(__name__)


class Listener:
    """Listens at ``host:port`` and hands out the sessions that have something to read.

    Args:
        port: 0 for any; ``port`` then says which.
        describe: What a client is told that asks; JSON values.
        accept: Grants a session or raises ``Refused``; nothing was allocated before it.
        ask: Answers an operator; raises ``Refused``.
        curve: The server's keys, and whose it lets in; without, everybody may come.
        transports: Which may be used, of ``TRANSPORTS``.
        max_message_bytes: What one message over ZMQ may have.
        spin_us: How long to watch the shared memory of a client in a tight exchange before
            sleeping; see ``AdaptiveSpin``.

    Raises:
        AddressInUse: As it says.
        TransportError: A host or port that cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        describe: Callable[[], dict[str, Any]],
        accept: Callable[[Hello], Welcome],
        ask: Ask | None = None,
        curve: ServerKeys | None = None,
        transports: Sequence[str] = TRANSPORTS,
        max_sessions: int = 64,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        spin_us: float = DEFAULT_SPIN_US,
    ) -> None:
        if not transports or any(name not in TRANSPORTS for name in transports):
            raise TransportError(f"transports: got {transports}, expected some of {TRANSPORTS}")
        self._adaptive = AdaptiveSpin(spin_us)
        self._router = ServerSocket(host, port, curve, max_message_bytes)
        self.host, self.port = self._router.host, self._router.port
        self._event_loop = EventLoop()
        try:
            self._open(describe, accept, ask, tuple(transports), max_sessions, spin_us)
        except BaseException:
            self._event_loop.close()
            self._router.close()
            raise

    def _open(  # noqa: PLR0917  the constructor's second half
        self,
        describe: Callable[[], dict[str, Any]],
        accept: Callable[[Hello], Welcome],
        ask: Ask | None,
        transports: tuple[str, ...],
        max_sessions: int,
        spin_us: float,
    ) -> None:
        self._counts: Counter[str] = Counter()
        self._session_table = SessionTable(
            self._event_loop, self._router, self._receive, self._counts, spin_us
        )
        self._look_at = 0.0
        self._control: deque[tuple[bytes, int, int, bytes, bytes, Peer]] = deque()
        self._probes: list[float] = []
        self._closed = False
        self._acceptor: ShmAcceptor | None = None
        if "shm" in transports:
            import transport.shm.channel  # noqa: F401  its atomics compile before the first client

            for name in sweep():
                _log.info("removed %s: its server died during a handshake", name)
            self._acceptor = ShmAcceptor(self._event_loop, self._admit)
        self._handshake = Handshake(
            self._router,
            self._acceptor,
            describe=describe,
            accept=accept,
            ask=ask,
            transports=transports,
            max_sessions=max_sessions,
            running=lambda: len(self._session_table.sessions),
            start=self._session_table.start,
            counts=self._counts,
        )
        self._event_loop.watch(self._router.fd, self._nothing)
        self._event_loop.watch(self._router.monitor_fd, self._nothing)
        if self._router.gatekeeper is not None:
            self._event_loop.watch(self._router.gatekeeper.fd, self._nothing)

    @property
    def sessions(self) -> Mapping[int, ServerSession]:
        """Those that run, by id."""
        return MappingProxyType(self._session_table.sessions)

    @property
    def hellos(self) -> list[Hello]:
        """Of every session that runs or was granted and may still be confirmed."""
        running = [session.hello for session in self._session_table.sessions.values()]
        return [*running, *self._handshake.pending]

    def wait(self, timeout_s: float | None) -> list[ServerSession]:
        """Sessions with something to read, and those that were opened or have ended since (each
        once).

        Runs the handshakes meanwhile. Returns early, perhaps with nothing, after ``wake``. A
        session that is not read until ``poll`` gives None is returned again; the channel of one
        that has ended is closed when ``wait`` is called next.
        """
        if self._closed:
            raise TransportError("the listener is closed")
        self._session_table.close_ended()
        began = time.monotonic()
        until = None if timeout_s is None else began + timeout_s
        woken = False
        while True:
            # First what has arrived, then what is overdue: whoever serves may have been busy for
            # longer than a client's patience, and that is not the client's fault.
            if time.monotonic() >= self._look_at:
                woken = self._look(0.0) or woken
            ready = self._session_table.collect()
            now = time.monotonic()
            rung = self._session_table.polled_sessions.take_rung()
            if ready or woken or (until is not None and now >= until):
                if ready and now > began:
                    self._adaptive.waited(round((now - began) * 1e9))
                return ready
            polled_sessions = self._session_table.polled_sessions
            watch = self._adaptive.expect if rung else self._adaptive.watch
            if polled_sessions and watch(polled_sessions.look):
                continue
            if polled_sessions.fall_asleep():
                woken = self._look(self._patience(time.monotonic(), until))

    def wake(self) -> None:
        """Make ``wait`` return. The one method for other threads and signal handlers."""
        self._event_loop.wake()

    def statistics(self) -> ListenerStatistics:
        return ListenerStatistics(running=len(self._session_table.sessions), **self._counts)

    def close(self, reason: str = "") -> None:
        """End every session; each client is told ``reason``. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._session_table.close(reason)
        self._handshake.close(reason)
        if self._acceptor is not None:
            self._acceptor.close()
        self._event_loop.close()
        self._router.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside

    def _look(self, patience_s: float | None) -> bool:
        """Handle what the descriptors say, waiting that long; whether ``wake`` was called.

        A message that has come is handed out first; whatever else is due can wait for a
        millisecond of a busy server's.
        """
        woken = self._event_loop.run(patience_s)
        self._receive(0.0)
        now = time.monotonic()
        if now >= self._look_at or not self._session_table.filled:
            self._serve(now)
            self._look_at = time.monotonic() + _LOOK_EVERY_S
        return woken

    def _nothing(self) -> None:
        """ZMQ's descriptors only say that it is worth looking; ``_serve`` always looks."""

    def _admit(self, epoch: bytes, proof: bytes, link: socket.socket) -> str | None:
        return self._handshake.admit(epoch, proof, link)

    def _patience(self, now: float, deadline: float | None) -> float | None:
        if self._router.waiting or self._control:
            return 0.0
        door = None if self._acceptor is None else self._acceptor.deadline
        times = (deadline, door, self._handshake.deadline, min(self._probes, default=None))
        until = min((at for at in times if at is not None), default=None)
        return None if until is None else max(0.0, until - now)

    def _serve(self, now: float) -> None:
        """Everything that is due, without waiting."""
        if self._router.gatekeeper is not None:
            self._router.gatekeeper.answer()
        # Not all there are: whoever asks faster than is answered would keep out everybody else.
        until = now + _CONTROL_S
        while self._control:
            self._handshake.handle(*self._control.popleft())
            self._receive(0.0)
            if time.monotonic() >= until:
                break
        self._handshake.expire(now)
        if self._acceptor is not None:
            self._acceptor.expire(now)
        lost, noise = self._router.observe()
        self._counts["noise"] += noise
        if lost:
            self._probes = [now + after for after in _PROBE_AFTER_S]
        if self._probes and now >= self._probes[0]:
            self._probes = [at for at in self._probes if at > now]
            self._session_table.probe()

    def _receive(self, timeout_s: float) -> None:
        """Hand out what has arrived on the ZMQ socket; control messages wait for ``wait``."""
        if timeout_s > 0:
            self._router.wait(timeout_s)
        for _ in range(_AT_ONCE):
            message = self._router.receive()
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
