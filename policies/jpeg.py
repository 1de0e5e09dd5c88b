"""Pictures as JPEG, for links that are too slow for pixels.

The codec is libjpeg-turbo through ``simplejpeg``, an optional dependency. What comes from a peer is
held against what was declared *before* it is decoded: the size, so that no header makes the decoder
allocate or compute more than a picture of the session, and one baseline scan, because a progressive
file of a few kilobytes can ask for thousands of passes over the picture.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.errors import ObservationError, PolicyError

QUALITIES = range(1, 101)
_SOI, _SOS, _EOI = 0xD8, 0xDA, 0xD9
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_SEQUENTIAL = (0xC0, 0xC1)
"""Start-of-frame markers, and those of a picture that is decoded in one pass (ITU-T T.81, B.1)."""
_BLOCK = 16
"""Pixels of a side of what is coded together with chroma of half the width and height."""
_HEADER_BYTES = 2048


class QualityError(ValueError):
    """A quality that JPEG does not have."""


class JpegMissing(PolicyError):
    """JPEG was asked for where ``simplejpeg`` is not installed."""


def codec() -> Any:
    """``simplejpeg``.

    Raises:
        JpegMissing: It is not installed; says how to.
    """
    try:
        import simplejpeg
    except ImportError as error:
        raise JpegMissing(
            "pictures as JPEG need simplejpeg, which is not installed: pip install simplejpeg"
        ) from error
    return simplejpeg


def max_bytes(hw: tuple[int, int]) -> int:
    """The longest that a picture of this size can become (libjpeg-turbo's tjBufSize, 4:2:0)."""
    height, width = (-(-side // _BLOCK) * _BLOCK for side in hw)
    return height * width * 3 + _HEADER_BYTES


def encode(image: NDArray[np.uint8], quality: int) -> bytes:
    """(H, W, 3) uint8 RGB as baseline JPEG with chroma of half the resolution (4:2:0)."""
    data: bytes = codec().encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return data


def decode(data: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Decode ``data`` (N,) uint8 into ``out`` (H, W, 3) uint8 RGB, which declares the size.

    Raises:
        ObservationError: Not one baseline JPEG of exactly that size; nothing was decoded then. Or
            it is one and is truncated or corrupt; ``out`` is undefined then.
        JpegMissing: As ``codec``.
    """
    raw = data.tobytes()  # a copy: what is checked must be what is decoded
    _check(raw, out.shape)
    try:
        codec().decode_jpeg(raw, colorspace="RGB", buffer=out, strict=True)
    except ValueError as error:
        raise ObservationError(f"JPEG: got one that does not decode ({error})") from error


def _check(data: bytes, shape: tuple[int, ...]) -> None:
    """Raises ``ObservationError`` unless the header is of one scan of a picture of ``shape``."""
    if data[:2] != bytes((0xFF, _SOI)):
        raise ObservationError(f"JPEG: got {data[:4]!r}..., expected a JPEG")
    at, found = 2, False
    while True:
        marker, segment, at = _segment(data, at)
        if marker in _FRAMES:
            if marker not in _SEQUENTIAL or found:
                raise ObservationError("JPEG: got a progressive or odd one, expected baseline")
            try:
                precision, height, width, components = struct.unpack_from(">BHHB", segment)
            except struct.error as error:
                raise ObservationError("JPEG: got a cut header") from error
            if (height, width, components) != tuple(shape) or precision != 8:
                raise ObservationError(
                    f"JPEG: got {precision} bit {(height, width, components)}, expected 8 bit "
                    f"{tuple(shape)}"
                )
            found = True
        elif marker == _SOS:
            if not found or segment[:1] != bytes((shape[2],)):
                raise ObservationError("JPEG: got several scans, expected one of all colours")
            return


def _segment(data: bytes, at: int) -> tuple[int, bytes, int]:
    """Marker and content of the segment at ``at``, and where the next begins."""
    while data[at : at + 2] == b"\xff\xff":  # fill bytes
        at += 1
    if len(data) < at + 4 or data[at] != 0xFF:
        raise ObservationError("JPEG: got a cut header")
    marker, length = struct.unpack_from(">xBH", data, at)
    end = at + 2 + length
    if marker in (0, _EOI) or length < 2 or end > len(data):
        raise ObservationError("JPEG: got a cut header")
    return marker, data[at + 4 : end], end
