"""Decodes ``sensor_msgs/Image`` without cv_bridge.

numpy reorders channels. OpenCV converts 4:2:2 and Bayer encodings, as in cv_bridge, so that a
policy sees the same bytes as in recordings made through cv_bridge. OpenCV is large and is imported
only when an image needs it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robots.errors import ContractViolated

RGB, BGR = slice(0, 3), slice(2, None, -1)
CHANNELS: dict[str, tuple[int, slice]] = {
    "rgb8": (3, RGB),
    "bgr8": (3, BGR),
    "rgba8": (4, RGB),
    "bgra8": (4, BGR),
    "mono8": (1, RGB),
    "8UC1": (1, RGB),
    "8UC3": (3, BGR),
    "8UC4": (4, BGR),
}
"""Encoding to bytes per pixel, and the slice of those bytes that is red, green, blue."""
_UNNAMED = ("8UC3", "8UC4")
SUBSAMPLED = {
    **dict.fromkeys(("yuv422_yuy2", "yuyv", "YUYV"), "COLOR_YUV2RGB_YUY2"),
    **dict.fromkeys(("yuv422", "uyvy", "UYVY"), "COLOR_YUV2RGB_UYVY"),
}
"""4:2:2 encoding to OpenCV's conversion: two bytes per pixel, one colour per two pixels of a row;
ITU-R BT.601, luma 16 to 235."""
BAYER = {
    f"bayer_{pattern}8": f"COLOR_Bayer{pattern.upper()}2RGB"
    for pattern in ("rggb", "bggr", "gbrg", "grbg")
}
PIXEL_BYTES = {
    **{encoding: channels for encoding, (channels, _) in CHANNELS.items()},
    **dict.fromkeys(SUBSAMPLED, 2),
    **dict.fromkeys(BAYER, 1),
}
COLOURS = tuple(PIXEL_BYTES)
DEPTHS: dict[str, type[np.generic]] = {
    "16UC1": np.uint16,
    "mono16": np.uint16,
    "32FC1": np.float32,
}
"""Encoding of depth to dtype; the units are millimetres, millimetres, metres."""
_MESSAGE_BYTES = {
    **PIXEL_BYTES,
    **{encoding: np.dtype(kind).itemsize for encoding, kind in DEPTHS.items()},
}
"""Bytes per pixel of each encoding that a message may name."""
_BAYER_SIDE = 3
"""Smallest height and width, pixels: OpenCV turns a smaller Bayer image black."""
_PACKAGE, _RAW, _COMPRESSED = "sensor_msgs", "Image", "CompressedImage"
_TRANSPORTS = ("compressed", "compressedDepth")
"""Names of image_transport's plug-ins, which are the last parts of their topics."""


def decode_colour(message: Any, hw: tuple[int, int], encoding: str = "") -> NDArray[np.uint8]:
    """Decode a colour image.

    Args:
        message: A ``sensor_msgs/Image``.
        hw: Configured (height, width).
        encoding: One of ``COLOURS``, used instead of the message's encoding; it must have as many
            bytes per pixel. Empty: the message's encoding is used. If the message's encoding is
            unknown, rows of twice the bytes or more are rejected.

    Returns:
        (H, W, 3) uint8 RGB, C-contiguous; may be a read-only view of the message.

    Raises:
        ContractViolated: Wrong size, unknown encoding, data that do not fit them, or OpenCV is
            needed and not installed.
    """
    configured, encoding = bool(encoding), encoding or message.encoding
    if encoding not in COLOURS:
        raise ContractViolated(f"got encoding {encoding!r}, expected one of {list(COLOURS)}")
    message_bytes, used_bytes = _MESSAGE_BYTES.get(message.encoding), PIXEL_BYTES[encoding]
    if message_bytes not in (None, used_bytes):
        # The rest of each row would be taken for padding.
        raise ContractViolated(
            f"got encoding {message.encoding!r}, {message_bytes} bytes per pixel, expected "
            f"{used_bytes}, for the configured {encoding!r}"
        )
    check_size((message.height, message.width), hw)
    if configured and message_bytes is None and message.step >= 2 * message.width * used_bytes:
        # 16 bits per channel, e.g. rgb16, would be taken for 8 bits and as much padding.
        raise ContractViolated(
            f"got encoding {message.encoding!r} in rows of {message.step} bytes, expected less "
            f"than {2 * message.width * used_bytes} for the configured {encoding!r}, {used_bytes} "
            "bytes per pixel"
        )
    if encoding not in CHANNELS:
        return _convert(message, hw, encoding)
    channels, order = CHANNELS[encoding]
    image = _rows(message, np.dtype(np.uint8), channels, encoding).reshape(*hw, channels)
    return as_rgb(image, order)


