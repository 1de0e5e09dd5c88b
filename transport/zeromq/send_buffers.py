"""Buffers that messages are written into and sent from, and whose turn it is."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transport.schema import ALIGNMENT, Schema


class Buffer:
    """Room for one frame: a header, then the arrays of a schema.

    Attributes:
        frame: (offset + schema.nbytes,) uint8, what is sent.
        arrays: The schema's arrays by name, writable views of it.
    """

    __slots__ = ("arrays", "frame")

    def __init__(self, schema: Schema, offset: int) -> None:
        nbytes = offset + schema.nbytes
        room = np.zeros(nbytes + ALIGNMENT, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        self.frame: NDArray[np.uint8] = room[start : start + nbytes]
        # Written here and not by the first messages: a page fault per 4 KiB is no part of them.
        self.frame.fill(0)
        payload = self.frame[offset:] if schema.nbytes else np.zeros(1, np.uint8)
        self.arrays: dict[str, NDArray[Any]] = schema.views(payload, writable=True)


class Staging:
    """Buffers that a socket sends from without copying them.

    One that was sent may be written again once the peer has received what was in it: then it has
    long left this process. The buffer that came back last is the next to be written, since it is
    the one that the caches still hold; taking them in turn was measured at 10 to 15 % of a round
    trip of one picture.

    Never more buffers than messages that the peer has not received, and one.
    """

    def __init__(self, schema: Schema, offset: int) -> None:
        self._schema, self._offset = schema, offset
        self._claimed: Buffer | None = Buffer(schema, offset)
        self._free: list[Buffer] = []
        self._under_way: deque[tuple[int, Buffer]] = deque()

    def claim(self) -> Buffer:
        """The buffer to write next; the same one until it is ``sent``."""
        if self._claimed is None:
            self._claimed = self._free.pop() if self._free else Buffer(self._schema, self._offset)
        return self._claimed

    def sent(self, sequence: int) -> None:
        """The claimed buffer is on its way as message ``sequence``."""
        self._under_way.append((sequence, self.claim()))
        self._claimed = None

    def reclaim(self, received: int) -> None:
        """The peer has received every message below ``received``."""
        under_way = self._under_way
        while under_way and under_way[0][0] < received:
            self._free.append(under_way.popleft()[1])
