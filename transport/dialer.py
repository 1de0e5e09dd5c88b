"""The client's side: connect, request the server's description, open a session.

``auto`` uses shared memory if the server offers it and both segments can be mapped and proven, and
ZMQ otherwise. ``channel.transport`` and ``channel.transport_reason`` hold the choice and its
reason, and the server logs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transport.address import format_address, resolve
from transport.base_channel import BaseChannel
from transport.errors import Refused, TransportError, TransportUnavailable
from transport.handshake_messages import (
    NO_EPOCH,
    TRANSPORTS,
    Hello,
    Opcode,
    ShmOffer,
    Welcome,
    object_field,
    text_field,
)
from transport.schema import Schema
from transport.shm.adaptive_spin import DEFAULT_SPIN_US
from transport.zeromq.channel import ZmqChannel
from transport.zeromq.client_socket import ClientSocket
from transport.zeromq.curve import ClientKeys

ACCEPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"auto": TRANSPORTS, "shm": ("shm",), "zmq": ("zmq",)}
)
PROVEN = "both segments were mapped and proven: same host, same user"


class Dialer:
    """A client of the server at one address. It connects when the first method is called.

    Args:
        timeout_s: For each answer of the server, in seconds.
        curve: Keys, for a server with encryption.
        spin_us: How long a channel over shared memory may poll before it sleeps, in µs.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        timeout_s: float = 5.0,
        curve: ClientKeys | None = None,
        spin_us: float = DEFAULT_SPIN_US,
    ) -> None:
        self._curve = curve
        self.host, self.port, self._timeout_s = host, port, timeout_s
        self._spin_us = spin_us
        self._address = format_address(host, port)
        self._client_socket: ClientSocket | None = None

    def describe(self) -> dict[str, Any]:
        """Request the server's description: JSON values.

        Raises:
            TransportTimeout: No answer arrived.
            ProtocolError: The answer has another protocol version, or none.
            TransportError: The host cannot be resolved.
        """
        client_socket = self._take_socket()
        try:
            _, description = client_socket.request(
                Opcode.DESCRIBE, NO_EPOCH, {}, answer=Opcode.DESCRIPTION, timeout_s=self._timeout_s
            )
        except BaseException:
            client_socket.close()
            raise
        self._client_socket = client_socket
        return description

    def send_admin_command(
        self, command: str, arguments: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Send an admin command and return the server's reply.

        Raises:
            Refused: The command is unknown, or this client may not give it.
            TransportTimeout, ProtocolError, TransportError: As ``describe``.
        """
        client_socket = self._take_socket()
        try:
            _, answer = client_socket.request(
                Opcode.ADMIN_COMMAND,
                NO_EPOCH,
                {"command": command, "arguments": dict(arguments or {})},
                answer=Opcode.ADMIN_REPLY,
                timeout_s=self._timeout_s,
            )
        except BaseException:
            client_socket.close()
            raise
        self._client_socket = client_socket
        return answer

    def open(
        self,
        schema: Schema,
        *,
        client: str,
        transport: str = "auto",
        attributes: Mapping[str, Any] | None = None,
    ) -> tuple[BaseChannel, Welcome]:
        """Open a session that sends ``schema``; return its channel and what the server granted.

        Args:
            client: A name for the server's log.
            transport: ``"auto"``; or ``"shm"`` or ``"zmq"`` to use that one or fail.
            attributes: JSON values for the server.

        Raises:
            Refused: The server declined; the error has field, got and expected.
            TransportUnavailable: The requested ``transport`` is not available; says why.
            ProtocolError, TransportTimeout, PeerGone: As ``describe``.
        """
        if transport not in ACCEPTS:
            raise TransportError(f"transport: got {transport!r}, expected one of {tuple(ACCEPTS)}")
        hello = Hello(client, schema, ACCEPTS[transport], dict(attributes or {}))
        if "shm" in hello.transports:
            _import_shm()
        client_socket = self._take_socket()
        try:
            return self._open(client_socket, hello, transport)
        except BaseException:
            client_socket.close()
            raise

    def close(self) -> None:
        """Close an unused connection; open channels stay open. Idempotent."""
        client_socket, self._client_socket = self._client_socket, None
        if client_socket is not None:
            client_socket.close()

    def __enter__(self) -> Dialer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(
        self, client_socket: ClientSocket, hello: Hello, transport: str
    ) -> tuple[BaseChannel, Welcome]:
        try:
            epoch, body = client_socket.request(
                Opcode.HELLO,
                NO_EPOCH,
                hello.to_body(),
                answer=Opcode.WELCOME,
                timeout_s=self._timeout_s,
            )
        except Refused as error:
            if error.field == "transport":
                raise TransportUnavailable(
                    f"transport {transport!r} cannot be had: {error.got}; offered: {error.expected}"
                ) from error
            raise
        welcome = Welcome(
            Schema.from_json(text_field(body, "schema")), object_field(body, "attributes")
        )
        reason = text_field(body, "reason")
        channel: BaseChannel | None = None
        if body.get("shm") is not None:
            try:
                channel = self._map_segments(
                    ShmOffer.from_body(object_field(body, "shm")),
                    epoch,
                    hello.schema,
                    welcome.schema,
                )
                reason = PROVEN
            except TransportUnavailable as error:
                reason = str(error)
        if channel is None and transport == "shm":
            client_socket.send_control(Opcode.BYE, epoch, {"reason": reason})
            raise TransportUnavailable(f"transport 'shm' cannot be had: {reason}")
        try:
            client_socket.request(
                Opcode.CONFIRM,
                epoch,
                {"transport": "zmq" if channel is None else "shm", "reason": reason},
                answer=Opcode.CONFIRM,
                timeout_s=self._timeout_s,
            )
        except BaseException:
            if channel is not None:
                channel.close()
            raise
        if channel is None:
            zmq_channel = ZmqChannel(hello.schema, welcome.schema, epoch, client_socket)
            client_socket.attach_session(epoch, zmq_channel.deliver)
            channel = zmq_channel
        else:
            client_socket.close()
        channel.transport_reason = reason
        return channel, welcome

    def _map_segments(
        self, offer: ShmOffer, epoch: bytes, mine: Schema, theirs: Schema
    ) -> BaseChannel:
        # Imported here because a client over ZMQ needs neither these modules nor numba.
        from transport.shm.client_handshake import client_handshake

        resources = client_handshake(offer, epoch, mine, theirs, timeout_s=self._timeout_s)
        try:
            from transport.shm.channel import ShmChannel

            return ShmChannel(mine, theirs, epoch, resources, spin_us=self._spin_us)
        except BaseException as error:
            resources.close()
            if isinstance(error, ImportError):
                raise TransportUnavailable(f"client: {error}") from error
            raise

    def _take_socket(self) -> ClientSocket:
        client_socket, self._client_socket = self._client_socket, None
        if client_socket is None:
            numeric, ipv6 = resolve(self.host, self.port)
            endpoint = f"tcp://{format_address(numeric, self.port)}"
            client_socket = ClientSocket(endpoint, self._address, ipv6=ipv6, curve=self._curve)
        return client_socket


def _import_shm() -> None:
    """Import the shared-memory channel, which compiles its functions: a second from the cache, more
    without. This must precede HELLO, because an offer of segments expires."""
    with contextlib.suppress(ImportError):  # ``_map_segments`` raises it again
        import transport.shm.channel  # noqa: F401
