"""One frame per message: what a ZMQ channel believes of it, and what a message of variable length
is."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
from contracts.channel import PATIENCE_S, same
from contracts.frames import CHUNK, OBSERVATION, chunk, observation
from hypothesis import given
from hypothesis import strategies as st
from transport_rig import make_listener, pumped

from transport.base_channel import SLOTS
from transport.channel import MAX_BODY_BYTES, Kind
from transport.dialer import Dialer
from transport.errors import SchemaMismatch
from transport.handshake_messages import Opcode
from transport.schema import USED, ArraySpec, Schema
from transport.zeromq.channel import _HEADER, PAYLOAD_OFFSET, ZmqChannel

EPOCH = b"e" * 16
ROOM = 1000
VARYING = Schema(
    (
        ArraySpec("state", "float32", (14,)),
        ArraySpec("data" + USED, "int64", ()),
        ArraySpec("data", "uint8", (ROOM,)),
    )
)


class Wire:
    """A connection to a channel in the same process."""

    def __init__(self) -> None:
        self.peer: ZmqChannel | None = None
        self.sent: list[bytes] = []

    def send(self, frame) -> bool:
        self.sent.append(bytes(frame))
        if self.peer is not None:
            self.peer.deliver(memoryview(self.sent[-1]))
        return True

    def pump(self, timeout_s: float) -> str | None:
        return None

    def close(self, reason: str) -> None: ...


def wired(forth: Schema = OBSERVATION, back: Schema = CHUNK) -> tuple[ZmqChannel, ZmqChannel]:
    one, other = Wire(), Wire()
    left, right = ZmqChannel(forth, back, EPOCH, one), ZmqChannel(back, forth, EPOCH, other)
    one.peer, other.peer = right, left
    return left, right


def frame_of(channel: ZmqChannel, number: int = 1) -> bytearray:
    """A valid first message for the other end of ``channel``."""
    wire, peer = channel._connection, channel._connection.peer
    wire.peer = None
    channel.send(observation(number), number)
    wire.peer = peer
    return bytearray(wire.sent[-1])


FIELDS = ("magic", "version", "opcode", "epoch", "sequence", "released", "received", "id", "budget")


def changed(frame: bytearray, **fields: object) -> memoryview:
    values = dict(zip((*FIELDS, "kind"), _HEADER.unpack_from(frame), strict=True)) | fields
    _HEADER.pack_into(frame, 0, *values.values())
    return memoryview(frame)


@pytest.mark.parametrize(
    "fields",
    [
        {"sequence": 1},
        {"sequence": -1},
        {"released": 1},
        {"released": -1},
        {"received": 5},
        {"id": -1},
        {"budget": -1},
        {"kind": 0},
        {"kind": 77},
        {"kind": int(Kind.ERROR)},  # longer than a body may be
    ],
    ids=str,
)
def test_impossible_header_is_counted_and_dropped(fields: dict[str, object]) -> None:
    left, right = wired()
    right.deliver(changed(frame_of(left), **fields))
    assert right.poll() is None
    assert right.statistics().dropped_malformed == 1


@pytest.mark.parametrize("cut", [1, 100, OBSERVATION.nbytes, OBSERVATION.nbytes + 100])
def test_a_frame_of_another_length_is_dropped(cut: int) -> None:
    left, right = wired()
    frame = frame_of(left)
    right.deliver(memoryview(frame)[: len(frame) - cut])
    right.deliver(memoryview(frame + b"x"))
    assert right.poll() is None
    assert right.statistics().dropped_malformed == 2


def test_other_epoch_is_counted_separately() -> None:
    left, right = wired()
    right.deliver(changed(frame_of(left), epoch=b"f" * 16))
    assert right.statistics().dropped_epoch == 1


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_no_error(noise: bytes) -> None:
    left, right = wired()
    for data in (noise, _HEADER.pack(b"MTRN", 2, Opcode.MESSAGE, EPOCH, *[0] * 6) + noise):
        right.deliver(memoryview(data))
    while (message := right.poll()) is not None:
        assert len(message.body) <= MAX_BODY_BYTES
        message.release()
    left.close()


def test_flood_is_limited_to_the_slots() -> None:
    left, right = wired()
    frame = frame_of(left)
    for sequence in range(100):
        right.deliver(memoryview(bytes(changed(frame, sequence=sequence))))
    assert len(right._inbox) == SLOTS
    assert right.statistics().dropped_malformed == 100 - SLOTS


def test_an_exchange_sends_from_one_buffer_and_needs_no_credit() -> None:
    left, right = wired()
    addresses = set()
    for number in range(20):
        loan = left.loan()
        addresses.add(loan.arrays["image"].ctypes.data)
        for name, array in observation(number).items():
            loan.arrays[name][...] = array
        loan.publish(number)
        with right.poll() as message:
            assert same(message.arrays, observation(number))
            right.send(chunk(number), number)
        left.poll().release()
    assert len(addresses) == 1
    assert len(left._connection.sent) == len(right._connection.sent) == 20


def test_a_loan_stays_while_answers_come() -> None:
    """What is being written must not change places because a buffer became free."""
    left, right = wired()
    left.send(observation(1), 1)
    loan = left.loan()
    for name, array in observation(2).items():
        loan.arrays[name][...] = array
    right.poll().release()
    right.send(chunk(1), 1)
    left.poll().release()
    loan.publish(2)
    with right.poll() as message:
        assert same(message.arrays, observation(2))


def test_a_silent_peer_costs_as_many_buffers_as_slots() -> None:
    left, _ = wired()
    left._connection.peer = None
    for number in range(SLOTS):
        left.send(observation(number), number)
    assert len(left._send_buffers._under_way) == SLOTS


# messages of variable length


def varying(used: int) -> dict[str, np.ndarray]:
    return {
        "state": np.arange(14, dtype=np.float32),
        "data" + USED: np.array(used, np.int64),
        "data": np.arange(ROOM, dtype=np.uint32).astype(np.uint8),
    }


def test_only_used_items_are_sent_over_a_network() -> None:
    left, right = wired(VARYING)
    for used in (1, 7, 640, ROOM):
        left.send(varying(used), used)
        assert len(left._connection.sent[-1]) == PAYLOAD_OFFSET + VARYING.offsets["data"] + used
        with right.poll() as message:
            assert message.arrays["data"].shape == (used,)
            assert (message.arrays["data"] == varying(used)["data"][:used]).all()
            assert (message.arrays["state"] == varying(used)["state"]).all()


@pytest.mark.parametrize("used", [0, -1, ROOM + 1, 2**62])
def test_impossible_used_length_cannot_be_sent(used: int) -> None:
    left, right = wired(VARYING)
    with pytest.raises(SchemaMismatch, match=f"data{USED}: got {used}, expected 1 to {ROOM}"):
        left.send(varying(used), 1)
    left.send(varying(5), 2)
    with right.poll() as message:
        assert message.request_id == 2


@pytest.mark.parametrize("claimed", [0, -1, 9, 11, 2**62])
def test_used_length_that_differs_from_the_frame_is_dropped(claimed: int) -> None:
    left, right = wired(VARYING)
    left._connection.peer = None
    left.send(varying(10), 1)
    frame = bytearray(left._connection.sent[-1])
    start = PAYLOAD_OFFSET + VARYING.offsets["data" + USED]
    frame[start : start + 8] = np.int64(claimed).tobytes()
    right.deliver(memoryview(frame))
    assert right.poll() is None
    assert right.statistics().dropped_malformed == 1


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_both_transports_carry_a_variable_length(transport: str) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(make_listener())
        dialer = stack.enter_context(Dialer("127.0.0.1", listener.port, timeout_s=PATIENCE_S))
        with pumped(listener):
            client, _ = dialer.open(VARYING, client="test", transport=transport)
        stack.enter_context(client)
        (session,) = listener.sessions.values()
        for used in (3, ROOM, 17):
            client.send(varying(used), used)
            with session.channel.recv(PATIENCE_S) as message:
                assert message.arrays["data" + USED] == used
                assert (message.arrays["data"][:used] == varying(used)["data"][:used]).all()


@pytest.mark.parametrize(
    "specs",
    [
        (ArraySpec("data" + USED, "int64", ()), ArraySpec("other", "uint8", (3,))),
        (ArraySpec("data", "uint8", (3,)), ArraySpec("data" + USED, "int64", ())),
        (ArraySpec("data" + USED, "int64", ()), ArraySpec("data", "uint8", (3, 1))),
        (ArraySpec("data" + USED, "int64", ()),),
    ],
)
def test_schema_with_used_length_of_another_array_is_refused(specs) -> None:
    with pytest.raises(SchemaMismatch, match="a used length"):
        Schema(specs)


def test_a_cut_keeps_whole_items() -> None:
    schema = Schema((ArraySpec("x" + USED, "int64", ()), ArraySpec("x", "float32", (10,))))
    start = schema.offsets["x"]
    assert schema.cut(schema.nbytes) is schema
    assert schema.cut(start + 12).specs["x"].shape == (3,)
    for nbytes in (start, start - 1, start + 10, schema.nbytes + 1, 0, -5):
        assert schema.cut(nbytes) is None
    assert Schema.from_json(schema.to_json()) == schema
    assert OBSERVATION.cut(OBSERVATION.nbytes - 1) is None
