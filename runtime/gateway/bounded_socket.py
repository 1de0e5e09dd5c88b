"""What the connections of gateways share that read from a socket within limits of time."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

import numpy as np

_DROP_BYTES = 65_536


class BoundedSocket:
    """A TCP connection that is read until a deadline. Not thread-safe but for ``cut``.

    Args:
        connected: The connection, which then belongs to this object.
        dead_after: TCP options and their values, which say when a vanished host is noticed.

    Raises:
        OSError: The peer left already.
    """

    def __init__(self, connected: socket.socket, dead_after: Sequence[tuple[int, int]]) -> None:
        self._socket = connected
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in dead_after:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self._buffer = memoryview(b"")

    def cut(self) -> None:
        """End the connection; a read in another thread returns. Idempotent."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended

    def close(self) -> None:
        """Free the connection. Idempotent."""
        self._socket.close()

    def _receive(self, count: int, deadline_s: float) -> memoryview:
        """Return the next ``count`` bytes, valid until the next call. Raises as ``_fill``."""
        if count > len(self._buffer):
            # Not a bytearray, whose zeros would make all of the memory real before anything came.
            self._buffer = np.empty(count, np.uint8).data
        received = self._buffer[:count]
        self._fill(received, deadline_s)
        return received

    def _fill(self, memory: memoryview, deadline_s: float) -> None:
        """Receive until ``memory`` is full.

        Raises:
            TimeoutError: ``deadline_s`` has passed, on the monotonic clock.
            ConnectionError: The connection ended before.
            OSError: It broke.
        """
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
        """Receive and forget ``count`` bytes. Raises as ``_fill``."""
        scratch = memoryview(bytearray(min(count, _DROP_BYTES)))
        while count:
            part = scratch[: min(count, _DROP_BYTES)]
            self._fill(part, deadline_s)
            count -= len(part)

    def _acknowledge(self) -> None:
        """Called after each read; for peers that wait for it."""
