"""Pictures out of ``sensor_msgs/CompressedImage``: image_transport's ``compressed`` and
``compressedDepth``.

What a picture is says its data's first bytes; ``format`` is text that publishers write as they
like, and is asked only for what the data cannot say. JPEG is decoded by ``simplejpeg``, as
everywhere here, because it takes no damaged picture for a whole one; PNG by OpenCV.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies import jpeg
from policies.errors import PolicyError
from robots.errors import ContractViolated
from robots.ros_images import BGR, DEPTHS, RGB, as_rgb, check_size, opencv

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
COLOURS = ("rgb8", "bgr8", "mono8")
GREYS = ("", "mono8", "8UC1")
"""Encodings of which a picture without colours is the whole: a Bayer pattern's is not."""
_HEADER = struct.Struct("<iff")
"""Before a ``compressedDepth`` picture: a code of the method, and A and B of what 32FC1 became."""


def decode_compressed_colour(
    message: Any, hw: tuple[int, int], encoding: str = ""
) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB, C-contiguous.

    Args:
        message: A ``sensor_msgs/CompressedImage``.
        hw: What the configuration says.
        encoding: "rgb8" for the colours that the file says, "bgr8" for red and blue exchanged (by
            a publisher that gave OpenCV the wrong order), "mono8" for one without; by the message's
            ``format`` where empty.

    Raises:
        ContractViolated: Another size, neither JPEG nor PNG, one that does not decode, more than
            8 bits, or the library that it needs is not installed.
    """
    said, data = message.format, bytes(message.data)
    if encoding not in ("", *COLOURS):
        raise ContractViolated(
            f"got encoding {encoding!r} for a compressed picture, expected one of {list(COLOURS)}"
        )
    if data.startswith(JPEG):
        picture, order = _jpeg(data), RGB
    elif data.startswith(PNG):
        picture, order = _png(data), BGR
    else:
        raise _unknown(said, data)
    check_size((picture.shape[0], picture.shape[1]), hw)
    if picture.dtype != np.uint8:
        raise ContractViolated(f"got a PNG of {picture.dtype} ({said!r}), expected uint8")
    source = encoding or _encoding(said)
    if picture.shape[2] == 1 and source not in GREYS:
        raise ContractViolated(f"got a picture without colours for {said!r}, expected one with")
    # image_transport's rule: without conversion, red and blue changed places before compression.
    exchanged = encoding == "bgr8" if encoding else "compressed rgb" in said
    if exchanged:
        order = RGB if order == BGR else BGR
    return as_rgb(picture, order)


def decode_compressed_depth(message: Any) -> NDArray[np.uint16] | NDArray[np.float32]:
    """(H, W) uint16 millimetres or float32 metres (NaN where there is none), of any size.

    Raises:
        ContractViolated: Not a PNG of 16 bits, as both transports make it, or another encoding.
    """
    said, data = message.format, bytes(message.data)
    encoding = _encoding(said)
    if encoding not in ("", *DEPTHS):
        raise ContractViolated(f"got format {said!r}, expected one of {list(DEPTHS)} before the ;")
    header = b""
    if "compressedDepth" in said or data[_HEADER.size :].startswith(PNG):
        header, data = data[: _HEADER.size], data[_HEADER.size :]
    if not data.startswith(PNG):
        raise _unknown(said, data, "PNG, the only one here that has 16 bits")
    picture = _png(data)
    if picture.dtype != np.uint16 or picture.shape[2] != 1:
        raise ContractViolated(
            f"got a PNG of {picture.dtype} {picture.shape} ({said!r}), expected uint16 (H, W, 1)"
        )
    depth: NDArray[np.uint16] = picture[..., 0]
    return depth if encoding != "32FC1" else _metres(depth, header, said)


def _encoding(said: str) -> str:
    """That of the picture before it was compressed; empty where ``format`` does not tell."""
    return said.partition(";")[0].strip() if ";" in said else ""


def _metres(depth: NDArray[np.uint16], header: bytes, said: str) -> NDArray[np.float32]:
    """Of inverse depth: A / (value − B), 0 for none."""
    a, b = _HEADER.unpack(header)[1:] if header else (0.0, 0.0)
    if not (0.0 < a < np.inf and -np.inf < b < 1.0):
        raise ContractViolated(f"got A {a:g} and B {b:g} for {said!r}, expected A > 0 and B < 1")
    value = np.where(depth == 0, np.float32(np.nan), depth.astype(np.float32))
    metres: NDArray[np.float32] = np.float32(a) / (value - np.float32(b))
    return metres


def _jpeg(data: bytes) -> NDArray[np.uint8]:
    """(H, W, 1) or (H, W, 3) RGB."""
    try:
        codec = jpeg.codec()
        grey = codec.decode_jpeg_header(data)[2].lower() == "gray"
        picture: NDArray[np.uint8] = codec.decode_jpeg(
            data, colorspace="GRAY" if grey else "RGB", strict=True
        )
    except ValueError as error:
        raise ContractViolated(f"got a JPEG that does not decode ({error})") from error
    except PolicyError as error:
        raise ContractViolated(f"got a JPEG: {error}") from error
    return picture


def _png(data: bytes) -> NDArray[Any]:
    """(H, W, 1), (H, W, 3) BGR or (H, W, 4) BGRA, uint8 or uint16."""
    cv2 = opencv("a PNG")
    picture: NDArray[Any] | None
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        picture = None
    if picture is None:
        raise ContractViolated(f"got a PNG of {len(data)} bytes that does not decode")
    return picture.reshape(*picture.shape[:2], -1)


def _unknown(said: str, data: bytes, expected: str = "JPEG or PNG") -> ContractViolated:
    return ContractViolated(
        f"got format {said!r}, {len(data)} bytes that begin with {data[:4].hex(' ') or 'none'}, "
        f"expected {expected}"
    )
