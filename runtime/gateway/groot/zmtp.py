"""The server's end of a connection of ZMTP 3, ZMQ's protocol (RFC 37), for REQ clients.

It is not a ZMQ socket, because that bounds a frame but not a message, so that one client could take
all memory; and it disconnects the sender of a long message without an answer, for which GR00T's
client then waits without end.

Frames are ``flags, size, data``. A request is an envelope, of which the last frame is empty, and
the frame of the request itself. The reply has the same envelope.
"""

from __future__ import annotations

import select
import socket
import struct
import time

from runtime.gateway.bounded_socket import BoundedSocket

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\3\1" + b"NULL".ljust(20, b"\0") + bytes(32)
"""Signature, version 3.1, mechanism, and zeros: 64 bytes."""
CLIENTS = (b"REQ", b"DEALER")
"""Types of ZMQ sockets that may connect."""
MAX_ENVELOPE_FRAMES = 3
MAX_SMALL_BYTES = 512
"""Longest command, and longest frame of an envelope. ZMQ's own are up to 300."""
HANDSHAKE_S = 5.0
SLOW_S = 30.0
"""Longest time for a message from its first byte to its last, in either direction."""
_MORE, _LONG, _COMMAND = 1, 2, 4
_SIZE = struct.Struct(">Q")
_DEAD_AFTER = (
    (socket.TCP_KEEPIDLE, 5),
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 3),
    (socket.TCP_USER_TIMEOUT, 20_000),  # ms; keepalive says nothing while a reply is on its way
)
"""A client whose host vanished is noticed after 20 s."""


class ProtocolViolation(Exception):
    """The peer is no ZMQ client that can be served; says got and expected."""


class RequestTooLong(Exception):
    """A request of more bytes than allowed. It was read to its end, so it can be answered.

    Attributes:
        envelope: Of the request.
    """

    def __init__(self, envelope: list[bytes], got: int, most: int) -> None:
        super().__init__(f"request: got {got} bytes, expected at most {most}")
        self.envelope = envelope


