"""Makes a policy's observations of ILStudio's ``MetaObs``, one for each row of its batch."""

from __future__ import annotations

from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.checkpoint.safe_pickle_types import SafeRecord
from policies.errors import ContractMismatch
from policies.types import MetaObs, PolicyContract
from runtime.gateway.observation_map import ObservationMap
from runtime.gateway.restricted_pickle import RecordClass, read_pickle
from runtime.options.observation_keys import ObservationKeys

MAX_ROWS = 16
"""Largest batch."""
MAX_PICTURES = 64
"""Most pictures of a row."""
NO_TIMESTEP = -1
"""What a ``MetaObs`` has before anybody sets its ``timestep``."""

MAX_TIMESTEP = 2**31 - 1

_RECORDS = {("benchmark.base", "MetaObs"): RecordClass("MetaObs")}
_PIXEL_BYTES = 3 + 4
"""A picture's, and those of a depth that the policy does not use."""
_SLACK_BYTES = 65_536
"""For everything in a row that is no picture."""
_STATES = ("state", "state_ee", "state_joint", "state_obj")


class IlstudioObservations:
    """Reads ILStudio's messages for one policy.

    Args:
        contract: The policy's.
        keys: The user's configuration. The keys are ``image/0``, ``image/1`` ... for the pictures
            in the environment's order, and the names of the arrays of ``MetaObs``.

    Raises:
        InvalidConfig: As ``ObservationMap``.

    Attributes:
        max_bytes: Longest message.
    """

    def __init__(self, contract: PolicyContract, keys: ObservationKeys) -> None:
        self._names = contract.camera_names
        self._free = set(keys.cameras) >= set(self._names)
        self._map = ObservationMap(
            contract,
            keys,
            image_keys=lambda name: (f"image/{self._names.index(name)}",),
            state_keys=("state",),
        )
        pixels = sum(max(h * w for h, w in camera.accepted_hw) for camera in contract.cameras)
        self.max_bytes = MAX_ROWS * (pixels * _PIXEL_BYTES + _SLACK_BYTES)

    def read(self, message: memoryview) -> list[MetaObs]:
        """Return an observation per row. ``timestep`` is ``NO_TIMESTEP`` where none was given.

        Raises:
            ContractMismatch: It is no ``MetaObs``, or does not fit; names field, got, expected.
        """
        try:
            record = read_pickle(message, _RECORDS)
        except UnpicklingError as error:
            raise ContractMismatch(
                "message", f"a pickle that is refused: {error}", "benchmark.base.MetaObs"
            ) from error
        if not isinstance(record, SafeRecord):
            raise ContractMismatch("message", type(record).__name__, "benchmark.base.MetaObs")
        fields = record.fields
        state = fields.get("state")
        if not isinstance(state, np.ndarray) or state.ndim != 2:
            raise ContractMismatch("state", _described(state), "an array (N, D)")
        count = len(state)
        if not 1 <= count <= MAX_ROWS:
            raise ContractMismatch("state", f"{count} rows", f"1 to {MAX_ROWS}")
        images = self._images(fields.get("image"), count)
        timesteps = _timesteps(fields.get("timestep"), count)
        texts = _texts(fields.get("raw_lang"), count)
        return [
            self._map.read(
                _row(fields, images, row, count), timestep=timesteps[row], raw_lang=texts[row]
            )
            for row in range(count)
        ]

    def _images(self, image: object, count: int) -> NDArray[Any]:
        """Return ``image`` (N, K, C, H, W); K is 0 where it is None."""
        if image is None:
            image = np.empty((count, 0, 0, 0, 0), np.uint8)
        if not isinstance(image, np.ndarray) or image.ndim != 5 or len(image) != count:
            raise ContractMismatch("image", _described(image), f"an array ({count}, K, C, H, W)")
        pictures = image.shape[1]
        if pictures > MAX_PICTURES or (pictures != len(self._names) and not self._free):
            raise ContractMismatch(
                "image",
                f"{pictures} pictures",
                f"{len(self._names)}, of {list(self._names)} in this order",
            )
        return image


def _row(
    fields: Mapping[str, Any], images: NDArray[Any], row: int, count: int
) -> Mapping[str, Any]:
    found: dict[str, Any] = {
        "image": {str(at): picture for at, picture in enumerate(images[row])},
    }
    for name in _STATES:
        value = fields.get(name)
        if isinstance(value, np.ndarray) and value.ndim and len(value) == count:
            found[name] = value[row]
    return found


def _timesteps(value: object, count: int) -> list[int]:
    if value is None or (isinstance(value, int) and value < 0):
        return [NO_TIMESTEP] * count
    numbers = np.asarray(value).reshape(-1) if isinstance(value, int | np.ndarray) else None
    if numbers is None or numbers.dtype.kind not in "iu" or len(numbers) not in (1, count):
        raise ContractMismatch("timestep", _described(value), f"integers ({count}, 1)")
    given = [int(number) for number in numbers]
    if min(given) < NO_TIMESTEP or max(given) > MAX_TIMESTEP:
        raise ContractMismatch("timestep", f"{given}", f"0 to {MAX_TIMESTEP}")
    return given if len(given) == count else given * count


def _texts(value: object, count: int) -> list[str]:
    if value is None or isinstance(value, str):
        return [value or ""] * count
    if (
        not isinstance(value, list)
        or len(value) != count
        or not all(isinstance(text, str) for text in value)
    ):
        raise ContractMismatch("raw_lang", _described(value), f"a list of {count} strings")
    return value


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return "nothing" if value is None else type(value).__name__
