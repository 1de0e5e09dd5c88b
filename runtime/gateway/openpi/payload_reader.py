"""Frames of websockets whose large payloads are received where they are parsed.

The library's reader appends what arrives to a buffer, and then copies a payload out of it: two
copies of each picture. Here a large payload has memory of its own, into which the socket writes.
"""

from __future__ import annotations

from collections.abc import Generator

from websockets.server import ServerProtocol
from websockets.streams import StreamReader

LARGE_BYTES = 64 * 1024
"""The smallest payload that has memory of its own."""


class PayloadReader(StreamReader):
    """A reader whose caller may write the bytes of a large payload into ``missing``.

    Attributes:
        missing: The rest of the payload that is being read; empty if there is none. It is never
            longer than the protocol's largest message.
    """

    def __init__(self) -> None:
        super().__init__()
        self.missing = memoryview(b"")
        self._payload = bytearray()

    def written(self, count: int) -> None:
        """Note that ``count`` bytes of ``missing`` were written."""
        self.missing = self.missing[count:]

    def read_exact(self, n: int) -> Generator[None, None, bytearray]:
        """As the library's. A large result is used again for the next payload of its size."""
        if n < LARGE_BYTES:
            return (yield from super().read_exact(n))
        if len(self._payload) != n:
            self._payload = bytearray(n)
        self.missing = memoryview(self._payload)
        while True:
            self._move_buffered()
            if not self.missing:
                return self._payload
            if self.eof:
                raise EOFError(f"stream ends {len(self.missing)} bytes before the frame's end")
            yield

    def _move_buffered(self) -> None:
        count = min(len(self.buffer), len(self.missing))
        if count:
            self.missing[:count] = self.buffer[:count]
            del self.buffer[:count]
            self.written(count)


class PayloadProtocol(ServerProtocol):
    """The library's protocol with a ``PayloadReader``.

    Frames are masked, and unmasking copies: so a payload's memory is free for the next one as soon
    as its frame is an event.
    """

    reader: PayloadReader

    def parse(self) -> Generator[None]:
        """Begin to parse, which the constructor of the library calls."""
        self.reader = PayloadReader()
        yield from super().parse()
