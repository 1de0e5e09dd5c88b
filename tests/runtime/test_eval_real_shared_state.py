"""The shared memory of a robot evaluation: sizes, commands, texts."""

from __future__ import annotations

import os

import numpy as np
import pytest

from runtime.eval_real.control_enums import ControlCommand
from runtime.eval_real.shared_state import (
    Dims,
    SharedState,
    create_segment,
    decode_command,
    encode_command,
)
from transport.errors import ProtocolError
from transport.shm.text_field import get_text, put_text


def test_a_segment_of_another_size_is_refused() -> None:
    fd = create_segment(Dims(14, 14, 100))
    try:
        with pytest.raises(ProtocolError, match=r"segment: got .* bytes, expected"):
            SharedState(fd, Dims(14, 14, 10_000))
    finally:
        os.close(fd)


def test_fields_do_not_overlap() -> None:
    dims = Dims(state=3, action=2, chunk=5)
    fd = create_segment(dims)
    try:
        with SharedState(fd, dims) as shared_state:
            shared_state.control_command.store(1)
            shared_state.watchdog_heartbeat.store(2)
            for name in ("progress", "commands", "sensing"):
                writer = shared_state.latest_writer(name)
                for array in writer.claim().values():
                    array[...] = 7
                writer.publish()
            for name in ("chunks", "accepted", "joints", "ticks", "events"):
                queue = shared_state.queue_writer(name)
                while (arrays := queue.claim()) is not None:
                    for array in arrays.values():
                        array[...] = 9
                    queue.publish()
            assert (
                shared_state.control_command.load(),
                shared_state.watchdog_heartbeat.load(),
            ) == (1, 2)
            for name in ("progress", "commands", "sensing"):
                reader = shared_state.latest_reader(name)
                assert reader.refresh() and reader.sequence == 1
                assert all((array == 7).all() for array in reader.values.values())
            for name in ("chunks", "accepted", "joints", "ticks", "events"):
                arrays = shared_state.queue_reader(name).peek()
                assert all((array == 9).all() for array in arrays.values())
    finally:
        os.close(fd)


def test_decode_command_inverts_encode_command() -> None:
    for number, command, argument in (
        (0, ControlCommand.HOLD, 0),
        (3, ControlCommand.RESUME, 2**24 - 1),
    ):
        assert decode_command(encode_command(number, command, argument)) == (
            number,
            command,
            argument,
        )


def test_texts_are_cut_not_torn() -> None:
    view = np.full(8, 255, np.uint8)
    put_text(view, "short")
    assert get_text(view) == "short"
    put_text(view, "longer than that")
    assert get_text(view) == "longer t"
