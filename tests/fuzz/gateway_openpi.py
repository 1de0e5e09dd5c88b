"""A target of the gateway for openpi: a frame is read within its limits, or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from policies.errors import ContractMismatch
from policies.types import CameraContract
from runtime.gateway.observation_map import ObservationMap
from runtime.options.observation_keys import ObservationKeys
from runtime.wire_formats.bounded_msgpack import MAX_DEPTH, MAX_VALUES, MalformedFrame
from runtime.wire_formats.msgpack_arrays import pack, unpack
from tests.fuzz import samples
from tests.fuzz.feed import reached

CONTRACT = dataclasses.replace(
    samples.CONTRACT,
    cameras=(CameraContract("top", (6, 8), (6, 8)), CameraContract("wrist", (4, 4), (4, 4))),
)
"""Small pictures, so that a mutation hits more than pixels."""
OBSERVATIONS = ObservationMap(
    CONTRACT,
    ObservationKeys(),
    image_keys=lambda camera: (f"images/{camera}",),
    state_keys=("state",),
)


def openpi_frame(data: bytes) -> None:
    """A frame of openpi's client, and the observation in it."""
    try:
        read = unpack(data)
    except MalformedFrame as error:
        assert str(error).isprintable() and len(str(error)) < 1000
        return
    reached["maps"] += 1
    values = list(_values(read, 0))
    assert len(values) <= MAX_VALUES
    arrays = [value for value in values if isinstance(value, np.ndarray)]
    reached["arrays"] += len(arrays)
    assert sum(array.nbytes for array in arrays) <= len(data)
    assert not any(array.flags.writeable for array in arrays)
    assert pack(unpack(pack(read))) == pack(read)
    try:
        obs = OBSERVATIONS.read(read)
    except ContractMismatch:
        return
    assert obs.state.shape == (CONTRACT.state_dim,) and obs.state.dtype == np.float32
    assert all(obs.images[c.name].shape == (*c.source_hw, 3) for c in CONTRACT.cameras)
    reached["observations"] += 1


def _values(value: Any, depth: int) -> Iterator[Any]:
    assert depth <= MAX_DEPTH
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        yield from _values(one, depth + 1)
