"""The layout of a segment: identity, flags and counters, slot headers, payloads.

The first page holds everything small. Every word that the peer polls has its own cache lines.
Payloads start on page boundaries, so that copies cover whole cache lines and ``cudaHostRegister``,
which needs pages, can be used.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transport.base_channel import SLOTS
from transport.channel import MAX_BODY_BYTES
from transport.errors import ProtocolError
from transport.schema import Schema
from transport.shm import ring_kernels

NONCE_BYTES = 16
_MAGIC = b"METRNM02"
_IDENTITY = struct.Struct(f"<8s{NONCE_BYTES}sIQ")
PAGE = ring_kernels.FIRST_PAGE.itemsize


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """The layout of one side's segment.

    Attributes:
        payload_bytes: Length of one payload.
        slots: Number of message slots, at most ``ring_kernels.MAX_SLOTS``.
    """

    payload_bytes: int
    slots: int = SLOTS

    @classmethod
    def of(cls, schema: Schema) -> SegmentLayout:
        """The layout of the segment of the side that sends ``schema``."""
        return cls(max(schema.nbytes, MAX_BODY_BYTES))

    @property
    def head_offset(self) -> int:
        """Offset of the number of messages published in this segment."""
        return ring_kernels.HEAD

    @property
    def tail_offset(self) -> int:
        """Offset of the number of messages that the owner released in the other segment."""
        return ring_kernels.TAIL

    @property
    def asleep_offset(self) -> int:
        """Offset of the flag that the owner sleeps until its eventfd is written."""
        return ring_kernels.ASLEEP

    @property
    def closed_offset(self) -> int:
        """Offset of the flag that the owner has closed the session."""
        return ring_kernels.CLOSED_FLAG

    @property
    def slot_bytes(self) -> int:
        """Length of a payload's place: ``payload_bytes`` rounded up to whole pages."""
        return -(-self.payload_bytes // PAGE) * PAGE

    @property
    def nbytes(self) -> int:
        """Length of the segment in bytes."""
        return PAGE + self.slots * self.slot_bytes

    def header_offset(self, slot: int) -> int:
        """Offset of the header with index ``slot``."""
        return ring_kernels.HEADERS + slot * ring_kernels.HEADER_BYTES

    def payload_offset(self, slot: int) -> int:
        """Offset of the payload place with index ``slot``."""
        return PAGE + slot * self.slot_bytes

    def payload(self, segment: NDArray[np.uint8], slot: int) -> NDArray[np.uint8]:
        """(payload_bytes,) view of one payload. Views of this array keep the segment mapped; views
        of a memoryview would not."""
        start = self.payload_offset(slot)
        return segment[start : start + self.payload_bytes]

    def identity(self, nonce: bytes) -> bytes:
        """The bytes that the creator writes at offset 0."""
        return _IDENTITY.pack(_MAGIC, nonce, self.slots, self.slot_bytes)

    def read_nonce(self, buffer: Any) -> bytes:
        """Read the nonce from a mapped segment.

        Raises:
            ProtocolError: The segment does not have this layout.
        """
        magic, nonce, slots, slot_bytes = _IDENTITY.unpack(bytes(buffer[: _IDENTITY.size]))
        got, expected = (magic, slots, slot_bytes), (_MAGIC, self.slots, self.slot_bytes)
        if got != expected:
            raise ProtocolError(f"segment identity: got {got}, expected {expected}")
        return bytes(nonce)
