"""Images as JPEG, for connections that are too slow for raw pixels.

The codec is libjpeg-turbo through ``simplejpeg``, an optional dependency. Data from a peer is
checked against the session's declaration *before* it is decoded. The size must match, so that no
header makes the decoder allocate or compute more than one image of the session. The file must have
one baseline scan, because a progressive file of a few kilobytes can request thousands of passes
over the image.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.errors import ObservationError, PolicyError

QUALITIES = range(1, 101)
"""Valid JPEG qualities."""
DEFAULT_QUALITY = 90
_SOI, _SOS, _EOI = 0xD8, 0xDA, 0xD9
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_SEQUENTIAL = (0xC0, 0xC1)
"""Start-of-frame markers, and those of an image that is decoded in one pass (ITU-T T.81, B.1)."""
_BLOCK = 16
"""Side in pixels of a coding block where chroma has half the width and height."""
_HEADER_BYTES = 2048
"""Allowance for a file's header."""


class JpegMissing(PolicyError):
    """JPEG was requested but ``simplejpeg`` is not installed."""


def codec() -> Any:
    """Import and return ``simplejpeg``.

    Raises:
        JpegMissing: It is not installed; the message says how to install it.
    """
    try:
        import simplejpeg
    except ImportError as error:
        raise JpegMissing(
            "pictures as JPEG need simplejpeg, which is not installed: pip install simplejpeg"
        ) from error
    return simplejpeg


def max_bytes(hw: tuple[int, int]) -> int:
    """Return the largest size of an encoded image of ``hw`` (libjpeg-turbo's tjBufSize, 4:2:0)."""
    height, width = (-(-side // _BLOCK) * _BLOCK for side in hw)
    return height * width * 3 + _HEADER_BYTES


def encode(image: NDArray[np.uint8], quality: int) -> bytes:
    """Encode (H, W, 3) uint8 RGB as baseline JPEG with chroma of half the resolution (4:2:0)."""
    data: bytes = codec().encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return data


def decode(data: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Decode ``data`` (N,) uint8 into ``out`` (H, W, 3) uint8 RGB, whose shape is the expected
    size.

    Raises:
        ObservationError: Not one baseline JPEG of exactly that size; ``out`` is unchanged then. Or
            the data is truncated or corrupt; ``out`` is undefined then.
        JpegMissing: As ``codec``.
    """
    raw = data.tobytes()  # a copy, so that the checked bytes are the decoded ones
    _check(raw, out.shape)
    try:
        codec().decode_jpeg(raw, colorspace="RGB", buffer=out, strict=True)
    except ValueError as error:
        raise ObservationError(f"JPEG: got one that does not decode ({error})") from error


def _check(data: bytes, shape: tuple[int, ...]) -> None:
    """Raise ``ObservationError`` unless the header is that of a one-scan image of ``shape``."""
    if data[:2] != bytes((0xFF, _SOI)):
        raise ObservationError(f"JPEG: got {data[:4]!r}..., expected a JPEG")
    at, found = 2, False
    while True:
        marker, segment, at = _segment(data, at)
        if marker in _FRAMES:
            if marker not in _SEQUENTIAL or found:
                raise ObservationError("JPEG: got a progressive or other mode, expected baseline")
            try:
                precision, height, width, components = struct.unpack_from(">BHHB", segment)
            except struct.error as error:
                raise ObservationError("JPEG: got a truncated header") from error
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
    """Return marker and content of the segment at ``at``, and the position of the next segment."""
    while data[at : at + 2] == b"\xff\xff":  # fill bytes
        at += 1
    if len(data) < at + 4 or data[at] != 0xFF:
        raise ObservationError("JPEG: got a truncated header")
    marker, length = struct.unpack_from(">xBH", data, at)
    end = at + 2 + length
    if marker in (0, _EOI) or length < 2 or end > len(data):
        raise ObservationError("JPEG: got a truncated header")
    return marker, data[at + 4 : end], end
