"""Buffers to send from: never one that may still be under way, and the warm one first."""

from __future__ import annotations

import numpy as np
from contracts.frames import OBSERVATION
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from transport.schema import ALIGNMENT, Schema
from transport.zeromq.send_buffers import SendBuffer, SendBuffers

OFFSET = 128


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.staging = SendBuffers(OBSERVATION, OFFSET)
        self.under_way: dict[int, SendBuffer] = {}
        self.head = self.received = 0
        self.open: SendBuffer | None = None
        self.all: set[int] = set()
        self.kept: list[SendBuffer] = []

    @rule()
    def claim(self) -> None:
        buffer = self.staging.claim()
        assert self.open is None or buffer is self.open  # a loan does not move
        assert all(buffer is not other for other in self.under_way.values())
        self.open = buffer
        self.all.add(id(buffer))
        self.kept.append(buffer)

    @precondition(lambda self: self.open is not None)
    @rule()
    def send(self) -> None:
        self.under_way[self.head] = self.open
        self.staging.sent(self.head)
        self.head, self.open = self.head + 1, None

    @rule(data=st.data())
    def hear(self, data) -> None:
        self.received = data.draw(st.integers(self.received, self.head))
        self.staging.reclaim(self.received)
        self.under_way = {n: b for n, b in self.under_way.items() if n >= self.received}

    @rule(data=st.data())
    def a_body_goes_between(self, data) -> None:
        """A message that needs no buffer has a sequence number all the same."""
        self.head += data.draw(st.integers(0, 2))

    @invariant()
    def no_more_than_needed(self) -> None:
        assert len(self.all) <= max(1, self.head + 1)


TestStaging = Model.TestCase


def test_exchange_of_one_request_and_one_reply_uses_one_buffer() -> None:
    staging = SendBuffers(OBSERVATION, OFFSET)
    first = staging.claim()
    for sequence in range(10):
        assert staging.claim() is first
        staging.sent(sequence)
        staging.reclaim(sequence + 1)


def test_a_frame_holds_header_and_arrays_on_cache_lines() -> None:
    buffer = SendBuffer(OBSERVATION, OFFSET)
    assert buffer.frame.nbytes == OFFSET + OBSERVATION.nbytes
    start = buffer.frame.ctypes.data
    assert start % ALIGNMENT == 0
    for name, array in buffer.arrays.items():
        assert array.ctypes.data == start + OFFSET + OBSERVATION.offsets[name]
        assert array.flags.writeable


def test_a_message_without_arrays_still_has_a_frame() -> None:
    buffer = SendBuffer(Schema(()), OFFSET)
    assert buffer.frame.shape == (OFFSET,)
    assert buffer.arrays == {}
    assert buffer.frame.dtype == np.uint8
