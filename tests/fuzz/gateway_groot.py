"""Targets that read what a GR00T client sends: an array, a whole request, and a connection.

What the bounds let through must be what NumPy and MessagePack read, and no larger than its bytes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from typing import Any

import msgpack
import numpy as np

from policies.errors import ContractMismatch
from runtime.gateway.groot.modalities import GrootModalities, is_flat
from runtime.gateway.groot.zmtp import (
    GREETING,
    MAX_ENVELOPE_FRAMES,
    MAX_SMALL_BYTES,
    ProtocolViolation,
    RequestTooLong,
    ZmtpConnection,
)
from runtime.options.observation_keys import ImageSource, ObservationKeys, StateSource
from runtime.wire_formats.bounded_msgpack import MAX_DEPTH, MalformedFrame, require_map
from runtime.wire_formats.npy_arrays import decode_array, pack, read_npy, unpack, write_npy
from tests.fuzz import samples
from tests.fuzz.feed import Feed, reached

PICTURES = {
    "top": np.zeros((1, 1, 12, 16, 3), np.uint8),
    "wrist": np.zeros((1, 1, 16, 16, 3), np.uint8),
}
ARRAYS = (
    np.zeros((1, 1, 3), np.float32),
    np.zeros((2, 3), np.int64, order="F"),
    np.zeros((), np.bool_),
    np.zeros((0, 4), np.uint8),
)
OBSERVATIONS: tuple[dict[str, Any], ...] = (
    {
        "video": PICTURES,
        "state": {"state": ARRAYS[0]},
        "language": {"annotation.human.task_description": [["go"]]},
    },
    {
        "video.top": PICTURES["top"][0],
        "video.wrist": PICTURES["wrist"][0],
        "state.arm": np.zeros((1, 2)),
        "state.hand": np.zeros((1, 1), np.float32),
        "annotation.human.action.task_description": ["go"],
    },
)
KEYS = (
    ObservationKeys(),
    ObservationKeys(
        {"top": ImageSource("video.top")}, (StateSource("arm", stop=2), StateSource("hand", stop=1))
    ),
)
READY = b"\4\x19\5READY\x0bSocket-Type\0\0\0\3REQ"
CONNECTION = (
    GREETING + READY + b"\1\0\0\5first" + b"\4\x09\4PING\0\1ab"
    b"\1\1n\1\0\2\0\0\0\0\0\0\0\6second" + b"\1\0\0\x21" + b"too long" * 4 + b"!"
)  # fmt: skip
"""Greeting, handshake, requests of all forms, a heartbeat, and a request that is too long."""
MAX_BYTES = 32


class Wire:
    """A socket from which parts of ``data`` come, and which takes what is sent."""

    def __init__(self, data: bytes, part: int) -> None:
        self._data, self._part, self.sent = data, part, b""

    def recv(self, count: int, flags: int = 0) -> bytes:
        found = self._data[:count]
        self._data = self._data[0 if flags else count :]
        return found

    def recv_into(self, memory: memoryview) -> int:
        found = self.recv(min(len(memory), self._part))
        memory[: len(found)] = found
        return len(found)

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def setsockopt(self, *_: object) -> None: ...
    def settimeout(self, _: object) -> None: ...


def zmtp(data: bytes) -> None:
    """A connection from its greeting on."""
    feed = Feed(data)
    kind, part = feed.byte(), 1 + feed.byte()
    text = feed.rest() if kind & 7 == 7 else feed.bytes_near(CONNECTION)
    wire = Wire(text, part)
    connection = ZmtpConnection(wire, MAX_BYTES)
    try:
        connection.handshake()
        reached["handshakes"] += 1
        while True:
            try:
                received = connection.receive()
            except RequestTooLong as error:
                reached["too long"] += 1
                assert str(error).isprintable()
                connection.send(error.envelope, b"no")
                continue
            if received is None:
                break
            envelope, request = received
            assert 1 <= len(envelope) <= MAX_ENVELOPE_FRAMES and not envelope[-1]
            assert all(len(frame) <= MAX_SMALL_BYTES for frame in envelope)
            assert len(request) <= MAX_BYTES and bytes(request) in text
            reached["requests"] += 1
            connection.send(envelope, bytes(request))
    except (ProtocolViolation, ConnectionError) as error:
        assert str(error).isprintable() and len(str(error)) < 500
    reached["heartbeats"] += wire.sent.count(b"\4PONG")
    assert len(wire.sent) < 2 * len(text) + 200


def npy(data: bytes) -> None:
    """The bytes of a ``.npy``."""
    feed = Feed(data)
    kind = feed.byte()
    text = feed.rest() if kind & 7 == 7 else feed.bytes_near(write_npy(ARRAYS[kind >> 3 & 3]))
    try:
        read = read_npy(text)
    except MalformedFrame:
        return
    assert read.dtype.kind in "biuf" and read.nbytes <= len(text) and not read.flags.writeable
    with warnings.catch_warnings(action="ignore"):
        theirs = np.load(io.BytesIO(text), allow_pickle=False)
    assert (theirs.dtype, theirs.shape) == (read.dtype, read.shape)
    assert theirs.tobytes() == read.tobytes()
    reached["accepted"] += 1


def request(data: bytes) -> None:
    """A request, and the observation in it."""
    feed = Feed(data)
    kind = feed.byte()
    which = kind >> 3 & 1
    text = feed.rest() if kind & 7 == 7 else feed.bytes_near(packed(which))
    try:
        value = unpack(text)
    except MalformedFrame as error:
        assert str(error).isprintable() and len(str(error)) < 1000
        return
    reached["unpacked"] += 1
    _check_size(value, len(text), MAX_DEPTH)
    assert pack(msgpack.unpackb(text, object_hook=decode_array)) == pack(value)
    try:
        observation = require_map(value.get("data"), "data")
        if "observation" in observation:
            observation = require_map(observation["observation"], "observation")
        obs = modalities(which).read(observation, 0)
    except (MalformedFrame, ContractMismatch):
        return
    for camera in samples.CONTRACT.cameras:
        picture = obs.images[camera.name]
        assert picture.dtype == np.uint8 and picture.shape[:2] in camera.accepted_hw
    assert obs.state.shape == (samples.CONTRACT.state_dim,) and obs.state.dtype == np.float32
    assert type(obs.raw_lang) is str
    reached["flat" if is_flat(observation) else "nested"] += 1


@functools.cache
def modalities(which: int) -> GrootModalities:
    return GrootModalities(samples.CONTRACT, KEYS[which])


@functools.cache
def packed(which: int) -> bytes:
    """A valid request: of version N1.6, nested; of version N1.5, flat."""
    data = OBSERVATIONS[which] if which else {"observation": OBSERVATIONS[which], "options": None}
    return pack({"endpoint": "get_action", "data": data})


def _check_size(value: Any, most: int, depth: int) -> None:
    assert depth >= 0
    if isinstance(value, np.ndarray | bytes | str):
        with contextlib.suppress(UnicodeEncodeError):
            value = value.encode() if isinstance(value, str) else value
        assert (value.nbytes if isinstance(value, np.ndarray) else len(value)) <= most
    elif isinstance(value, dict | list):
        assert len(value) <= most
        for inner in value.values() if isinstance(value, dict) else value:
            _check_size(inner, most, depth - 1)
