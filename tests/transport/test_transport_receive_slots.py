"""Short messages are copied into slots; their arrays are made once."""

from __future__ import annotations

import pytest
from contracts.frames import OBSERVATION

from transport.schema import ALIGNMENT, Schema
from transport.zeromq.receive_slots import ReceiveSlots


def test_a_message_is_copied_into_the_slot_of_its_sequence() -> None:
    slots = ReceiveSlots(OBSERVATION, 3)
    views = {}
    for sequence in range(3):
        payload = bytes([sequence]) * OBSERVATION.nbytes
        views[sequence] = slots.fill(sequence, memoryview(payload))
    for sequence, slot in views.items():
        for array in slot.arrays.values():
            assert array.ctypes.data % ALIGNMENT == 0
            assert not array.flags.writeable
            assert set(array.tobytes()) == {sequence}
    assert slots.fill(3, memoryview(bytes(OBSERVATION.nbytes))) is views[0]


@pytest.mark.parametrize("more", [-1, 1])
def test_a_payload_of_another_length_is_not_copied(more: int) -> None:
    slots = ReceiveSlots(OBSERVATION, 1)
    views = slots.fill(0, memoryview(bytes(OBSERVATION.nbytes)))
    assert slots.fill(0, memoryview(b"\1" * (OBSERVATION.nbytes + more))) is None
    assert not any(array.any() for array in views.arrays.values())


def test_a_message_without_arrays_has_a_slot() -> None:
    assert ReceiveSlots(Schema(()), 1).fill(0, memoryview(b"")).arrays == {}
