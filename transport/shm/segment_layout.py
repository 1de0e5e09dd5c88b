"""Where things are in a segment: identity, flags and counters, slot headers, payloads.

The first page holds what is small, every word that the peer watches on cache lines of its own.
Payloads start on pages: a copy runs along whole cache lines, and a driver that wants pages
(``cudaHostRegister``) gets them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transport.base import SLOTS
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
    """One side's segment.

    Attributes:
        payload_bytes: Room for one message's payload.
        slots: How many messages it has room for, at most ``steps.MAX_SLOTS``.
    """

    payload_bytes: int
    slots: int = SLOTS

    @classmethod
    def of(cls, schema: Schema) -> SegmentLayout:
        """The segment of whoever sends ``schema``."""
        return cls(max(schema.nbytes, MAX_BODY_BYTES))

    @property
    def head_offset(self) -> int:
        """Of the writer's count of messages it published in this segment."""
        return ring_kernels.HEAD

    @property
    def tail_offset(self) -> int:
        """Of the same process' count of messages it released in the other segment."""
        return ring_kernels.TAIL

    @property
    def asleep_offset(self) -> int:
        """Of the flag by which the same process says that it sleeps until its bell is rung."""
        return ring_kernels.ASLEEP

    @property
    def closed_offset(self) -> int:
        """Of the flag by which the same process says that it has closed the session."""
        return ring_kernels.CLOSED_FLAG

    @property
    def slot_bytes(self) -> int:
        return -(-self.payload_bytes // PAGE) * PAGE

    @property
    def nbytes(self) -> int:
        return PAGE + self.slots * self.slot_bytes

    def header_offset(self, slot: int) -> int:
        return ring_kernels.HEADERS + slot * ring_kernels.HEADER_BYTES

    def payload_offset(self, slot: int) -> int:
        return PAGE + slot * self.slot_bytes

    def payload(self, segment: NDArray[np.uint8], slot: int) -> NDArray[np.uint8]:
        """The payload of one slot, without copying: an array, whose views keep the segment mapped
        (those of a memoryview would not)."""
        start = self.payload_offset(slot)
        return segment[start : start + self.payload_bytes]

    def identity(self, nonce: bytes) -> bytes:
        """What the creator writes at offset 0."""
        return _IDENTITY.pack(_MAGIC, nonce, self.slots, self.slot_bytes)

    def read_nonce(self, buffer: Any) -> bytes:
        """The nonce in a mapped segment.

        Raises:
            ProtocolError: Not a segment of this layout.
        """
        magic, nonce, slots, slot_bytes = _IDENTITY.unpack(bytes(buffer[: _IDENTITY.size]))
        got, expected = (magic, slots, slot_bytes), (_MAGIC, self.slots, self.slot_bytes)
        if got != expected:
            raise ProtocolError(f"segment identity: got {got}, expected {expected}")
        return bytes(nonce)
