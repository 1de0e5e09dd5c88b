"""A target of the gateway for ILStudio: a message is read within its limits, or refused."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import numpy as np

from policies.checkpoint.safe_pickle_types import SafeRecord
from policies.errors import ContractMismatch
from runtime.gateway.ilstudio.observations import MAX_ROWS, IlstudioObservations
from runtime.gateway.restricted_pickle import MAX_VALUES, RecordClass, read_pickle
from runtime.options.observation_keys import ObservationKeys
from tests.fuzz.feed import Feed, reached
from tests.gateway.ilstudio_messages import dumps, meta_obs
from tests.runtime.toy_policy import CONTRACT

_RECORDS = {("benchmark.base", "MetaObs"): RecordClass("MetaObs")}
_PLAIN = (type(None), bool, int, float, str, bytes)


@functools.cache
def _samples() -> tuple[bytes, ...]:
    image = np.zeros((1, 1, 3, 1, 1), np.uint8)
    small = meta_obs(image=image, state=np.zeros((1, 2), np.float32))
    return (dumps(meta_obs()), *(dumps(small, protocol) for protocol in (3, 4, 5)))


@functools.cache
def _reader() -> IlstudioObservations:
    return IlstudioObservations(CONTRACT, ObservationKeys())


def ilstudio(data: bytes) -> None:
    """An ILStudio client's message: a pickle, then an observation."""
    feed = Feed(data)
    kind = feed.byte()
    content = feed.rest() if kind & 7 == 7 else feed.bytes_near(_samples()[kind >> 3 & 3])
    try:
        value = read_pickle(content, _RECORDS)
    except pickle.UnpicklingError as error:
        assert len(str(error)) < 1000
        reached["refused"] += 1
        return
    assert _count(value) <= MAX_VALUES
    reached["accepted"] += 1
    try:
        rows = _reader().read(memoryview(content))
    except ContractMismatch as error:
        assert len(str(error)) < 4000
        return
    assert 1 <= len(rows) <= MAX_ROWS
    for obs in rows:
        assert obs.state.shape == (CONTRACT.state_dim,) and obs.state.dtype == np.float32
        assert obs.images["top"].shape == (24, 32, 3)
        assert type(obs.timestep) is int and type(obs.raw_lang) is str
    reached["observations"] += 1


def _count(value: Any) -> int:
    """The values in ``value``, all of which are plain."""
    if isinstance(value, SafeRecord):
        return 1 + _count(value.fields)
    if type(value) is dict:
        assert all(type(key) is str for key in value)
        return 1 + sum(map(_count, value.values()))
    if type(value) in (list, tuple):
        return 1 + sum(map(_count, value))
    assert (type(value) is np.ndarray and value.dtype.kind in "biuf") or type(value) in _PLAIN
    return 1
