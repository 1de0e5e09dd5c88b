"""Messages of the handshake: a prefix that never changes, then JSON with a hard size cap.

Frame 0 is magic, protocol version, opcode and epoch; frame 1, where there is one, the body. The
prefix and REFUSED stay as they are in every future version, so that two versions can always tell
each other so.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import zmq

from transport.errors import ProtocolError, TransportError
from transport.schema import Schema

PROTOCOL_VERSION = 2
MAGIC = b"MTRN"
PREFIX = struct.Struct("<4sHH16s")
"""Magic, protocol version, opcode, epoch."""
EPOCH_BYTES = 16
NO_EPOCH = bytes(EPOCH_BYTES)
MAX_CONTROL_BYTES = 256 * 1024
MAX_CLIENT_CHARS = 256
TRANSPORTS = ("shm", "zmq")


class Opcode(IntEnum):
    """What a frame 0 announces."""

    DESCRIBE = 1  # client: what do you serve?
    DESCRIPTION = 2
    HELLO = 3  # client: may I have a session?
    WELCOME = 4
    REFUSED = 5
    CONFIRM = 6  # client: this transport, because; server: the same, agreed
    BYE = 7  # either: the session is over, because
    PING = 8  # server: are you there? Never answered: that it can be sent is the answer
    MESSAGE = 9  # either: one message of a session (see transport.zeromq.channel)
    CREDIT = 10  # either: slots released, when no message was there to carry it
    ASK = 11  # operator: a question or an order for whoever serves
    ANSWER = 12


@dataclass(frozen=True, slots=True)
class Peer:
    """Who sent a control message.

    Attributes:
        address: Numeric, as the network says; empty where it does not.
        user: Whose key it came with; empty without encryption.
    """

    address: str = ""
    user: str = ""

    @classmethod
    def of(cls, frame: zmq.Frame) -> Peer:
        return cls(_metadata(frame, "Peer-Address"), _metadata(frame, "User-Id"))

    def __str__(self) -> str:
        return f"{self.user} at {self.address}" if self.user else self.address


def _metadata(frame: zmq.Frame, name: str) -> str:
    try:
        return str(frame.get(name))
    except zmq.ZMQError:  # it has none of that name
        return ""


@dataclass(frozen=True, slots=True)
class Hello:
    """What a client says of itself.

    Attributes:
        client: Its name, for logs.
        schema: What it will send.
        transports: Which it accepts, of ``TRANSPORTS``.
        attributes: JSON values for whoever accepts it: session kind, deterministic or not.
    """

    client: str
    schema: Schema
    transports: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)

    def to_body(self) -> dict[str, Any]:
        return {
            "client": self.client,
            "schema": self.schema.to_json(),
            "transports": list(self.transports),
            "attributes": self.attributes,
        }

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Hello:
        """Raises ``ProtocolError`` or ``SchemaMismatch``; ``body`` is not trusted."""
        client = string(body, "client")
        if len(client) > MAX_CLIENT_CHARS:
            raise ProtocolError(f"client: got {len(client)} characters, at most {MAX_CLIENT_CHARS}")
        if not client.isprintable():  # it is shown in logs and on operators' terminals
            raise ProtocolError(f"client: got {client!r:.200}, expected printable characters")
        transports = body.get("transports")
        if not isinstance(transports, list) or any(t not in TRANSPORTS for t in transports):
            raise ProtocolError(
                f"transports: got {transports!r:.80}, expected some of {TRANSPORTS}"
            )
        schema = Schema.from_json(string(body, "schema"))
        return cls(client, schema, tuple(transports), mapping(body, "attributes"))


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a server grants.

    Attributes:
        schema: What it will send.
        attributes: JSON values: limits and the like.
    """

    schema: Schema
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShmOffer:
    """Two segments by name, first the one the client writes, and where to prove they were read.

    Attributes:
        names, sizes: Of both segments; lengths in bytes.
        socket: Abstract AF_UNIX name, without the leading NUL.
    """

    names: tuple[str, str]
    sizes: tuple[int, int]
    socket: str

    def to_body(self) -> dict[str, Any]:
        return {"names": self.names, "sizes": self.sizes, "socket": self.socket}

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> ShmOffer:
        """Raises ``ProtocolError``."""
        try:
            client, server = body["names"]
            sizes = client_bytes, server_bytes = body["sizes"]
            names = (client, server, body["socket"])
            texts = all(isinstance(text, str) and text.isascii() for text in names)
            if not texts or any(type(size) is not int for size in sizes):
                raise ValueError("names as ASCII text, sizes as integers")
            return cls((client, server), (client_bytes, server_bytes), body["socket"])
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"offer: got {body!r:.200}, expected {error}") from error


def encode(opcode: Opcode, epoch: bytes, body: Mapping[str, Any] | None = None) -> list[bytes]:
    """The frames of one control message.

    Raises:
        TransportError: ``body`` is not JSON, or more than ``MAX_CONTROL_BYTES``.
    """
    frames = [PREFIX.pack(MAGIC, PROTOCOL_VERSION, opcode, epoch)]
    if body is not None:
        try:
            text = json.dumps(body).encode()
        except (TypeError, ValueError) as error:
            raise TransportError(f"{opcode.name}: its body is not JSON ({error})") from error
        if len(text) > MAX_CONTROL_BYTES:
            raise TransportError(
                f"{opcode.name}: got {len(text)} bytes of JSON, at most {MAX_CONTROL_BYTES}"
            )
        frames.append(text)
    return frames


def decode_prefix(head: bytes | memoryview) -> tuple[int, int, bytes]:
    """(version, opcode, epoch) of a frame 0; the opcode may be one of a later version.

    Raises:
        ProtocolError: Not a frame of this protocol.
    """
    if len(head) < PREFIX.size or head[: len(MAGIC)] != MAGIC:
        raise ProtocolError(
            f"frame: got {bytes(head[:16])!r} ({len(head)} bytes), expected {MAGIC!r}..."
        )
    _, version, opcode, epoch = PREFIX.unpack_from(head)
    return version, opcode, epoch


def decode_body(text: bytes) -> dict[str, Any]:
    """A frame 1 as a JSON object; empty bytes are an empty one.

    Raises:
        ProtocolError: Too long, not JSON, or not an object.
    """
    if len(text) > MAX_CONTROL_BYTES:
        raise ProtocolError(f"body: got {len(text)} bytes, at most {MAX_CONTROL_BYTES}")
    try:
        body = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"body: got {text[:80]!r}, expected JSON ({error})") from error
    if not isinstance(body, dict):
        raise ProtocolError(f"body: got {text[:80]!r}, expected a JSON object")
    return body


def string(body: Mapping[str, Any], name: str) -> str:
    """``body[name]``, text. Raises ``ProtocolError``."""
    value = body.get(name)
    if not isinstance(value, str):
        raise ProtocolError(f"{name}: got {value!r:.80}, expected text")
    return value


def mapping(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """``body[name]``, an object. Raises ``ProtocolError``."""
    value = body.get(name)
    if not isinstance(value, dict):
        raise ProtocolError(f"{name}: got {value!r:.80}, expected an object")
    return value
