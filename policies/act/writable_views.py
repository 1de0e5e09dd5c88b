"""Arrays handed to libraries that insist on writable ones although they only read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class _Memory:
    """Says to numpy that the memory of an array is writable. Holds the array."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.array = array
        self.__array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": "|u1",
            "data": (array.ctypes.data, False),
        }


def nominally_writable(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A view of a C-contiguous uint8 array that claims to be writable; it must only be read.

    Sessions hand out read-only views of shared memory. OpenVINO and torch refuse those as inputs,
    or warn; a copy of each picture, only to please them, is what this saves.

    Raises:
        ValueError: The array is not contiguous.
    """
    if not array.flags.c_contiguous or array.dtype != np.uint8:
        raise ValueError(f"got {array.dtype} {array.shape} {array.strides}, expected contiguous u8")
    return np.asarray(_Memory(array))
