"""A server's one ZMQ socket, shared by the control plane and every ZMQ session."""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from transport.address import bare_host, format_address, port_within, resolve
from transport.errors import AddressInUse, PeerGone, TransportError
from transport.handshake_messages import MAX_CONTROL_BYTES
from transport.schema import MAX_MESSAGE_BYTES
from transport.zeromq.client_socket import (
    COPY_BELOW,
    HEADER_ROOM,
    LINGER_MS,
    SILENCE_MS,
    alarm,
    configure,
    has_input,
)
from transport.zeromq.curve import Gatekeeper, ServerKeys

_DONTWAIT, _MORE = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE)  # an enum costs more
MAX_FRAMES = 2
"""Frames of a message beyond the identity; what has more is nobody's."""
_FAILURES = (
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


class ServerSocket:
    """A bound ROUTER.

    Attributes:
        host, port: Where it is bound; the port is real where 0 was asked for.
        gatekeeper: Who lets keys in; None without encryption.
        fd, monitor_fd: Edge-triggered, as ZMQ's are: look at ``waiting`` before sleeping on them.
    """

    def __init__(
        self,
        host: str,
        port: int,
        curve: ServerKeys | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """Raises ``AddressInUse``; ``TransportError`` for an address that cannot be had."""
        self.host = host = bare_host(host)
        numeric, ipv6 = resolve(host, port, listening=True)
        self._context = zmq.Context()
        try:
            self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
            configure(self._socket)
            self.gatekeeper = None if curve is None else Gatekeeper(self._context, curve)
            if curve is not None:
                curve.apply(self._socket)
            # Whoever announces more is hung up on before any of it is kept.
            most = max(max_message_bytes, MAX_CONTROL_BYTES)
            self._socket.set(zmq.MAXMSGSIZE, min(most, MAX_MESSAGE_BYTES) + HEADER_ROOM)
            self._socket.set(zmq.ROUTER_MANDATORY, 1)
            self._socket.set(zmq.HANDSHAKE_IVL, SILENCE_MS)
            self._socket.set(zmq.IPV6, int(ipv6))
            self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(
                zmq.Event.DISCONNECTED | _FAILURES
            )
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
                f"{port_within(host)}"
            ) from error
        endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(endpoint.rstrip("\0").rpartition(":")[2])
        self.fd = int(self._socket.get(zmq.FD))
        self.monitor_fd = int(self._monitor.get(zmq.FD))
        self._alarm = alarm(self._monitor)

    @property
    def waiting(self) -> bool:
        """Whether ``receive`` or ``observe`` has something."""
        asked = self.gatekeeper is not None and self.gatekeeper.waiting
        return asked or has_input(self._socket) or bool(self._alarm.poll(0))

    def receive(self) -> tuple[bytes, list[zmq.Frame]] | None:
        """Identity and frames of the next message; no frames if it has too many. Never blocks."""
        if not has_input(self._socket):
            return None
        try:
            identity = self._socket.recv(_DONTWAIT, copy=False)
        except zmq.Again:
            return None
        frames: list[zmq.Frame] = []
        surplus, more = False, identity.more
        while more:
            frame = self._socket.recv(_DONTWAIT, copy=False)
            more = frame.more
            surplus = surplus or len(frames) == MAX_FRAMES
            if not surplus:
                frames.append(frame)
        return identity.bytes, [] if surplus else frames

    def send(self, identity: bytes, frames: Sequence[Any]) -> bool:
        """Queue for one peer, large frames without a copy; False when its queue is full.

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
        """Until something can be received, at most so long."""
        self._socket.poll(math.ceil(timeout_s * 1000))

    def observe(self) -> tuple[int, int]:
        """(connections lost, connections that never spoke ZMQ) since the last call."""
        lost = noise = 0
        if not self._alarm.poll(0):
            return 0, 0
        while has_input(self._monitor):
            event = recv_monitor_message(self._monitor, zmq.DONTWAIT)["event"]
            if event == zmq.Event.DISCONNECTED:
                lost += 1
            else:
                noise += 1
                if self.gatekeeper is not None:
                    self.gatekeeper.refused("somebody without keys, or with another server's")
        return lost, noise

    def close(self) -> None:
        """Send what is queued, for a bounded time, and let go."""
        self._socket.disable_monitor()
        self._context.destroy(linger=LINGER_MS)
