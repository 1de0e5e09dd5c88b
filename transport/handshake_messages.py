"""Control messages: a fixed prefix, then JSON of bounded size.

Frame 0 holds magic, protocol version, opcode and epoch. Frame 1, if present, is the body. The
prefix and REFUSED never change, so that two different versions can always report the mismatch.
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
    """Types of message, in frame 0."""

    DESCRIBE = 1  # client: request the description of the served policy
    DESCRIPTION = 2
    HELLO = 3  # client: request a session
    WELCOME = 4
    REFUSED = 5
    CONFIRM = 6  # client: chosen transport and reason; server: the same, as agreement
    BYE = 7  # either: the session has ended, with the reason
    PING = 8  # server: checks a connection by sending; never answered
    MESSAGE = 9  # either: one message of a session (see transport.zeromq.channel)
    CREDIT = 10  # either: released slots, when no message carries the count
    ADMIN_COMMAND = 11  # operator: an admin command and its arguments
    ADMIN_REPLY = 12


@dataclass(frozen=True, slots=True)
class Peer:
    """The sender of a control message.

    Attributes:
        address: Numeric address of the connection; empty if unknown.
        user: Name of the sender's key (``ServerKeys.find_name``); empty without encryption.
    """

    address: str = ""
    user: str = ""

    @classmethod
    def of(cls, frame: zmq.Frame) -> Peer:
        """The sender of ``frame``, from ZMQ's metadata."""
        return cls(_metadata(frame, "Peer-Address"), _metadata(frame, "User-Id"))

    def __str__(self) -> str:
        return f"{self.user} at {self.address}" if self.user else self.address


def _metadata(frame: zmq.Frame, name: str) -> str:
    try:
        return str(frame.get(name))
    except zmq.ZMQError:  # no metadata of that name
        return ""


@dataclass(frozen=True, slots=True)
class Hello:
    """A client's request for a session.

    Attributes:
        client: The client's name, for logs.
        schema: Schema of the messages that the client will send.
        transports: Accepted transports, of ``TRANSPORTS``.
        attributes: JSON values for the server's ``accept`` callback.
    """

    client: str
    schema: Schema
    transports: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)

    def to_body(self) -> dict[str, Any]:
        """The body of a HELLO message."""
        return {
            "client": self.client,
            "schema": self.schema.to_json(),
            "transports": list(self.transports),
            "attributes": self.attributes,
        }

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Hello:
        """Parse an untrusted body. Raises ``ProtocolError`` or ``SchemaMismatch``."""
        client = text_field(body, "client")
        if len(client) > MAX_CLIENT_CHARS:
            raise ProtocolError(f"client: got {len(client)} characters, at most {MAX_CLIENT_CHARS}")
        if not client.isprintable():  # it is shown in logs and on operators' terminals
            raise ProtocolError(f"client: got {client!r:.200}, expected printable characters")
        transports = body.get("transports")
        if not isinstance(transports, list) or any(t not in TRANSPORTS for t in transports):
            raise ProtocolError(
                f"transports: got {transports!r:.80}, expected some of {TRANSPORTS}"
            )
        schema = Schema.from_json(text_field(body, "schema"))
        return cls(client, schema, tuple(transports), object_field(body, "attributes"))


@dataclass(frozen=True, slots=True)
class Welcome:
    """A session that a server grants.

    Attributes:
        schema: Schema of the messages that the server will send.
        attributes: JSON values for the client, such as limits.
    """

    schema: Schema
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShmOffer:
    """Two named segments, and the socket where the client proves that it mapped them.

    Attributes:
        names, sizes: Names and lengths in bytes. The client writes the first segment.
        socket: Abstract AF_UNIX name, without the leading NUL.
    """

    names: tuple[str, str]
    sizes: tuple[int, int]
    socket: str

    def to_body(self) -> dict[str, Any]:
        """The ``shm`` value in the body of a WELCOME message."""
        return {"names": self.names, "sizes": self.sizes, "socket": self.socket}

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> ShmOffer:
        """Parse an untrusted body. Raises ``ProtocolError``."""
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
    """Encode one control message as frames.

    Raises:
        TransportError: ``body`` is not JSON, or longer than ``MAX_CONTROL_BYTES``.
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
    """Decode frame 0 to (version, opcode, epoch). A later version may have an unknown opcode.

    Raises:
        ProtocolError: ``head`` is not a frame of this protocol.
    """
    magic = b""
    if len(head) >= PREFIX.size:
        magic, version, opcode, epoch = PREFIX.unpack_from(head)
    if magic != MAGIC:
        raise ProtocolError(
            f"frame: got {bytes(head[:16])!r} ({len(head)} bytes), expected {MAGIC!r}..."
        )
    return version, opcode, epoch


def decode_body(text: bytes) -> dict[str, Any]:
    """Decode frame 1 to a JSON object; empty bytes give an empty object.

    Raises:
        ProtocolError: ``text`` is too long, not JSON, or not an object.
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


def text_field(body: Mapping[str, Any], name: str) -> str:
    """Return ``body[name]``, which must be text. Raises ``ProtocolError``."""
    value = body.get(name)
    if not isinstance(value, str):
        raise ProtocolError(f"{name}: got {value!r:.80}, expected text")
    return value


def object_field(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return ``body[name]``, which must be a JSON object. Raises ``ProtocolError``."""
    value = body.get(name)
    if not isinstance(value, dict):
        raise ProtocolError(f"{name}: got {value!r:.80}, expected an object")
    return value
