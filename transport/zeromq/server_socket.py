"""A server's ZMQ socket, shared by control messages and all sessions over ZMQ."""

from __future__ import annotations

import errno
import math
import select
from collections.abc import Sequence
from typing import Any

import zmq

from transport.address import bare_host, format_address, hint_port_in_ipv6, resolve
from transport.errors import AddressInUse, PeerGone, TransportError
from transport.handshake_messages import MAX_CONTROL_BYTES
from transport.schema import MAX_MESSAGE_BYTES
from transport.zeromq.client_socket import (
    COPY_BELOW,
    HEADER_ROOM,
    HEARTBEAT_TIMEOUT_MS,
    LINGER_MS,
    configure,
    has_input,
)
from transport.zeromq.connection_monitor import FRAME_BYTES, ConnectionMonitor
from transport.zeromq.curve import CurveAuthenticator, ServerKeys

_DONTWAIT, _MORE = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE)  # an enum costs more
MAX_FRAMES = 2
"""Frames of a message without the identity; messages with more are invalid."""


class ServerSocket:
    """A bound ROUTER socket.

    Attributes:
        host, port: Where it is bound; the actual port if 0 was given.
        authenticator: Checks clients' keys; None without encryption.
        signalled: Whether ``fd`` was readable: then ``receive`` need not look first.
        fd: Edge-triggered, as all of ZMQ's: check ``waiting`` before sleeping on it.
        monitor_fd: Readable while ``observe`` has something to return.
    """

    def __init__(
        self,
        host: str,
        port: int,
        curve: ServerKeys | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """Bind. Raises ``AddressInUse``, or ``TransportError`` for an unusable address."""
        self.host = host = bare_host(host)
        numeric, ipv6 = resolve(host, port, listening=True)
        self._context = zmq.Context()
        try:
            self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
            configure(self._socket)
            self.authenticator = None if curve is None else CurveAuthenticator(self._context, curve)
            if curve is not None:
                curve.apply(self._socket)
            # ZMQ disconnects a peer that announces a longer message, before it receives it.
            most = max(max_message_bytes, MAX_CONTROL_BYTES)
            self._socket.set(zmq.MAXMSGSIZE, min(most, MAX_MESSAGE_BYTES) + HEADER_ROOM)
            self._socket.set(zmq.ROUTER_MANDATORY, 1)
            self._socket.set(zmq.HANDSHAKE_IVL, HEARTBEAT_TIMEOUT_MS)
            self._socket.set(zmq.IPV6, int(ipv6))
            self._monitor = ConnectionMonitor(self._socket)
            endpoint = format_address(numeric, port)
            self._socket.bind(f"tcp://{endpoint if port else endpoint[:-1] + '*'}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(
                    f"{format_address(host, port)} is taken: another program listens there; "
                    "choose another port"
                ) from error
            raise TransportError(
                f"cannot listen at {format_address(host, port)}: {error.strerror}"
                f"{hint_port_in_ipv6(host)}"
            ) from error
        endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(endpoint.rstrip("\0").rpartition(":")[2])
        self.fd = int(self._socket.get(zmq.FD))
        self.signalled = False
        self._monitor.start(self.port)
        self.monitor_fd = self._monitor.fd
        self._monitor_poll = select.poll()
        self._monitor_poll.register(self.monitor_fd, select.POLLIN)

    @property
    def waiting(self) -> bool:
        """Whether ``receive``, ``observe`` or the authenticator has work."""
        asked = self.authenticator is not None and self.authenticator.waiting
        return asked or has_input(self._socket) or bool(self._monitor_poll.poll(0))

    def receive(self) -> tuple[bytes, list[zmq.Frame]] | None:
        """Return identity and frames of the next message, or None. Never blocks.

        A message with too many frames is returned without frames.
        """
        signalled, self.signalled = self.signalled, False
        if not signalled and not has_input(self._socket):
            return None
        try:
            identity = self._socket.recv(_DONTWAIT)
        except zmq.Again:
            return None
        frames: list[zmq.Frame] = []
        nbytes, surplus, more = 0, False, True  # at least one frame follows an identity
        while more:
            frame = self._socket.recv(_DONTWAIT, copy=False)
            more = frame.more
            nbytes += len(frame) + FRAME_BYTES
            surplus = surplus or len(frames) == MAX_FRAMES
            if not surplus:
                frames.append(frame)
        self._monitor.count(identity, frames[0], nbytes)
        return identity, [] if surplus else frames

    def allow(self, identity: bytes, message_bytes: int) -> None:
        """Let a client have messages of up to ``message_bytes`` on their way to a session."""
        self._monitor.allow(identity, message_bytes)

    def send(self, identity: bytes, frames: Sequence[Any]) -> bool:
        """Queue a message for one peer, large frames without a copy; False if its queue is full.

        Raises:
            PeerGone: No connection has this identity.
        """
        try:
            self._socket.send(identity, _MORE)
            for frame in frames[:-1]:
                self._socket.send(frame, _MORE)
            self._socket.send(frames[-1], _DONTWAIT, copy=len(frames[-1]) < COPY_BELOW)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            raise PeerGone("the peer is gone: its connection broke") from error
        return True

    def wait(self, timeout_s: float) -> None:
        """Wait until a message can be received, at most ``timeout_s``."""
        self._socket.poll(math.ceil(timeout_s * 1000))

    def observe(self) -> tuple[int, int]:
        """Return (lost connections, failed ZMQ handshakes) since the last call."""
        if not self._monitor_poll.poll(0):
            return 0, 0
        lost, noise = self._monitor.take_counts()
        if noise and self.authenticator is not None:
            self.authenticator.log_refusal("a client without keys, or with another server's key")
        return lost, noise

    def close(self) -> None:
        """Close after sending queued messages for a bounded time."""
        self._monitor.stop()
        self._context.destroy(linger=LINGER_MS)
