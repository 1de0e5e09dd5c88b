"""Targets that read what LeRobot's clients send: parts of a message, and pickles."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable

import numpy as np

from policies.errors import ContractMismatch
from runtime.gateway.lerobot.messages import (
    END,
    MAX_FEATURES,
    MAX_TIMESTEP,
    join_parts,
    read_instructions,
    read_observation,
)
from runtime.gateway.lerobot.protobuf_fields import read_fields, write_bytes
from tests.fuzz.feed import Feed, reached
from tests.gateway.lerobot_pickles import (
    RemotePolicyConfig,
    TimedObservation,
    dumps,
    features,
    message,
)

MAX_JOINED_BYTES = 4096
PICTURE = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
SEEN = {
    "top": PICTURE,
    "turned": PICTURE.transpose(1, 0, 2),
    "a": 0.5,
    "b": np.float32(1),
    "task": "x",
}
VALID = [
    dumps(value, protocol)
    for protocol in (3, 4, 5)
    for value in (
        TimedObservation(1.5, 3, SEEN, must_go=True),
        RemotePolicyConfig("toy", "a/b", features(["a", "b"]), 50),
    )
]


def lerobot_pickle(data: bytes) -> None:
    """An observation or instructions: refused, or of the promised types."""
    feed = Feed(data)
    kind = feed.byte()
    content = feed.rest() if kind & 7 == 7 else feed.bytes_near(VALID[kind % len(VALID)])
    with contextlib.suppress(ContractMismatch):
        seen = read_observation(content)
        assert type(seen.timestep) is int and 0 <= seen.timestep < MAX_TIMESTEP
        assert type(seen.timestamp) is float and len(seen.values) <= MAX_FEATURES
        for key, value in seen.values.items():
            assert type(key) is str and type(value) in (float, str, np.ndarray)
            if isinstance(value, np.ndarray):
                assert not value.dtype.hasobject and value.nbytes <= len(content)
                value.tobytes()
        reached["observations"] += 1
    with contextlib.suppress(ContractMismatch):
        sent = read_instructions(content)
        assert all(type(name) is str for name in (*sent.state_names, *sent.renamed.values()))
        assert all(type(size) is int for shape in sent.cameras.values() for size in shape)
        assert sent.actions_per_chunk >= 1
        reached["instructions"] += 1


def lerobot_parts(data: bytes) -> None:
    """A stream of parts, as gRPC delivers them."""
    feed = Feed(data)
    states = (END,) if feed.byte() & 1 else (1, 2, END)
    parts = [feed.bytes_near(message(b"part", state)) for state in states]
    parts += [feed.take(1 + feed.byte() % 64) for _ in range(feed.byte() % 3)]
    for part in parts:
        with contextlib.suppress(ValueError):
            for number, value in read_fields(part).items():
                assert number >= 0 and type(value) in (int, bytes)
                if isinstance(value, bytes) and value and number < 2**20:
                    assert read_fields(write_bytes(number, value)) == {number: value}
    with contextlib.suppress(ValueError):
        try:
            join_parts(_stream(parts), MAX_JOINED_BYTES).send(None)  # it never waits
        except StopIteration as joined:
            assert len(joined.value) <= MAX_JOINED_BYTES
            reached["joined"] += 1


async def _stream(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
