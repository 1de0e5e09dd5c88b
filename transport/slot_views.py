"""The arrays of one slot, and whether references to them are still held."""

from __future__ import annotations

from sys import getrefcount as _count
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transport.channel import Arrays
from transport.schema import Schema


class SlotViews:
    """Read-only arrays over a slot whose memory will be reused.

    Python cannot prevent that memory is reused while a view of it exists, but it counts references.
    A slice, a tensor or a memoryview made from one of these arrays references that array or its
    base array, so the reference counts show whether the slot is in use. They do not show a user
    that holds only an address (``ctypes``, a running copy to a device); its owner must wait for it.

    Args:
        buffer: The memory; not an array. A numpy view of a view references the first array below
            it, and that one must belong to this slot alone.
        offset: Where the slot begins in ``buffer``, in bytes.
    """

    __slots__ = ("_arrays", "_idle", "_watched")

    def __init__(self, schema: Schema, buffer: Any, offset: int = 0) -> None:
        # Views of a read-only array are read-only, at no cost per view.
        beneath: NDArray[np.uint8] = np.frombuffer(
            memoryview(buffer).toreadonly(), np.uint8, max(1, schema.nbytes), offset
        )
        self._arrays = schema.views(beneath, writable=True)
        self._watched: list[object] = [self._arrays, beneath, *self._arrays.values()]
        del beneath
        self._idle = sum(map(_count, self._watched))

    @property
    def arrays(self) -> Arrays:
        """The arrays by name, in a new mapping per call: one that is kept counts as in use."""
        return MappingProxyType(self._arrays)

    @property
    def in_use(self) -> bool:
        """Whether an array, a mapping of them, or anything made from them is still referenced."""
        return sum(map(_count, self._watched)) != self._idle
