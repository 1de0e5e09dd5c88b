"""A camera's picture to the size the network sees: crop, then resize.

Client and server both may do this, so the result must be the same bytes on every machine: weights
are whole multiples of 2**-11, and all arithmetic is that of integers.
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
_ONE = 2**_BITS


def prepare(
    image: NDArray[np.uint8], camera: CameraContract, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """``image`` as the network sees it.

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
    """Raises ``ContractMismatch`` unless ``image`` is one that ``camera`` may deliver."""
    field = f"images.{camera.name}"
    sizes = " or ".join(f"({h}, {w}, 3)" for h, w in camera.accepted_hw)
    if not isinstance(image, np.ndarray):
        raise ContractMismatch(field, type(image).__name__, f"a uint8 array {sizes}")
    if image.dtype != np.uint8:
        raise ContractMismatch(field, f"dtype {image.dtype}", f"uint8 {sizes}")
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[:2] not in camera.accepted_hw:
        raise ContractMismatch(field, f"shape {image.shape}", sizes)


def is_source(image: NDArray[np.uint8], camera: CameraContract) -> bool:
    """Whether ``image`` still has to be cropped: of the two sizes, the source's wins a tie."""
    return image.shape[:2] == tuple(camera.source_hw)


def warm_up(cameras: Iterable[CameraContract]) -> None:
    """Work out now what ``prepare`` needs for these cameras, machine code included, so that no
    request waits for it.
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
    # A crop's rows have gaps between them; the copy costs a tenth of what follows.
    _resizer()(np.ascontiguousarray(image), *rows, *columns, target)
    if target is not out:
        np.copyto(out, target)


class Taps(NamedTuple):
    """Which source pixels make a target pixel along one side.

    Attributes:
        first: (target,) int32, the first of them.
        weights: (target, K) int32 of that one and its neighbours, 0 to ``_ONE``, which is their
            sum.
    """

    first: NDArray[np.int32]
    weights: NDArray[np.int32]


@lru_cache(maxsize=64)
def _taps(source: int, target: int, method: str) -> Taps:
    """``_weights`` without the zeros around them."""
    dense = _weights(source, target, method)
    used = dense != 0
    first = used.argmax(axis=1)
    count = int((source - used[:, ::-1].argmax(axis=1) - first).max())
    # Near the end there are fewer neighbours; their zeros then lie in front.
    first = np.minimum(first, source - count)
    weights = np.take_along_axis(dense, first[:, None] + np.arange(count), axis=1)
    taps = Taps(first.astype(np.int32), weights.astype(np.int32))
    for array in taps:
        array.flags.writeable = False
    return taps


def _weights(source: int, target: int, method: str) -> NDArray[np.float64]:
    """(target, source) whole weights, none negative, whose rows sum to ``_ONE``.

    "bilinear": two taps at pixel centres ((i + 1/2) * source / target - 1/2), no antialiasing.
    "area": the part of each source pixel that the target pixel covers.
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
    # Rounding must not change a flat picture: the largest tap takes what is missing.
    whole[np.arange(target), whole.argmax(axis=1)] += _ONE - whole.sum(axis=1)
    # From 64 pixels to one on, that can be more than the largest has: share it among them all.
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
    """``image`` (H, W, 3) to ``out`` (h, w, 3), row by row: down the columns, then along the row.

    255 * 2**22, the largest sum, fits in 31 bits. Indices are unsigned because numba would look at
    each signed one whether it counts from the end, which is most of the time that this takes.
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
            red = green = blue = half  # a half more, cut off: halves round up
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
    """``_resize_impl``, compiled."""
    from numba import types

    from transport.jit import compiled

    picture = types.Array(types.uint8, 3, "C", readonly=True)
    firsts = types.Array(types.int32, 1, "C", readonly=True)
    weights = types.Array(types.int32, 2, "C", readonly=True)
    given = (picture, firsts, weights, firsts, weights, types.uint8[:, :, ::1])
    return compiled(types.void(*given), nogil=True)(_resize_impl)
