"""Messages on a TCP connection, each behind its length in 4 bytes, big-endian."""

from __future__ import annotations

import socket
import struct
import time

import numpy as np

_LENGTH = struct.Struct(">I")
_DROP_BYTES = 65_536
_DEAD_AFTER = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
"""A peer whose host vanished is noticed after a minute."""


class MessageTooLong(Exception):
    """A message of more bytes than allowed. It was read to its end, so the next one can be.

    Rejected: to close the connection at once. A client that meets a broken connection may send the
    same message again on a new one, without end; an answer ends that.
    """


class NothingAsked(Exception):
    """No message began in time."""


class FramedSocket:
    """Receives and sends messages within limits of size and time. Not thread-safe but for ``cut``.

    Args:
        connected: A TCP connection, which then belongs to this object.
        max_bytes: Longest message that is taken.
        slow_s: Longest time for a message from its first byte to its last, in either direction.

    Attributes:
        arrived_ns: When the last message's last byte had arrived, ns on the monotonic clock.
    """

    def __init__(self, connected: socket.socket, max_bytes: int, slow_s: float) -> None:
        self._socket, self._max_bytes, self._slow_s = connected, max_bytes, slow_s
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _DEAD_AFTER:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self._head = memoryview(bytearray(_LENGTH.size))
        self._buffer = memoryview(b"")
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
        if length > len(self._buffer):
            # Not a bytearray, whose zeros would make all of the memory real before anything came.
            self._buffer = np.empty(length, np.uint8).data
        message = self._buffer[:length]
        self._fill(message, deadline_s)
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

    def cut(self) -> None:
        """End the connection; a ``receive`` in another thread returns. Idempotent."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended

    def close(self) -> None:
        """Free the connection. Idempotent."""
        self._socket.close()

    def _fill(self, memory: memoryview, deadline_s: float) -> None:
        while memory:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("timed out")
            self._socket.settimeout(left_s)
            got = self._socket.recv_into(memory)
            if not got:
                raise ConnectionError("it ended within a message")
            self._acknowledge()
            memory = memory[got:]

    def _drop(self, count: int, deadline_s: float) -> None:
        scratch = memoryview(bytearray(min(count, _DROP_BYTES)))
        while count:
            part = scratch[: min(count, _DROP_BYTES)]
            self._fill(part, deadline_s)
            count -= len(part)

    def _acknowledge(self) -> None:
        """Acknowledge now: a peer with Nagle's algorithm keeps its next bytes until then.

        Linux forgets the option after a while, so it is set again after each read.
        """
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
