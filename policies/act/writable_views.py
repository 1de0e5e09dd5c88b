"""Views that libraries accept which demand a writable array but only read it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class _WritableMemory:
    """Describes an array's memory to numpy as writable, and keeps the array alive."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.array = array
        self.__array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": "|u1",
            "data": (array.ctypes.data, False),
        }


def nominally_writable(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a view of a C-contiguous uint8 array that claims to be writable but must only be read.

    Sessions return read-only views of shared memory. OpenVINO and torch refuse those as inputs, or
    warn. The view avoids a copy of each image.

    Raises:
        ValueError: The array is not contiguous, or not uint8.
    """
    if not array.flags.c_contiguous or array.dtype != np.uint8:
        raise ValueError(f"got {array.dtype} {array.shape} {array.strides}, expected contiguous u8")
    return np.asarray(_WritableMemory(array))
