"""The arrays of one slot, and whether anybody still looks at them."""

from __future__ import annotations

from sys import getrefcount as _count
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transport.channel import Arrays
from transport.schema import Schema


class Views:
    """Read-only arrays over memory that will be reused.

    Memory can be reused behind a view's back; Python cannot forbid it, but it counts references.
    A slice, a tensor or a memoryview made from one of these arrays holds either that array or the
    one beneath, so their counts tell. What holds only an address (``ctypes``, a copy to a device
    under way) is its owner's to watch.

    Args:
        buffer: The memory, not an array: numpy's views of views hold the first array beneath
            them, and that must be this slot's own and nobody else's.
        offset: Where the slot begins in it.
    """

    __slots__ = ("_arrays", "_idle", "_watched")

    def __init__(self, schema: Schema, buffer: Any, offset: int = 0) -> None:
        beneath: NDArray[np.uint8] = np.frombuffer(
            buffer, np.uint8, count=max(1, schema.nbytes), offset=offset
        )
        self._arrays = schema.views(beneath)
        self._watched: list[object] = [self._arrays, beneath, *self._arrays.values()]
        del beneath
        self._idle = sum(map(_count, self._watched))

    @property
    def arrays(self) -> Arrays:
        """A mapping of its own for every asker: one that is kept counts as well."""
        return MappingProxyType(self._arrays)

    @property
    def in_use(self) -> bool:
        """Whether an array, the mapping, or anything made from them is held by somebody."""
        return sum(map(_count, self._watched)) != self._idle
