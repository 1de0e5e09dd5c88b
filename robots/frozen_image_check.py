"""Detects a camera that keeps returning one image."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robots.errors import SensorLost

SAMPLED = 16
"""Every so many rows and columns are compared first: images that differ mostly differ there."""


class ReceivedImage(Protocol):
    """The attributes of a camera sample that are checked."""

    @property
    def image(self) -> NDArray[np.uint8]:
        """(H, W, 3)."""
        ...

    @property
    def received_ns(self) -> int:
        """This host's monotonic clock."""
        ...


@dataclass(slots=True)
class _LastImage:
    image: NDArray[np.uint8]
    received_ns: int
    changed_ns: int


class FrozenImageCheck:
    """Detects a frozen camera by its pixels.

    The noise of a real sensor never repeats exactly, so a repeated image means a frozen camera. An
    image of a single colour is the exception (a covered lens, or overexposure) and counts as new.

    Args:
        timeout_ns: How long a camera may return one image.
        repeats: Whether working cameras repeat images, as a simulator does; then only a camera
            from which nothing is received is lost.
    """

    def __init__(self, timeout_ns: int, *, repeats: bool) -> None:
        self._timeout_ns, self._repeats = timeout_ns, repeats
        self._last: dict[str, _LastImage] = {}

    def check(self, robot: str, cameras: Mapping[str, ReceivedImage]) -> None:
        """Compare the newest sample of every camera with the one before.

        Raises:
            SensorLost: A camera has returned the same image for too long; says which and how long.
        """
        now_ns = time.monotonic_ns()
        for name, sample in cameras.items():
            last = self._last.get(name)
            if last is None:
                self._last[name] = _LastImage(sample.image, sample.received_ns, sample.received_ns)
                continue
            received = sample.received_ns != last.received_ns
            if received and (self._repeats or not _frozen(sample.image, last.image)):
                last.changed_ns = sample.received_ns
            same_array = sample.image is last.image
            last.image, last.received_ns = sample.image, sample.received_ns
            quiet_ns = now_ns - last.changed_ns
            if quiet_ns > self._timeout_ns:
                problem = "the same picture" if received else "no new picture"
                if received and same_array:
                    problem += " in the same array: the driver has to return a new array each time;"
                raise SensorLost(
                    f"{robot}: camera {name}: {problem} for {quiet_ns / 1e9:.2f} s, expected "
                    f"another within {self._timeout_ns / 1e9:g} s"
                )


def _frozen(image: NDArray[Any], previous: NDArray[Any]) -> bool:
    """Whether two images are equal in every pixel, and not of a single colour."""
    sampled = image[::SAMPLED, ::SAMPLED]
    if not np.array_equal(sampled, previous[::SAMPLED, ::SAMPLED]):
        return False
    if not np.array_equal(image, previous):
        return False
    return bool((image != image[0, 0]).any())
