"""Messages on a TCP connection, each behind its length in 4 bytes, big-endian."""

from __future__ import annotations

import socket
import struct
import time

from runtime.gateway.bounded_socket import BoundedSocket

_LENGTH = struct.Struct(">I")
_DEAD_AFTER = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
"""A peer whose host vanished is noticed after a minute."""


class MessageTooLong(Exception):
    """A message of more bytes than allowed. It was read to its end, so the next one can be.

    Rejected: to close the connection at once. A client that meets a broken connection may send the
    same message again on a new one, without end; an answer ends that.
    """


class NothingAsked(Exception):
    """No message began in time."""


class FramedSocket(BoundedSocket):
    """Receives and sends messages within limits of size and time. Not thread-safe but for ``cut``.

    Args:
        connected: A TCP connection, which then belongs to this object.
        max_bytes: Longest message that is taken.
        slow_s: Longest time for a message from its first byte to its last, in either direction.

    Attributes:
        arrived_ns: When the last message's last byte had arrived, ns on the monotonic clock.
    """

    def __init__(self, connected: socket.socket, max_bytes: int, slow_s: float) -> None:
        super().__init__(connected, _DEAD_AFTER)
        self._max_bytes, self._slow_s = max_bytes, slow_s
        self._head = memoryview(bytearray(_LENGTH.size))
        self.arrived_ns = 0

    def receive(self, wait_s: float | None = None) -> memoryview | None:
        """Return the next message, valid until the next call; None at the end of the connection.

        Args:
            wait_s: How long a message may take to begin; None for ever.

        Raises:
            NothingAsked: It did not begin in time.
            MessageTooLong: See there.
            TimeoutError: The peer was too slow.
            ConnectionError: The connection ended within a message.
            OSError: It broke.
        """
        self._socket.settimeout(wait_s)
        try:
            got = self._socket.recv_into(self._head)
        except TimeoutError as error:
            raise NothingAsked from error
        if not got:
            return None
        deadline_s = time.monotonic() + self._slow_s
        self._acknowledge()
        self._fill(self._head[got:], deadline_s)
        (length,) = _LENGTH.unpack(self._head)
        if length > self._max_bytes:
            self._drop(length, deadline_s)
            raise MessageTooLong(f"got {length} bytes, expected at most {self._max_bytes}")
        message = self._receive(length, deadline_s)
        self.arrived_ns = time.monotonic_ns()
        return message

    def free_memory(self) -> None:
        """Give up the memory of the last message; the next one gets its own."""
        self._buffer = memoryview(b"")

    def send(self, message: bytes | memoryview) -> None:
        """Send a message.

        Raises:
            TimeoutError: The peer reads too slowly.
            OSError: The connection broke.
        """
        self._socket.settimeout(self._slow_s)
        self._socket.sendall(b"".join((_LENGTH.pack(len(message)), message)))

    def _acknowledge(self) -> None:
        """Acknowledge now: a peer with Nagle's algorithm keeps its next bytes until then.

        Linux forgets the option after a while, so it is set again after each read.
        """
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