def decode_depth(message: Any) -> NDArray[np.uint16] | NDArray[np.float32]:
    """Decode a depth image of any size.

    Args:
        message: A ``sensor_msgs/Image``.

    Returns:
        (H, W) uint16 millimetres or float32 metres; may be a read-only view of the message.

    Raises:
        ContractViolated: An encoding that is not in ``DEPTHS``, or data that do not fit it.
    """
    if message.encoding not in DEPTHS:
        raise ContractViolated(f"got encoding {message.encoding!r}, expected one of {list(DEPTHS)}")
    kind = np.dtype(DEPTHS[message.encoding])
    swapped = kind.newbyteorder(">" if message.is_bigendian else "<")
    rows = _rows(message, swapped, 1, message.encoding)
    return np.ascontiguousarray(rows.astype(kind, copy=False))


def message_type(topic: str, published: str | None) -> str:
    """``Image`` or ``CompressedImage``: the type that is published, else the type by ``topic``.

    Args:
        topic: Name of the topic.
        published: The type known to the master, ``package/Name``; None without a publisher.

    Raises:
        ContractViolated: Another type is published.
    """
    if published is None:
        return _COMPRESSED if topic.rpartition("/")[2] in _TRANSPORTS else _RAW
    package, _, name = published.partition("/")
    if package != _PACKAGE or name not in (_RAW, _COMPRESSED):
        raise ContractViolated(
            f"{topic}: got messages of type {published}, expected {_PACKAGE}/{_RAW} or "
            f"{_PACKAGE}/{_COMPRESSED}"
        )
    return name


def assumption(message: Any) -> str:
    """The assumption that ``decode_colour`` makes about ``message``, as text; empty if none."""
    if message.encoding not in _UNNAMED:
        return ""
    # As rviz does: OpenCV's order.
    return f"encoding {message.encoding!r} does not name the colours: taken for blue, green, red"


def as_rgb(image: NDArray[np.uint8], order: slice) -> NDArray[np.uint8]:
    """(H, W, C) to (H, W, 3), C-contiguous: one channel repeated, or the slice ``order`` of C."""
    if image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    return np.ascontiguousarray(image[..., order])


def check_size(got: tuple[int, int], expected: tuple[int, int]) -> None:
    """Raises ``ContractViolated`` if the (height, width) ``got`` is not ``expected``."""
    if got != expected:
        raise ContractViolated(f"got (height, width) {got}, expected {expected}, as configured")


@functools.cache
def import_opencv(what: str) -> Any:
    """The module ``cv2``.

    Args:
        what: The data that need it, for the error.

    Raises:
        ContractViolated: It is not installed; says how to install it.
    """
    try:
        cv2 = importlib.import_module("cv2")
    # Debian's package is built for Debian's numpy, and fails in many ways with another one.
    except (ImportError, AttributeError) as error:
        raise ContractViolated(
            f"got {what}, which needs OpenCV, not usable here ({error}): "
            "pip install opencv-python-headless"
        ) from error
    # An image takes 0.2 ms: OpenCV's threads would only disturb the control loop.
    cv2.setNumThreads(1)
    return cv2


def _convert(message: Any, hw: tuple[int, int], encoding: str) -> NDArray[np.uint8]:
    """Decode by OpenCV, (H, W, 3)."""
    height, width = hw
    if encoding in SUBSAMPLED and width % 2:
        raise ContractViolated(
            f"got width {width} of {encoding}, expected an even one: two pixels have one colour"
        )
    if encoding in BAYER and min(hw) < _BAYER_SIDE:
        raise ContractViolated(
            f"got (height, width) {hw} of {encoding}, expected {_BAYER_SIDE} or more of each"
        )
    channels = PIXEL_BYTES[encoding]
    rows = _rows(message, np.dtype(np.uint8), channels, encoding).reshape(height, width, channels)
    code = {**SUBSAMPLED, **BAYER}[encoding]
    cv2 = import_opencv(f"encoding {encoding!r}")
    image: NDArray[np.uint8] = cv2.cvtColor(rows, getattr(cv2, code))
    return image


def _rows(message: Any, kind: np.dtype[Any], channels: int, encoding: str) -> NDArray[Any]:
    """The message's data as (H, W · channels), without the padding of its rows."""
    height, width, step = message.height, message.width, message.step
    needed = width * channels * kind.itemsize
    if height < 1 or width < 1 or step < needed or len(message.data) != step * height:
        raise ContractViolated(
            f"got {len(message.data)} bytes in rows of {step} for {height} x {width} "
            f"{encoding}, expected {height} rows of at least {needed}"
        )
    rows = np.frombuffer(message.data, np.uint8).reshape(height, step)[:, :needed]
    return np.ascontiguousarray(rows).view(kind)
