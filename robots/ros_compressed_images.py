"""Decodes ``sensor_msgs/CompressedImage``: image_transport's ``compressed`` and
``compressedDepth``.

The first bytes of the data decide between JPEG and PNG. ``format`` is text that differs between
publishers, and is used only for what the data do not contain. ``simplejpeg`` decodes JPEG, as
everywhere in this project, because it rejects a damaged image; OpenCV decodes PNG.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies import jpeg
from policies.errors import PolicyError
from robots.errors import ContractViolated
from robots.ros_images import BGR, DEPTHS, RGB, as_rgb, check_size, import_opencv

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
COLOURS = ("rgb8", "bgr8", "mono8")
GREYS = ("", "mono8", "8UC1")
"""Encodings that a one-channel image may have: one of a Bayer pattern has lost its colours."""
_HEADER = struct.Struct("<iff")
"""Header of a ``compressedDepth`` image: the method, and the quantization A and B of 32FC1."""


def decode_compressed_colour(
    message: Any, hw: tuple[int, int], encoding: str = ""
) -> NDArray[np.uint8]:
    """Decode a compressed colour image.

    Args:
        message: A ``sensor_msgs/CompressedImage``.
        hw: Configured (height, width).
        encoding: "rgb8": the colours of the file; "bgr8": red and blue exchanged (a publisher gave
            OpenCV the wrong order); "mono8": an image without colours. Empty: as the message's
            ``format`` has it.

    Returns:
        (H, W, 3) uint8 RGB, C-contiguous.

    Raises:
        ContractViolated: Wrong size, neither JPEG nor PNG, data that do not decode, more than 8
            bits, or the library that it needs is not installed.
    """
    format_text, data = message.format, bytes(message.data)
    if encoding not in ("", *COLOURS):
        raise ContractViolated(
            f"got encoding {encoding!r} for a compressed picture, expected one of {list(COLOURS)}"
        )
    if data.startswith(JPEG):
        image, order = _jpeg(data), RGB
    elif data.startswith(PNG):
        image, order = _png(data), BGR
    else:
        raise _unknown_format(format_text, data)
    check_size((image.shape[0], image.shape[1]), hw)
    if image.dtype != np.uint8:
        raise ContractViolated(f"got a PNG of {image.dtype} ({format_text!r}), expected uint8")
    source = encoding or _encoding(format_text)
    if image.shape[2] == 1 and source not in GREYS:
        raise ContractViolated(
            f"got a picture without colours for {format_text!r}, expected one with colours"
        )
    # image_transport's rule: without conversion, red and blue were exchanged before compression.
    exchanged = encoding == "bgr8" if encoding else "compressed rgb" in format_text
    if exchanged:
        order = RGB if order == BGR else BGR
    return as_rgb(image, order)


def decode_compressed_depth(message: Any) -> NDArray[np.uint16] | NDArray[np.float32]:
    """Decode a compressed depth image of any size.

    Args:
        message: A ``sensor_msgs/CompressedImage``.

    Returns:
        (H, W) uint16 millimetres, 0 without depth, or float32 metres, NaN without depth.

    Raises:
        ContractViolated: Not a PNG of 16 bits, which both transports use, or an encoding that is
            not in ``DEPTHS``.
    """
    format_text, data = message.format, bytes(message.data)
    encoding = _encoding(format_text)
    if encoding not in ("", *DEPTHS):
        raise ContractViolated(
            f"got format {format_text!r}, expected one of {list(DEPTHS)} before the ;"
        )
    header = b""
    if "compressedDepth" in format_text or data[_HEADER.size :].startswith(PNG):
        header, data = data[: _HEADER.size], data[_HEADER.size :]
    if not data.startswith(PNG):
        raise _unknown_format(format_text, data, "PNG, the only one here that has 16 bits")
    image = _png(data)
    if image.dtype != np.uint16 or image.shape[2] != 1:
        raise ContractViolated(
            f"got a PNG of {image.dtype} {image.shape} ({format_text!r}), expected uint16 (H, W, 1)"
        )
    depth: NDArray[np.uint16] = image[..., 0]
    return depth if encoding != "32FC1" else _metres(depth, header, format_text)


def _encoding(format_text: str) -> str:
    """The encoding before compression, according to ``format``; empty if it does not name one."""
    return format_text.partition(";")[0].strip() if ";" in format_text else ""


def _metres(depth: NDArray[np.uint16], header: bytes, format_text: str) -> NDArray[np.float32]:
    """Depth from quantized inverse depth: A / (value − B); NaN where the value is 0."""
    a, b = _HEADER.unpack(header)[1:] if header else (0.0, 0.0)
    if not (0.0 < a < np.inf and -np.inf < b < 1.0):
        raise ContractViolated(
            f"got A {a:g} and B {b:g} for {format_text!r}, expected A > 0 and B < 1"
        )
    value = np.where(depth == 0, np.float32(np.nan), depth.astype(np.float32))
    metres: NDArray[np.float32] = np.float32(a) / (value - np.float32(b))
    return metres


def _jpeg(data: bytes) -> NDArray[np.uint8]:
    """Decode a JPEG: (H, W, 1), or (H, W, 3) RGB."""
    try:
        codec = jpeg.codec()
        grey = codec.decode_jpeg_header(data)[2].lower() == "gray"
        image: NDArray[np.uint8] = codec.decode_jpeg(
            data, colorspace="GRAY" if grey else "RGB", strict=True
        )
    except ValueError as error:
        raise ContractViolated(f"got a JPEG that does not decode ({error})") from error
    except PolicyError as error:
        raise ContractViolated(f"got a JPEG: {error}") from error
    return image


def _png(data: bytes) -> NDArray[Any]:
    """Decode a PNG: (H, W, 1), (H, W, 3) BGR or (H, W, 4) BGRA, uint8 or uint16."""
    cv2 = import_opencv("a PNG")
    image: NDArray[Any] | None
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise ContractViolated(f"got a PNG of {len(data)} bytes that does not decode")
    return image.reshape(*image.shape[:2], -1)


def _unknown_format(
    format_text: str, data: bytes, expected: str = "JPEG or PNG"
) -> ContractViolated:
    return ContractViolated(
        f"got format {format_text!r}, {len(data)} bytes that begin with "
        f"{data[:4].hex(' ') or 'none'}, expected {expected}"
    )
