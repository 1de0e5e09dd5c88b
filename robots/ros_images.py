"""Pictures out of ``sensor_msgs/Image``, without cv_bridge."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from robots.errors import ContractViolated

COLOURS = ("rgb8", "bgr8")
DEPTHS: dict[str, type[np.generic]] = {
    "16UC1": np.uint16,
    "mono16": np.uint16,
    "32FC1": np.float32,
}
"""Encoding to dtype: millimetres, millimetres, metres."""


def decode_colour(message: Any, hw: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB, C-contiguous; may be a read-only view of the message.

    Args:
        message: A ``sensor_msgs/Image``.
        hw: What the configuration says.

    Raises:
        ContractViolated: Another size or encoding, or data that do not fit them.
    """
    if message.encoding not in COLOURS:
        raise ContractViolated(
            f"got encoding {message.encoding!r}, expected one of {list(COLOURS)}"
        )
    if (message.height, message.width) != hw:
        raise ContractViolated(
            f"got (height, width) {(message.height, message.width)}, expected {hw}, as configured"
        )
    picture = _rows(message, np.dtype(np.uint8), 3).reshape(*hw, 3)
    return np.ascontiguousarray(picture if message.encoding == "rgb8" else picture[..., ::-1])


def decode_depth(message: Any) -> NDArray[np.uint16] | NDArray[np.float32]:
    """(H, W) uint16 millimetres or float32 metres, of any size; may be a read-only view.

    Raises:
        ContractViolated: Another encoding, or data that do not fit it.
    """
    if message.encoding not in DEPTHS:
        raise ContractViolated(f"got encoding {message.encoding!r}, expected one of {list(DEPTHS)}")
    kind = np.dtype(DEPTHS[message.encoding])
    swapped = kind.newbyteorder(">" if message.is_bigendian else "<")
    return np.ascontiguousarray(_rows(message, swapped, 1).astype(kind, copy=False))


def _rows(message: Any, kind: np.dtype[Any], channels: int) -> NDArray[Any]:
    """(H, W · channels) of the message's data; a row may be padded."""
    height, width, step = message.height, message.width, message.step
    needed = width * channels * kind.itemsize
    if height < 1 or width < 1 or step < needed or len(message.data) != step * height:
        raise ContractViolated(
            f"got {len(message.data)} bytes in rows of {step} for {height} x {width} "
            f"{message.encoding}, expected {height} rows of at least {needed}"
        )
    rows = np.frombuffer(message.data, np.uint8).reshape(height, step)[:, :needed]
    return np.ascontiguousarray(rows).view(kind)
