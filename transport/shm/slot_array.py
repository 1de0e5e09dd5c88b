"""An array of slots in shared memory, each for one value of a schema."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transport.channel import Arrays
from transport.schema import Schema
from transport.shm.atomics import CACHE_LINES
from transport.shm.segment import MappedSegment


class SlotArray:
    """``count`` slots, each of which holds one value of ``schema``.

    Args:
        memory: The segment that holds them. The views keep it mapped.
        offset: Of the first slot, in bytes.

    Attributes:
        blocks: (schema.nbytes,) uint8 view of each slot.
        views: The arrays of each slot; read-only where ``memory`` is.
    """

    def __init__(self, memory: MappedSegment, offset: int, schema: Schema, count: int) -> None:
        self.schema, self.count = schema, count
        self._memory, self._offset = memory.bytes, offset
        self._stride = _stride(schema)
        self._columns: dict[str, NDArray[Any]] = {}
        begins = [offset + index * self._stride for index in range(count)]
        self.blocks: list[NDArray[np.uint8]] = [
            memory.bytes[begin : begin + schema.nbytes] for begin in begins
        ]
        self.views: list[Arrays] = [schema.views(block, writable=True) for block in self.blocks]

    def column(self, name: str) -> NDArray[Any]:
        """(count, ...) view of the array ``name`` of every slot."""
        if name in self._columns:
            return self._columns[name]
        spec, begin = self.schema.specs[name], self._offset + self.schema.offsets[name]
        one = np.ndarray(spec.shape, spec.dtype, self._memory, begin)
        shape, strides = (self.count, *spec.shape), (self._stride, *one.strides)
        column: NDArray[Any] = np.ndarray(shape, spec.dtype, self._memory, begin, strides)
        self._columns[name] = column
        return column

    @staticmethod
    def nbytes(schema: Schema, count: int) -> int:
        """Length of ``count`` slots in bytes; a multiple of ``CACHE_LINES``."""
        return count * _stride(schema)


def _stride(schema: Schema) -> int:
    return -(-max(1, schema.nbytes) // CACHE_LINES) * CACHE_LINES
