"""Buffers that messages are written into and sent from without a copy."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from transport.schema import ALIGNMENT, Schema
from transport.zeromq.client_socket import COPY_BELOW


class SendBuffer:
    """A buffer for one frame: a header, then the arrays of a schema.

    Attributes:
        frame: (offset + schema.nbytes,) uint8, the bytes to send.
        header: (offset,) bytes, the part of ``frame`` before the arrays.
        arrays: The schema's arrays by name, writable views of it.
        sendable: What to give to a socket for the whole ``frame``. A frame that is not copied is
            wrapped for ZMQ here, once: to wrap it for every message wakes a Python thread of
            pyzmq's after each.
    """

    __slots__ = ("arrays", "frame", "header", "sendable")

    def __init__(self, schema: Schema, offset: int) -> None:
        nbytes = offset + schema.nbytes
        room = np.zeros(nbytes + ALIGNMENT, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        self.frame: NDArray[np.uint8] = room[start : start + nbytes]
        # Written here, so that the first messages do not cost a page fault per 4 KiB.
        self.frame.fill(0)
        payload = self.frame[offset:] if schema.nbytes else np.zeros(1, np.uint8)
        self.arrays: dict[str, NDArray[Any]] = schema.views(payload, writable=True)
        whole = self.frame.data
        self.header = whole[:offset]
        self.sendable: memoryview | zmq.Frame = (
            whole if nbytes < COPY_BELOW else zmq.Frame(self.frame, copy=False)
        )


class SendBuffers:
    """The buffers of one session, from which a socket sends without copying.

    A sent buffer may be written again once the peer has received its message. The buffer that was
    freed last is used next, because the caches still hold it. Rejected: using them in turn, which
    cost 10 to 15 % of a round trip of one image.

    There are never more buffers than messages that the peer has not received, plus one.
    """

    def __init__(self, schema: Schema, offset: int) -> None:
        self._schema, self._offset = schema, offset
        self._claimed: SendBuffer | None = SendBuffer(schema, offset)
        self._free: list[SendBuffer] = []
        self._under_way: deque[tuple[int, SendBuffer]] = deque()

    def claim(self) -> SendBuffer:
        """Return the buffer to write next; the same one until ``sent``."""
        if self._claimed is None:
            self._claimed = (
                self._free.pop() if self._free else SendBuffer(self._schema, self._offset)
            )
        return self._claimed

    def sent(self, sequence: int) -> None:
        """Record that the claimed buffer was sent as message ``sequence``."""
        self._under_way.append((sequence, self.claim()))
        self._claimed = None

    def reclaim(self, received: int) -> None:
        """Free the buffers of all messages below ``received``, which the peer has received."""
        under_way = self._under_way
        while under_way and under_way[0][0] < received:
            self._free.append(under_way.popleft()[1])
