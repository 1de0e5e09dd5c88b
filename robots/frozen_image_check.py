"""Whether a robot's cameras go on showing what is before them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robots.errors import SensorLost

SAMPLED = 16
"""Every so many pixels are compared first: pictures that differ mostly differ there."""


class Picture(Protocol):
    """What is watched of a camera's sample."""

    @property
    def image(self) -> NDArray[np.uint8]: ...
    @property
    def received_ns(self) -> int: ...


@dataclass(slots=True)
class _Shown:
    image: NDArray[np.uint8]
    received_ns: int
    changed_ns: int


class FrozenImageCheck:
    """Tells a camera that has frozen from one that works, by what it shows.

    The pixels of a real sensor never repeat exactly, its noise sees to that. A picture of one
    single colour is the exception (a covered lens, or far too much light), and is taken for new.

    Args:
        timeout_ns: How long a camera may show one picture.
        repeats: Whether working cameras repeat pictures, as a simulator does; then only a camera
            from which nothing is received is lost.
    """

    def __init__(self, timeout_ns: int, *, repeats: bool) -> None:
        self._timeout_ns, self._repeats = timeout_ns, repeats
        self._shown: dict[str, _Shown] = {}

    def check(self, robot: str, cameras: Mapping[str, Picture]) -> None:
        """Take note of the newest sample of every camera.

        Raises:
            SensorLost: One has shown the same picture for too long; says which and how long.
        """
        now_ns = time.monotonic_ns()
        for name, sample in cameras.items():
            shown = self._shown.get(name)
            if shown is None:
                self._shown[name] = _Shown(sample.image, sample.received_ns, sample.received_ns)
                continue
            came = sample.received_ns != shown.received_ns
            if came and (self._repeats or not _same(sample.image, shown.image)):
                shown.changed_ns = sample.received_ns
            shown_before = shown.image
            shown.image, shown.received_ns = sample.image, sample.received_ns
            quiet_ns = now_ns - shown.changed_ns
            if quiet_ns > self._timeout_ns:
                what = "the same picture" if came else "no new picture"
                if came and sample.image is shown_before:
                    what += " in the same array: the driver has to hand out new ones;"
                raise SensorLost(
                    f"{robot}: camera {name}: {what} for {quiet_ns / 1e9:.2f} s, expected another "
                    f"within {self._timeout_ns / 1e9:g} s"
                )


def _same(image: NDArray[Any], before: NDArray[Any]) -> bool:
    """Whether two pictures are equal in every pixel, and not of one colour."""
    few = image[::SAMPLED, ::SAMPLED]
    if not np.array_equal(few, before[::SAMPLED, ::SAMPLED]):
        return False
    if not np.array_equal(image, before):
        return False
    return bool((image != image[0, 0]).any())
