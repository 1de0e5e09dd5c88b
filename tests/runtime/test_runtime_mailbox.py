"""The memory that the processes of a robot's evaluation share: sizes, orders, texts."""

from __future__ import annotations

import os

import numpy as np
import pytest

from runtime.eval_real.phases import Order
from runtime.eval_real.shared_state import (
    Dims,
    SharedState,
    create_segment,
    decode_order,
    encode_order,
    get_text,
    put_text,
)
from transport.errors import ProtocolError


def test_a_segment_of_other_sizes_is_refused() -> None:
    fd = create_segment(Dims(14, 14, 100))
    try:
        with pytest.raises(ProtocolError, match=r"segment: got .* bytes, expected"):
            SharedState(fd, Dims(14, 14, 10_000))
    finally:
        os.close(fd)


def test_every_cell_and_queue_has_room_of_its_own() -> None:
    dims = Dims(state=3, action=2, chunk=5)
    fd = create_segment(dims)
    try:
        with SharedState(fd, dims) as box:
            box.order.store(1)
            box.watchdog_beat.store(2)
            for name in ("progress", "commands", "senses"):
                writer = box.latest_writer(name)
                for array in writer.claim().values():
                    array[...] = 7
                writer.publish()
            for name in ("chunks", "accepted", "joints", "ticks", "events"):
                queue = box.queue_writer(name)
                while (arrays := queue.claim()) is not None:
                    for array in arrays.values():
                        array[...] = 9
                    queue.publish()
            assert (box.order.load(), box.watchdog_beat.load()) == (1, 2)
            for name in ("progress", "commands", "senses"):
                reader = box.latest_reader(name)
                assert reader.refresh() and reader.sequence == 1
                assert all((array == 7).all() for array in reader.values.values())
            for name in ("chunks", "accepted", "joints", "ticks", "events"):
                arrays = box.queue_reader(name).peek()
                assert all((array == 9).all() for array in arrays.values())
    finally:
        os.close(fd)


def test_orders_come_back_as_they_were_given() -> None:
    for number, order, argument in ((0, Order.HOLD, 0), (3, Order.RESUME, 2**24 - 1)):
        assert decode_order(encode_order(number, order, argument)) == (number, order, argument)


def test_texts_are_cut_not_torn() -> None:
    view = np.full(8, 255, np.uint8)
    put_text(view, "short")
    assert get_text(view) == "short"
    put_text(view, "longer than that")
    assert get_text(view) == "longer t"
