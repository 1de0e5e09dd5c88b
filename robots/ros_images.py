"""Pictures out of ``sensor_msgs/Image``, without cv_bridge.

Channels are put in order by numpy. What takes a formula, 4:2:2 and Bayer, is OpenCV's, which
cv_bridge uses too: a policy sees the very bytes of recordings that were made through it. OpenCV is
large, and imported when such a picture comes.
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
"""Encoding to its bytes per pixel, and where red, green and blue are among them."""
_UNNAMED = ("8UC3", "8UC4")
SUBSAMPLED = {
    **dict.fromkeys(("yuv422_yuy2", "yuyv", "YUYV"), "COLOR_YUV2RGB_YUY2"),
    **dict.fromkeys(("yuv422", "uyvy", "UYVY"), "COLOR_YUV2RGB_UYVY"),
}
"""4:2:2: two bytes per pixel, and one colour for every two pixels of a row; ITU-R BT.601, 16 to
235."""
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
"""Encoding to dtype: millimetres, millimetres, metres."""
_GIVEN_BYTES = {
    **PIXEL_BYTES,
    **{encoding: np.dtype(kind).itemsize for encoding, kind in DEPTHS.items()},
}
"""Bytes per pixel of what a message may say."""
_BAYER_SIDE = 3
"""Pixels; OpenCV makes anything smaller black."""
_PACKAGE, _RAW, _COMPRESSED = "sensor_msgs", "Image", "CompressedImage"
_TRANSPORTS = ("compressed", "compressedDepth")
"""Of image_transport, as the topics' last parts."""


def decode_colour(message: Any, hw: tuple[int, int], encoding: str = "") -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB, C-contiguous; may be a read-only view of the message.

    Args:
        message: A ``sensor_msgs/Image``.
        hw: What the configuration says.
        encoding: One of ``COLOURS`` in place of what the message says, with as many bytes per
            pixel; the message's where empty. Where the message's own is not known, rows of twice
            the bytes or more are refused.

    Raises:
        ContractViolated: Another size or encoding, data that do not fit them, or no OpenCV here
            for an encoding that needs it.
    """
    configured, encoding = bool(encoding), encoding or message.encoding
    if encoding not in COLOURS:
        raise ContractViolated(f"got encoding {encoding!r}, expected one of {list(COLOURS)}")
    given, taken = _GIVEN_BYTES.get(message.encoding), PIXEL_BYTES[encoding]
    if given not in (None, taken):
        # The rest of each row would pass for padding.
        raise ContractViolated(
            f"got encoding {message.encoding!r}, {given} bytes per pixel, expected {taken}, for "
            f"the configured {encoding!r}"
        )
    check_size((message.height, message.width), hw)
    if configured and given is None and message.step >= 2 * message.width * taken:
        # 16 bits per channel, as of rgb16, would pass for 8 and as much padding.
        raise ContractViolated(
            f"got encoding {message.encoding!r} in rows of {message.step} bytes, expected less "
            f"than {2 * message.width * taken} for the configured {encoding!r}, {taken} bytes per "
            "pixel"
        )
    if encoding not in CHANNELS:
        return _convert(message, hw, encoding)
    channels, order = CHANNELS[encoding]
    picture = _rows(message, np.dtype(np.uint8), channels, encoding).reshape(*hw, channels)
    return as_rgb(picture, order)


def decode_depth(message: Any) -> NDArray[np.uint16] | NDArray[np.float32]:
    """(H, W) uint16 millimetres or float32 metres, of any size; may be a read-only view.

    Raises:
        ContractViolated: Another encoding, or data that do not fit it.
    """
    if message.encoding not in DEPTHS:
        raise ContractViolated(f"got encoding {message.encoding!r}, expected one of {list(DEPTHS)}")
    kind = np.dtype(DEPTHS[message.encoding])
    swapped = kind.newbyteorder(">" if message.is_bigendian else "<")
    rows = _rows(message, swapped, 1, message.encoding)
    return np.ascontiguousarray(rows.astype(kind, copy=False))


def message_type(topic: str, published: str | None) -> str:
    """``Image`` or ``CompressedImage``: what is published there, or what the name promises.

    Args:
        published: The type that the master knows, ``package/Name``; None before anyone publishes.

    Raises:
        ContractViolated: It is neither.
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
    """What ``decode_colour`` takes for granted of ``message``, in words; empty if nothing."""
    if message.encoding not in _UNNAMED:
        return ""
    # rviz does the same, since that is OpenCV's order.
    return f"encoding {message.encoding!r} does not name the colours: taken for blue, green, red"


def as_rgb(picture: NDArray[np.uint8], order: slice) -> NDArray[np.uint8]:
    """(H, W, C) to (H, W, 3), C-contiguous: grey three times, any other in ``order``."""
    if picture.shape[2] == 1:
        return np.repeat(picture, 3, axis=2)
    return np.ascontiguousarray(picture[..., order])


def check_size(got: tuple[int, int], expected: tuple[int, int]) -> None:
    """Raises ``ContractViolated`` unless both are the same (height, width)."""
    if got != expected:
        raise ContractViolated(f"got (height, width) {got}, expected {expected}, as configured")


@functools.cache
def opencv(what: str) -> Any:
    """``cv2``.

    Raises:
        ContractViolated: It is not installed, and ``what`` needs it; says how to.
    """
    try:
        cv2 = importlib.import_module("cv2")
    # Debian's own is for its own numpy, and fails in many ways with another.
    except (ImportError, AttributeError) as error:
        raise ContractViolated(
            f"got {what}, which needs OpenCV, not usable here ({error}): "
            "pip install opencv-python-headless"
        ) from error
    # A picture takes 0.2 ms: threads of its own would only get in the control loop's way.
    cv2.setNumThreads(1)
    return cv2


def _convert(message: Any, hw: tuple[int, int], encoding: str) -> NDArray[np.uint8]:
    """By OpenCV."""
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
    cv2 = opencv(f"encoding {encoding!r}")
    picture: NDArray[np.uint8] = cv2.cvtColor(rows, getattr(cv2, code))
    return picture


def _rows(message: Any, kind: np.dtype[Any], channels: int, encoding: str) -> NDArray[Any]:
    """(H, W · channels) of the message's data; a row may be padded."""
    height, width, step = message.height, message.width, message.step
    needed = width * channels * kind.itemsize
    if height < 1 or width < 1 or step < needed or len(message.data) != step * height:
        raise ContractViolated(
            f"got {len(message.data)} bytes in rows of {step} for {height} x {width} "
            f"{encoding}, expected {height} rows of at least {needed}"
        )
    rows = np.frombuffer(message.data, np.uint8).reshape(height, step)[:, :needed]
    return np.ascontiguousarray(rows).view(kind)
