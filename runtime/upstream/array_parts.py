"""Slices of foreign arrays that are, one after the other, our state or our action."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.errors import InferenceError
from policies.yaml_config import InvalidConfig
from runtime.options.observation_keys import StateSource


@dataclass(frozen=True, slots=True)
class _Part:
    """``foreign[key][theirs]`` is ``own[ours]``."""

    key: str
    theirs: slice
    ours: slice


class ArrayParts:
    """The parts of one vector of ours.

    Args:
        field: Its name in the contract, for errors.
        sources: The parts, in our order. One of them may leave ``stop`` open: it gets the rest.
        width: Our length.

    Attributes:
        lengths: The length that is known of each foreign array, by key: that of its largest slice.

    Raises:
        InvalidConfig: The parts do not have ``width`` numbers together, or two overlap.
    """

    def __init__(self, field: str, sources: Sequence[StateSource], width: int) -> None:
        self._field, self._width = field, width
        fixed = sum(one.stop - one.start for one in sources if one.stop is not None)
        open_ended = [one for one in sources if one.stop is None]
        rest = width - fixed
        if len(open_ended) > 1 or (rest < 1 if open_ended else rest):
            raise InvalidConfig(
                f"{field}: got parts of {fixed} numbers and {len(open_ended)} without stop, "
                f"expected {width} together, and at most one without"
            )
        self._parts: list[_Part] = []
        self.lengths: dict[str, int] = {}
        self._whole = {one.key for one in open_ended}
        at = 0
        for one in sources:
            stop = one.start + rest if one.stop is None else one.stop
            for other in self._parts:
                if (
                    other.key == one.key
                    and one.start < other.theirs.stop
                    and other.theirs.start < stop
                ):
                    raise InvalidConfig(
                        f"{field}: got the slices {other.theirs.start}:{other.theirs.stop} and "
                        f"{one.start}:{stop} of {one.key!r}, expected none that overlap"
                    )
            part = _Part(one.key, slice(one.start, stop), slice(at, at + stop - one.start))
            self._parts.append(part)
            self.lengths[one.key] = max(self.lengths.get(one.key, 0), stop)
            at = part.ours.stop

    def require_no_gaps(self) -> None:
        """Raise ``InvalidConfig`` unless the slices fill each foreign array."""
        for key, length in self.lengths.items():
            parts = [part.theirs for part in self._parts if part.key == key]
            filled = sum(part.stop - part.start for part in parts)
            if filled != length:
                raise InvalidConfig(
                    f"{self._field}: got {filled} of the {length} numbers of {key!r}, expected all"
                )

    def write(self, own: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return the foreign arrays (D,) float32 of ``own`` (W,), copies, by key."""
        arrays = {key: np.empty(length, np.float32) for key, length in self.lengths.items()}
        for part in self._parts:
            arrays[part.key][part.theirs] = own[part.ours]
        return arrays

    def read(self, arrays: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return our rows (T, W) of the foreign arrays (T, D) float32, a copy.

        Raises:
            InferenceError: An array is missing or has other rows than the first, or other columns
                than its parts; more columns are accepted where every part has a stop.
        """
        rows = -1
        for key, length in self.lengths.items():
            if key not in arrays:
                raise InferenceError(
                    f"{self._field}: got keys {[f'{name:.60}' for name in list(arrays)[:20]]}, "
                    f"expected {key!r}"
                )
            shape = arrays[key].shape
            rows = len(arrays[key]) if rows < 0 else rows
            fits = shape[1] == length or (key not in self._whole and shape[1] > length)
            if shape[0] != rows or not fits:
                raise InferenceError(
                    f"{self._field} ({key}): got shape {shape}, expected ({rows}, {length})"
                )
        own = np.empty((rows, self._width), np.float32)
        for part in self._parts:
            own[:, part.ours] = arrays[part.key][:, part.theirs]
        return own
