"""Where a foreign observation has a policy's inputs: the keys of cameras and of the state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from policies.number_ranges import Choice, Range

LAYOUTS = ("auto", "hwc", "chw")
"""Order of an image's axes; "auto": told by its shape."""
STATE_INDEX = Range(0, 10_000)


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where a camera's image is in a foreign observation.

    Attributes:
        key: Its key; ``/`` separates the keys of nested maps.
        layout: One of ``LAYOUTS``.
    """

    key: str
    layout: Annotated[str, Choice(LAYOUTS)] = "auto"


@dataclass(frozen=True, slots=True)
class StateSource:
    """A slice of a foreign observation that is a part of the state.

    Attributes:
        key: The array's key; ``/`` separates the keys of nested maps.
        start, stop: The slice of the flattened array; the whole array by default.

    Raises:
        ValueError: ``stop`` is not above ``start``.
    """

    key: str
    start: Annotated[int, STATE_INDEX] = 0
    stop: Annotated[int | None, STATE_INDEX] = None

    def __post_init__(self) -> None:
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"stop: got {self.stop}, expected more than start {self.start}")


@dataclass(frozen=True, slots=True)
class ObservationKeys:
    """The keys of ``configs/gateway/*.yaml``: where a foreign observation has the policy's inputs.

    What is left out is found by the protocol's own names.

    Attributes:
        cameras: By the contract's camera name.
        state: The parts of the state, in the contract's order.
    """

    cameras: Mapping[str, ImageSource] = field(default_factory=dict)
    state: tuple[StateSource, ...] = ()


def bare_key(modality: str, key: str) -> str:
    """Return GR00T's ``key`` without its modality: "front" of "video.front" and "video/front"."""
    return key.removeprefix(f"{modality}.").removeprefix(f"{modality}/")
