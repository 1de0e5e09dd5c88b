"""Crops and resizes a camera's image to the size of the network's input.

Client and server may both do this, so the result must have the same bytes on every machine.
Therefore the weights are integer multiples of 2**-11 and all arithmetic is integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from policies.errors import ContractMismatch
from policies.types import CameraContract

_BITS = 11
"""Bits of a weight's fraction."""
_ONE = 2**_BITS


def prepare(
    image: NDArray[np.uint8], camera: CameraContract, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Return ``image`` at the network's input size.

    Args:
        image: (H, W, 3) uint8 RGB of the camera's source size or of its model size; only read.
        camera: Crop and resize.
        out: (h, w, 3) uint8 of the model size to write into; allocated where not given.

    Raises:
        ContractMismatch: ``image`` has another shape or dtype (``images.<name>``).
    """
    check_image(image, camera)
    if out is None:
        out = np.empty((*camera.model_hw, 3), dtype=np.uint8)
    if image.shape[:2] == tuple(camera.model_hw) and not is_source(image, camera):
        np.copyto(out, image)
        return out
    if camera.crop is not None:
        top, left, height, width = camera.crop
        image = image[top : top + height, left : left + width]
    if image.shape == out.shape:
        np.copyto(out, image)
    else:
        _resize(image, camera.resize, out)
    return out


def check_image(image: NDArray[np.uint8], camera: CameraContract) -> None:
    """Raise ``ContractMismatch`` unless ``image`` has a dtype and size that ``camera`` accepts."""
    field = f"images.{camera.name}"
    sizes = " or ".join(f"({h}, {w}, 3)" for h, w in camera.accepted_hw)
    if not isinstance(image, np.ndarray):
        raise ContractMismatch(field, type(image).__name__, f"a uint8 array {sizes}")
    if image.dtype != np.uint8:
        raise ContractMismatch(field, f"dtype {image.dtype}", f"uint8 {sizes}")
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[:2] not in camera.accepted_hw:
        raise ContractMismatch(field, f"shape {image.shape}", sizes)


def is_source(image: NDArray[np.uint8], camera: CameraContract) -> bool:
    """Return whether ``image`` has the source size, and so is still to be cropped.

    Where source and model size are equal, the image counts as the source's.
    """
    return image.shape[:2] == tuple(camera.source_hw)


def warm_up(cameras: Iterable[CameraContract]) -> None:
    """Compute the weights and compile the code that ``prepare`` needs for these cameras.

    Without it the first request would wait for that.
    """
    for camera in cameras:
        source = camera.source_hw if camera.crop is None else camera.crop[2:]
        if tuple(source) != tuple(camera.model_hw):
            _resizer()
            for old, new in zip(source, camera.model_hw, strict=True):
                _taps(old, new, camera.resize)


def _resize(image: NDArray[np.uint8], method: str, out: NDArray[np.uint8]) -> None:
    rows = _taps(image.shape[0], out.shape[0], method)
    columns = _taps(image.shape[1], out.shape[1], method)
    target = out if out.flags.c_contiguous else np.empty(out.shape, np.uint8)
    # A crop is not contiguous. The copy costs a tenth of the resize.
    _resizer()(np.ascontiguousarray(image), *rows, *columns, target)
    if target is not out:
        np.copyto(out, target)


class Taps(NamedTuple):
    """Source pixels and weights of every target pixel along one side.

    Attributes:
        first: (target,) int32 index of the first source pixel.
        weights: (target, K) int32 weights of that pixel and its neighbours, 0 to ``_ONE``; each row
            sums to ``_ONE``.
    """

    first: NDArray[np.int32]
    weights: NDArray[np.int32]


@lru_cache(maxsize=64)
def _taps(source: int, target: int, method: str) -> Taps:
    """Return ``_weights`` without the zeros around them."""
    dense = _weights(source, target, method)
    used = dense != 0
    first = used.argmax(axis=1)
    count = int((source - used[:, ::-1].argmax(axis=1) - first).max())
    # Near the end there are fewer neighbours; the padding zeros then come first.
    first = np.minimum(first, source - count)
    weights = np.take_along_axis(dense, first[:, None] + np.arange(count), axis=1)
    taps = Taps(first.astype(np.int32), weights.astype(np.int32))
    for array in taps:
        array.flags.writeable = False
    return taps


def _weights(source: int, target: int, method: str) -> NDArray[np.float64]:
    """Return (target, source) integer weights, none negative, whose rows sum to ``_ONE``.

    "bilinear": two taps at pixel centres ((i + 1/2) * source / target - 1/2), no antialiasing.
    "area": the fraction of each source pixel that the target pixel covers.
    """
    weights = np.zeros((target, source))
    for i in range(target):
        if method == "bilinear":
            centre = min(max((i + 0.5) * source / target - 0.5, 0.0), source - 1.0)
            low = min(int(centre), source - 1)
            weights[i, low] = 1 - (centre - low)
            if low + 1 < source:
                weights[i, low + 1] = centre - low
        else:
            edges = np.arange(source + 1)
            start, stop = i * source / target, (i + 1) * source / target
            weights[i] = np.diff(np.clip(edges, start, stop)) / (stop - start)
    whole: NDArray[np.float64] = np.round(weights * _ONE)
    # Rounding must not change an image of one colour: the largest tap takes the rounding error.
    whole[np.arange(target), whole.argmax(axis=1)] += _ONE - whole.sum(axis=1)
    # From 64 pixels to one on, the error can exceed the largest tap: spread it over all taps.
    short = (whole < 0).any(axis=1)
    whole[short] = np.diff(np.round(weights[short].cumsum(axis=1) * _ONE), prepend=0.0)
    return whole


def _resize_impl(  # noqa: PLR0917 - numba takes arrays, not objects
    image: np.ndarray,
    first_rows: np.ndarray,
    row_weights: np.ndarray,
    first_columns: np.ndarray,
    column_weights: np.ndarray,
    out: np.ndarray,
) -> None:
    """Resize ``image`` (H, W, 3) into ``out`` (h, w, 3), row by row: first columns, then the row.

    The largest sum, 255 * 2**22, fits in 31 bits. Indices are unsigned because numba would test
    each signed index for a negative value, which would take most of the time.
    """
    one, two, three = np.uint32(1), np.uint32(2), np.uint32(3)
    half, shift = np.int32(1 << 2 * _BITS - 1), np.int32(2 * _BITS)
    line = np.empty(image.shape[1] * 3, np.int32)
    for y in range(out.shape[0]):
        line[:] = 0
        for tap in range(row_weights.shape[1]):
            weight, source = row_weights[y, tap], image[first_rows[y] + tap].reshape(-1)
            for j in range(line.size):
                line[j] += weight * np.int32(source[j])
        target = out[y].reshape(-1)
        for x in range(out.shape[1]):
            at, to = three * np.uint32(first_columns[x]), three * np.uint32(x)
            red = green = blue = half  # adding one half before the shift rounds halves up
            for tap in range(column_weights.shape[1]):
                weight = column_weights[x, tap]
                red += weight * line[at]
                green += weight * line[at + one]
                blue += weight * line[at + two]
                at += three
            target[to] = red >> shift
            target[to + one] = green >> shift
            target[to + two] = blue >> shift


@cache
def _resizer() -> Callable[..., Any]:
    """Return ``_resize_impl``, compiled."""
    from numba import types

    from transport.jit import compiled

    picture = types.Array(types.uint8, 3, "C", readonly=True)
    firsts = types.Array(types.int32, 1, "C", readonly=True)
    weights = types.Array(types.int32, 2, "C", readonly=True)
    given = (picture, firsts, weights, firsts, weights, types.uint8[:, :, ::1])
    return compiled(types.void(*given), nogil=True)(_resize_impl)
