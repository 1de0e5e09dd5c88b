"""Targets that read one message: what is accepted must be written again to something equal.

Each is called with a fuzzer's bytes and raises only where a promise was broken.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from types import NoneType
from typing import Any

import numpy as np

from policies.errors import ContractMismatch, InferenceError, PolicyError
from policies.types import PolicyContract
from runtime.protocol import messages
from runtime.server.admission import MAX_DEADLINE_MS, MAX_RATE_HZ, Demand, SessionLimits, admit
from runtime.server.cost_model import InferenceCostModel
from runtime.trace import recorder as trace
from tests.fuzz import samples
from tests.fuzz.feed import Feed, reached
from transport.channel import MAX_BODY_BYTES
from transport.errors import ProtocolError, Refused, SchemaMismatch
from transport.handshake_messages import (
    EPOCH_BYTES,
    MAX_CLIENT_CHARS,
    MAX_CONTROL_BYTES,
    PREFIX,
    TRANSPORTS,
    Hello,
    ShmOffer,
    decode_body,
    decode_prefix,
)
from transport.schema import ALIGNMENT, MAX_ARRAYS, MAX_MESSAGE_BYTES, Schema


def same(left: Any, right: Any) -> bool:
    """Equality of JSON values in which a NaN is itself."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def body_of(feed: Feed, valid: dict[str, Any]) -> dict[str, Any] | None:
    """A body as ``decode_body`` gives it: ``valid`` with changes, or any bytes."""
    text = feed.rest() if feed.byte() & 7 == 7 else feed.json(feed.vary(valid)).encode()
    try:
        return decode_body(text)
    except ProtocolError:
        return None


def control(data: bytes) -> None:
    """Frame 0 and frame 1."""
    head, text = data[: PREFIX.size], data[PREFIX.size :]
    with contextlib.suppress(ProtocolError):
        version, opcode, epoch = decode_prefix(memoryview(head))
        assert 0 <= version < 1 << 16 and 0 <= opcode < 1 << 16
        assert len(epoch) == EPOCH_BYTES
        assert PREFIX.pack(head[:4], version, opcode, epoch) == head
        reached["prefix"] += 1
    with contextlib.suppress(ProtocolError):
        body = decode_body(text)
        assert isinstance(body, dict) and len(text) <= MAX_CONTROL_BYTES
        reached["body"] += 1
        with contextlib.suppress(RecursionError):  # this writer's, of what the reader let through
            assert same(decode_body(json.dumps(body).encode()), body)


def hello(data: bytes) -> None:
    """What a client says of itself."""
    feed = Feed(data)
    valid = samples.hello(80 if feed.byte() & 1 else None)
    if feed.byte() & 1:
        valid["schema"] = feed.json(feed.vary(json.loads(valid["schema"])))
    body = body_of(feed, valid)
    if body is None:
        return
    try:
        read = Hello.from_body(body)
    except (ProtocolError, SchemaMismatch):
        return
    assert len(read.client) <= MAX_CLIENT_CHARS
    assert set(read.transports) <= set(TRANSPORTS)
    assert isinstance(read.attributes, dict)
    again = Hello.from_body(read.to_body())
    assert (again.client, again.schema, again.transports, again.attributes) == (
        *(read.client, read.schema, read.transports, read.attributes),
    )
    reached["accepted"] += 1


def segment_offer(data: bytes) -> None:
    """Two segments by name."""
    feed = Feed(data)
    body = body_of(feed, samples.offer())
    if body is None:
        return
    try:
        read = ShmOffer.from_body(body)
    except ProtocolError:
        return
    texts, sizes = (*read.names, read.socket), read.sizes
    assert all(type(text) is str for text in texts) and all(type(size) is int for size in sizes)
    assert ShmOffer.from_body(read.to_body()) == read
    reached["accepted"] += 1


def schema(data: bytes) -> None:
    """The layout of messages."""
    feed = Feed(data)
    kind = feed.byte()
    text: str | bytes
    if kind & 7 == 7:
        text = feed.rest()
    else:
        known = (samples.OBSERVATION, samples.pictures(80).schema, samples.VARYING, samples.SMALL)
        text = feed.json(feed.vary(json.loads(known[kind >> 3 & 3].to_json())))
    try:
        read = Schema.from_json(text)
    except (ProtocolError, SchemaMismatch):
        return
    check_schema(read)
    reached["accepted"] += 1
    if read.tail is None:
        return
    reached["of varying length"] += 1
    for nbytes in (feed.word(), read.nbytes - feed.byte(), read.nbytes, 0):
        cut = read.cut(nbytes)
        if cut is not None:
            assert cut.nbytes == nbytes and cut.tail == read.tail
            assert list(cut.specs) == list(read.specs) and cut.offsets == read.offsets


def check_schema(read: Schema) -> None:
    """The layout that ``Schema`` promises."""
    assert len(read.specs) <= MAX_ARRAYS and 0 <= read.nbytes <= MAX_MESSAGE_BYTES
    end = 0
    for name, spec in read.specs.items():
        start = read.offsets[name]
        assert start % ALIGNMENT == 0 and end <= start, "arrays overlap"
        end = start + spec.nbytes
        assert all(type(size) is int for size in spec.shape)
    assert end == read.nbytes
    assert Schema.from_json(read.to_json()) == read


