"""A camera's picture to the size the network sees: crop, then resize. numpy only.

Client and server both may do this, so the result must be the same bytes on every machine: weights
are multiples of 2**-11, all products and sums of which are exact in float64, in any order.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from policies.errors import ContractMismatch
from policies.types import CameraContract

_ONE = 2**11


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


def _resize(image: NDArray[np.uint8], method: str, out: NDArray[np.uint8]) -> None:
    height, width = out.shape[:2]
    rows = _weights(image.shape[0], height, method)
    columns = _weights(image.shape[1], width, method)
    tall = np.tensordot(rows, image.astype(np.float64), axes=(1, 0))
    both = np.tensordot(tall, columns, axes=(1, 1)).transpose(0, 2, 1)
    # Halves round up; exact, so a tie is a tie everywhere.
    np.copyto(out, np.floor(both / _ONE**2 + 0.5), casting="unsafe")


@lru_cache(maxsize=64)
def _weights(source: int, target: int, method: str) -> NDArray[np.float64]:
    """(target, source) integer weights whose rows sum to ``_ONE``.

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
    whole = np.round(weights * _ONE)
    # Rounding must not change a flat picture: the largest tap takes what is missing.
    whole[np.arange(target), whole.argmax(axis=1)] += _ONE - whole.sum(axis=1)
    whole.flags.writeable = False
    return whole
