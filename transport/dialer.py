"""A client's side: dial, ask what is served, open a session over whatever works.

``auto`` tries what the server offers: shared memory where both segments can be mapped and proven,
ZMQ otherwise. The choice and its reason are in ``channel.transport`` and
``channel.transport_reason``, and in the server's log.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transport.address import format_address, resolve
from transport.base import BaseChannel
from transport.errors import Refused, TransportError, TransportUnavailable
from transport.handshake_messages import (
    NO_EPOCH,
    TRANSPORTS,
    Hello,
    Opcode,
    ShmOffer,
    Welcome,
    mapping,
    string,
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
    """One server, by address. Nothing is sent before it is asked something.

    Args:
        timeout_s: For each answer of the server's.
        curve: Keys, for a server that wants them.
        spin_us: How long a channel over shared memory may watch before it sleeps.
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
        self._link: ClientSocket | None = None

    def describe(self) -> dict[str, Any]:
        """What the server says of itself.

        Raises:
            TransportTimeout: Nothing answered.
            ProtocolError: Something of another version, or of none, did.
            TransportError: The host cannot be resolved.
        """
        link = self._take_link()
        try:
            _, description = link.request(
                Opcode.DESCRIBE, NO_EPOCH, {}, answer=Opcode.DESCRIPTION, timeout_s=self._timeout_s
            )
        except BaseException:
            link.close()
            raise
        self._link = link
        return description

    def ask(self, command: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """An operator's question or order, and what came of it.

        Raises:
            Refused: Not this command, or not for whoever asks.
            TransportTimeout, ProtocolError, TransportError: As ``describe``.
        """
        link = self._take_link()
        try:
            _, answer = link.request(
                Opcode.ASK,
                NO_EPOCH,
                {"command": command, "arguments": dict(arguments or {})},
                answer=Opcode.ANSWER,
                timeout_s=self._timeout_s,
            )
        except BaseException:
            link.close()
            raise
        self._link = link
        return answer

    def open(
        self,
        schema: Schema,
        *,
        client: str,
        transport: str = "auto",
        attributes: Mapping[str, Any] | None = None,
    ) -> tuple[BaseChannel, Welcome]:
        """A session that sends ``schema``, and what the server granted.

        Args:
            client: A name for the server's log.
            transport: ``"auto"``, or ``"shm"`` or ``"zmq"`` to have that or fail.
            attributes: JSON values for the server.

        Raises:
            Refused: The server declined; field, got, expected.
            TransportUnavailable: ``transport`` was forced and cannot be had; the reason.
            ProtocolError, TransportTimeout, PeerGone: As ``describe``.
        """
        if transport not in ACCEPTS:
            raise TransportError(f"transport: got {transport!r}, expected one of {tuple(ACCEPTS)}")
        hello = Hello(client, schema, ACCEPTS[transport], dict(attributes or {}))
        if "shm" in hello.transports:
            _import_shm()
        link = self._take_link()
        try:
            return self._open(link, hello, transport)
        except BaseException:
            link.close()
            raise

    def close(self) -> None:
        """Channels stay. Idempotent."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def __enter__(self) -> Dialer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(
        self, link: ClientSocket, hello: Hello, transport: str
    ) -> tuple[BaseChannel, Welcome]:
        try:
            epoch, body = link.request(
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
        welcome = Welcome(Schema.from_json(string(body, "schema")), mapping(body, "attributes"))
        reason = string(body, "reason")
        channel: BaseChannel | None = None
        if body.get("shm") is not None:
            try:
                channel = self._join(
                    ShmOffer.from_body(mapping(body, "shm")), epoch, hello.schema, welcome.schema
                )
                reason = PROVEN
            except TransportUnavailable as error:
                reason = str(error)
        if channel is None and transport == "shm":
            link.tell(Opcode.BYE, epoch, {"reason": reason})
            raise TransportUnavailable(f"transport 'shm' cannot be had: {reason}")
        try:
            link.request(
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
            over_zmq = ZmqChannel(hello.schema, welcome.schema, epoch, link)
            link.carry(epoch, over_zmq.deliver)
            channel = over_zmq
        else:
            link.close()
        channel.transport_reason = reason
        return channel, welcome

    def _join(self, offer: ShmOffer, epoch: bytes, mine: Schema, theirs: Schema) -> BaseChannel:
        # What only shared memory needs is imported with it.
        from transport.shm.client_handshake import client_handshake

        parts = client_handshake(offer, epoch, mine, theirs, timeout_s=self._timeout_s)
        try:
            from transport.shm.channel import ShmChannel

            return ShmChannel(mine, theirs, epoch, parts, spin_us=self._spin_us)
        except BaseException as error:
            parts.close()
            if isinstance(error, ImportError):
                raise TransportUnavailable(f"client: {error}") from error
            raise

    def _take_link(self) -> ClientSocket:
        link, self._link = self._link, None
        if link is None:
            numeric, ipv6 = resolve(self.host, self.port)
            endpoint = f"tcp://{format_address(numeric, self.port)}"
            link = ClientSocket(endpoint, self._address, ipv6=ipv6, curve=self._curve)
        return link


def _import_shm() -> None:
    """What only shared memory needs, and its compiled functions: a second, or some where nothing is
    cached yet. Before HELLO, since an offer of segments does not wait for ever."""
    with contextlib.suppress(ImportError):  # whoever joins will say so
        import transport.shm.channel  # noqa: F401
