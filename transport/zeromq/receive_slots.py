"""Memory that short received messages are copied into, with arrays that were made once."""

from __future__ import annotations

from typing import Any

import numpy as np

from transport.schema import ALIGNMENT, Schema
from transport.slot_views import SlotViews

MAX_SLOT_BYTES = 16384
"""Longest message that is copied. To make the arrays of a message costs as much as to copy this."""


class ReceiveSlots:
    """The slots of one session, for messages of a fixed length.

    Args:
        schema: Of the messages.
        count: Number of slots. Message ``n`` is in slot ``n % count``, so the caller must have
            released message ``n - count``.
    """

    def __init__(self, schema: Schema, count: int) -> None:
        self._nbytes = schema.nbytes
        self._slots = [_slot(schema) for _ in range(count)]

    def fill(self, sequence: int, payload: memoryview) -> SlotViews | None:
        """Copy ``payload`` into the slot of message ``sequence``; None if its length is wrong."""
        if len(payload) != self._nbytes:
            return None
        memory, views = self._slots[sequence % len(self._slots)]
        memory[:] = payload
        return views


def _slot(schema: Schema) -> tuple[memoryview, SlotViews]:
    # At least one byte: a schema may have no arrays, and numpy accepts no empty buffer.
    room: Any = np.zeros(max(1, schema.nbytes) + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    memory = memoryview(room)[start:]
    return memory[: schema.nbytes], SlotViews(schema, memory)