class ZmtpConnection(BoundedSocket):
    """Receives requests and sends replies within limits of size and time.

    Not thread-safe but for ``cut``.

    Args:
        connected: A TCP connection, which then belongs to this object.
        max_bytes: Longest request that is taken.

    Raises:
        OSError: The peer left already.
    """

    def __init__(self, connected: socket.socket, max_bytes: int) -> None:
        super().__init__(connected, _DEAD_AFTER)
        self._max_bytes = max_bytes

    def handshake(self) -> None:
        """Exchange greetings and socket types.

        Raises:
            ProtocolViolation: The peer is no ZMQ socket, or of another type, or wants encryption.
            TimeoutError: It took over ``HANDSHAKE_S``.
            OSError: The connection broke.
        """
        deadline_s = time.monotonic() + HANDSHAKE_S
        self._send(GREETING)
        signature = self._read(12, deadline_s)
        if signature[0] != 0xFF or not signature[9] & 1 or signature[10] < 3:
            raise ProtocolViolation(f"got {signature!r}, expected a greeting of ZMTP 3")
        mechanism = self._read(len(GREETING) - 12, deadline_s)[:20].rstrip(b"\0")
        if mechanism != b"NULL":
            raise ProtocolViolation(f"got the mechanism {mechanism!r}, expected NULL")
        self._send(_command(b"READY", _property(b"Socket-Type", b"ROUTER")))
        flags, size = self._head(deadline_s)
        if not flags & _COMMAND:
            raise ProtocolViolation("got a message, expected READY first")
        kind = _socket_type(self._small(size, deadline_s))
        if kind not in CLIENTS:
            raise ProtocolViolation(f"got a socket of type {kind!r}, expected REQ")

    def receive(self) -> tuple[list[bytes], memoryview] | None:
        """Return the next request's envelope and content; None at the end of the connection.

        The content is valid until the next call.

        Raises:
            RequestTooLong: See there.
            ProtocolViolation: Not a request of a REQ socket.
            TimeoutError: The peer was too slow.
            OSError: The connection broke.
        """
        envelope: list[bytes] = []
        while True:
            if not envelope:  # a client may be idle here, and only here
                self._socket.settimeout(None)
                if not self._socket.recv(1, socket.MSG_PEEK):
                    return None
                deadline_s = time.monotonic() + SLOW_S
            flags, size = self._head(deadline_s)
            if flags & _COMMAND:
                self._obey(self._small(size, deadline_s))
            elif flags & _MORE:
                envelope.append(self._small(size, deadline_s))
                if len(envelope) > MAX_ENVELOPE_FRAMES:
                    raise ProtocolViolation("got a request of many frames, expected one")
            elif not envelope or envelope[-1]:
                raise ProtocolViolation("got a message without an empty frame, expected one")
            else:
                return envelope, self._content(envelope, size, deadline_s)

    def serve_until(self, done_fd: int) -> None:
        """Answer heartbeats until ``done_fd`` is readable or the peer sends a request or leaves."""
        poll = select.poll()
        poll.register(done_fd, select.POLLIN)
        poll.register(self._socket, select.POLLIN)
        while all(fd != done_fd for fd, _ in poll.poll()):
            try:
                waits = self._take_command(time.monotonic() + SLOW_S)
            except OSError:
                waits = False  # the next call says why
            if not waits:
                poll.unregister(self._socket)

    def send(self, envelope: list[bytes], reply: bytes) -> None:
        """Send a reply.

        Raises:
            TimeoutError: The peer reads too slowly.
            OSError: The connection broke.
        """
        frames = [_frame(_MORE, part) for part in envelope]
        self._send(b"".join((*frames, _frame(0, reply))))

    def _content(self, envelope: list[bytes], size: int, deadline_s: float) -> memoryview:
        if size > self._max_bytes:
            self._drop(size, deadline_s)
            raise RequestTooLong(envelope, size, self._max_bytes)
        return self._receive(size, deadline_s)

    def _take_command(self, deadline_s: float) -> bool:
        """Read and obey what comes next if it is a command; else leave it, and return False."""
        first = self._socket.recv(1, socket.MSG_PEEK)
        if not first or not first[0] & _COMMAND:
            return False
        _, size = self._head(deadline_s)
        self._obey(self._small(size, deadline_s))
        return True

    def _obey(self, command: bytes) -> None:
        """Answer a heartbeat. Its context, after two bytes of a timeout, comes back."""
        if command[:5] == b"\4PING":
            self._send(_command(b"PONG", command[7:]))

    def _head(self, deadline_s: float) -> tuple[int, int]:
        """Return a frame's flags, and the size of what follows."""
        flags, size = self._read(2, deadline_s)
        if flags & ~(_MORE | _LONG | _COMMAND):
            raise ProtocolViolation(f"got the flags {flags}, expected a frame of ZMTP 3")
        if flags & _LONG:
            (size,) = _SIZE.unpack(bytes([size]) + self._read(_SIZE.size - 1, deadline_s))
        return flags, size

    def _small(self, size: int, deadline_s: float) -> bytes:
        if size > MAX_SMALL_BYTES:
            raise ProtocolViolation(f"got {size} bytes, expected at most {MAX_SMALL_BYTES}")
        return self._read(size, deadline_s)

    def _read(self, size: int, deadline_s: float) -> bytes:
        data = bytearray(size)
        self._fill(memoryview(data), deadline_s)
        return bytes(data)

    def _send(self, data: bytes) -> None:
        self._socket.settimeout(SLOW_S)
        self._socket.sendall(data)


def _frame(flags: int, data: bytes) -> bytes:
    if len(data) < 256:
        return bytes((flags, len(data))) + data
    return bytes((flags | _LONG,)) + _SIZE.pack(len(data)) + data


def _command(name: bytes, data: bytes) -> bytes:
    return _frame(_COMMAND, bytes((len(name),)) + name + data)


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value


def _socket_type(ready: bytes) -> bytes:
    """Return the socket type in the command READY, whose properties are names and values.

    Raises:
        ProtocolViolation: Another command, or none that can be read.
    """
    name, at = ready[1:6], 6
    while ready[0:1] == b"\5" and name == b"READY" and at < len(ready):
        start = at + 1 + ready[at] + 4
        end = start + int.from_bytes(ready[start - 4 : start], "big")
        if end > len(ready):
            break
        if ready[at + 1 : start - 4].lower() == b"socket-type":
            return ready[start:end]
        at = end
    raise ProtocolViolation(f"got {ready[:40]!r}, expected READY with a socket type")