def description(data: bytes) -> None:
    """What a server says of its policy, as a client reads it."""
    feed = Feed(data)
    valid = samples.description()
    if feed.byte() & 7 == 7:
        valid["contract"] = feed.text() + feed.rest().decode("latin-1")
    else:
        valid["contract"] = feed.json(feed.vary(json.loads(valid["contract"])))
    body = body_of(feed, valid)
    if body is None:
        return
    try:
        contract, _ = messages.read_description(body)
    except ContractMismatch:
        return
    check_contract(contract)
    reached["accepted"] += 1


def check_contract(contract: PolicyContract) -> None:
    """Whether the fields are of the declared types: nothing later looks."""
    whole = ("state_dim", "action_dim", "chunk_size", "n_action_steps", "first_action_offset")
    for name in whole:
        assert type(getattr(contract, name)) is int, f"{name}: {getattr(contract, name)!r:.80}"
    for name in ("policy_type", "normalizer_hash", "dataset_id", *contract.camera_names):
        text = getattr(contract, name) if hasattr(contract, name) else name
        assert type(text) is str, f"{name}: {text!r:.80}"
    assert 0 < contract.dt_s <= sys.float_info.max, f"dt_s: {contract.dt_s!r:.80}"
    assert type(contract.gripper_continuous) is bool
    assert all(type(name) is str for name in contract.dataset_ids)
    rendering = contract.rendering
    assert rendering is None or (type(rendering.shadows), type(rendering.msaa)) == (bool, int)
    said = contract.execution
    if said is not None:
        assert (type(said.action_manager), type(said.source)) == (str, str)
        assert type(said.manager_coef) in (float, NoneType)
        assert type(said.n_action_steps) in (int, NoneType)
        assert said.n_action_steps is None or 1 <= said.n_action_steps <= contract.chunk_size
    for assumption in contract.assumed:
        assert {type(getattr(assumption, f)) for f in ("what", "value", "flag")} == {str}
    assert PolicyContract.from_json(contract.to_json()) == contract


def error(data: bytes) -> None:
    """The body of a failed request, as a client reads it."""
    feed = Feed(data)
    if feed.byte() & 1:
        text = feed.rest()[:MAX_BODY_BYTES]
    else:
        mismatch = feed.byte() & 1
        kind, args = (
            ("ContractMismatch", ["a", "b", "c"]) if mismatch else ("InferenceError", ["a"])
        )
        text = feed.json(feed.vary({"kind": kind, "args": args})).encode()[:MAX_BODY_BYTES]
    read = messages.decode_error(text)
    assert isinstance(read, PolicyError)
    again = messages.encode_error(read)
    assert len(again) <= MAX_BODY_BYTES
    assert type(messages.decode_error(again)) is type(read)
    reached[type(read).__name__] += 1


def chunk(data: bytes) -> None:
    """An answer's arrays, as a client reads them."""
    feed = Feed(data)
    numbers = np.array([feed.word() for _ in range(8)], np.int64)
    numbers[0] ^= 1  # zeros are the valid message
    actions = np.resize(np.frombuffer(feed.rest() + bytes(4), np.uint8), 32).view(np.float32)
    arrays = {"numbers": numbers, "actions": actions.reshape(4, 2)}
    try:
        read = messages.read_chunk(arrays, samples.CONTRACT)
    except InferenceError:
        return
    assert 1 <= len(read) <= samples.CONTRACT.chunk_size
    assert not np.shares_memory(read.actions, actions)
    assert read.actions.tobytes() == arrays["actions"][: len(read)].tobytes()
    written = {"numbers": np.zeros(8, np.int64), "actions": np.zeros((4, 2), np.float32)}
    messages.write_chunk(read, int(numbers[4]), messages.policy_id(arrays), written)
    assert (written["numbers"] == numbers).all()
    reached["accepted"] += 1


def demand(data: bytes) -> None:
    """What a session wants, and whether it may have it."""
    feed = Feed(data)
    body = body_of(feed, {"kind": "robot", "rate_hz": 50, "deadline_ms": 20.5})
    if body is None:
        return
    try:
        read = Demand.from_attributes(body, 4096)
        reached["read"] += 1
        assert math.isfinite(read.rate_hz) and 0 <= read.rate_hz <= MAX_RATE_HZ
        assert read.deadline_ms > 0 and (
            read.deadline_ms <= MAX_DEADLINE_MS
            or "deadline_ms" not in body
            or body["deadline_ms"] is None
        )
        present = [Demand("robot", 20.0, 50.0, 4096)] * (feed.byte() & 3)
        admit(read, present, SessionLimits(rate_hz=100.0), InferenceCostModel({1: 10_000_000}))
    except Refused:
        return
    reached["admitted"] += 1


def trace_key(data: bytes) -> None:
    """The number by which both sides know a session's requests."""
    feed = Feed(data)
    body = body_of(feed, {"trace": 2**39 + 12345})
    if body is None:
        return
    said = body.get("trace")
    key = trace.read_key(said)
    assert type(key) is int and 0 <= key < 1 << trace.KEY_BITS
    assert key in (0, said)
    reached["keys"] += key != 0
    flow = trace.flow_id(key, feed.word() & 2**63 - 1)
    assert 0 <= flow < 1 << 64
