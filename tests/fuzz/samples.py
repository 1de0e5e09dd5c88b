"""The valid messages that inputs are made from, and what both sides of them agree on."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from policies import jpeg
from policies.execution import Execution
from policies.types import CameraContract, MetaObs, PolicyContract, PolicyInfo, Rendering
from runtime.protocol import image_codec, messages
from runtime.wire_formats import msgpack_arrays
from transport.handshake_messages import MAGIC, NO_EPOCH, PROTOCOL_VERSION, Hello, Opcode, encode
from transport.schema import USED, ArraySpec, Schema
from transport.zeromq.channel import _HEADER, PAYLOAD_OFFSET

EPOCH, OTHER_EPOCH = b"e" * 16, b"o" * 16
CONTRACT = PolicyContract(
    policy_type="act",
    cameras=(
        CameraContract("top", (24, 32), (12, 16), crop=(0, 0, 24, 32), resize="area"),
        CameraContract("wrist", (16, 16), (16, 16)),
    ),
    state_dim=3,
    action_dim=2,
    chunk_size=4,
    n_action_steps=4,
    normalizer_hash="0123",
    dataset_id="one",
    dataset_ids=("one", "two"),
    rendering=Rendering(),
    execution=Execution("temporal_ensemble", 0.01, 1, "config.json"),
)
INFO = PolicyInfo("samples")
OBS = MetaObs(
    images={
        camera.name: np.arange(camera.source_hw[0] * camera.source_hw[1] * 3, dtype=np.uint32)
        .astype(np.uint8)
        .reshape(*camera.source_hw, 3)
        for camera in CONTRACT.cameras
    },
    state=np.zeros(3, np.float32),
    state_ee=np.zeros(2, np.float32),
    raw_lang="pick up the cube",
)
OBSERVATION = messages.observation_schema(OBS)
REPLY = messages.reply_schema(CONTRACT)
VARYING = Schema(
    (
        ArraySpec("state", "float32", (3,)),
        ArraySpec("data" + USED, "int64", ()),
        ArraySpec("data", "int32", (50,)),
    )
)
SMALL = Schema((ArraySpec("odd", "uint8", (3,)), ArraySpec("stamp", "int64", ())))
EMPTY = Schema(())


@functools.cache
def pictures(quality: int | None) -> image_codec.ObservationWriter:
    """A client's side for pixels (None) or JPEG."""
    return image_codec.ObservationWriter(OBSERVATION, CONTRACT, resize=False, quality=quality)


def attributes(quality: int | None = None) -> dict[str, Any]:
    """What a client says of itself."""
    return {
        "kind": "robot",
        "deterministic": True,
        "trace": 1,
        "rate_hz": 5.0,
        "deadline_ms": 100.0,
        **pictures(quality).attributes,
    }


@functools.cache
def _hello(quality: int | None) -> dict[str, Any]:
    schema = pictures(quality).schema
    return Hello("samples", schema, ("shm", "zmq"), attributes(quality)).to_body()


def hello(quality: int | None = None) -> dict[str, Any]:
    """The body of a HELLO, with pixels or with JPEG."""
    return {**_hello(quality)}


@functools.cache
def _welcome() -> dict[str, Any]:
    return {
        "session": 1,
        "schema": REPLY.to_json(),
        "attributes": {"kind": "robot", "contract": messages.contract_hash(CONTRACT)},
        "reason": "",
        "shm": None,
    }


def welcome() -> dict[str, Any]:
    """The body of a WELCOME."""
    return {**_welcome()}


@functools.cache
def _description() -> dict[str, Any]:
    return messages.describe(CONTRACT, INFO)


def description() -> dict[str, Any]:
    """What a server says of its policy."""
    return {**_description()}


def offer() -> dict[str, Any]:
    name = "/metronome-" + "0" * 32
    return {"names": [name, name], "sizes": [20480, 20480], "socket": "metronome-" + "1" * 32}


@functools.cache
def jpegs() -> tuple[bytes, ...]:
    """A picture per camera of ``CONTRACT``."""
    return tuple(jpeg.encode(OBS.images[camera.name], 80) for camera in CONTRACT.cameras)


def openpi_frames() -> tuple[bytes, ...]:
    """Observations of openpi's clients: its usual keys nested and flat, and scalars."""
    images = {name: image[::4, ::4] for name, image in OBS.images.items()}
    flat = {f"images/{name}": image for name, image in images.items()}
    return (
        msgpack_arrays.pack({"state": OBS.state, "images": images, "prompt": OBS.raw_lang}),
        msgpack_arrays.pack({"state": [0.0, 1, -2], **flat, "more": [None, True, {"x": b"y"}]}),
        b"\x81\xa5state\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\x01\xc4\x05dtype\xa3<f4",
    )


def control(opcode: Opcode, body: dict[str, Any] | None = None, epoch: bytes = NO_EPOCH) -> bytes:
    """Both frames of a control message, one after the other."""
    return b"".join(encode(opcode, epoch, body))


def message(  # noqa: PLR0917  the header's own order
    sequence: int = 0,
    released: int = 0,
    received: int = 0,
    number: int = 1,
    budget_ns: int = 0,
    kind: int = 1,
    payload: bytes = b"",
    opcode: int = Opcode.MESSAGE,
    epoch: bytes = EPOCH,
) -> bytes:
    """One message of a ZMQ session."""
    fields = sequence, released, received, number, budget_ns, kind
    head = _HEADER.pack(MAGIC, PROTOCOL_VERSION, opcode, epoch, *fields)
    return head + (bytes(PAYLOAD_OFFSET - len(head)) + payload if kind == 1 else payload)


@functools.cache
def payload(schema: Schema) -> bytes:
    """Zeros, but for what says how much of the last array counts."""
    data = bytearray(schema.nbytes)
    if schema.tail is not None:
        at = schema.offsets[schema.tail + USED]
        data[at : at + 8] = schema.specs[schema.tail].shape[0].to_bytes(8, "little")
    return bytes(data)
