"""Shared cells and queues: whole values only, wherever the writer dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.eval_real.phases import Order
from runtime.eval_real.shared_state import (
    Dims,
    SharedState,
    create_segment,
    decode_order,
    encode_order,
)
from transport.schema import ArraySpec, Schema
from transport.shm.latest_value import (
    LATEST_SLOTS,
    LINE,
    AtomicInt64,
    LatestReader,
    LatestWriter,
    QueueReader,
    QueueWriter,
    slots_nbytes,
)
from transport.shm.segment import Mapping

SCHEMA = Schema((ArraySpec("number", "int64", ()), ArraySpec("values", "int64", (500,))))
COUNT = 4
WRITER = Path(__file__).with_name("cell_writer.py")


@pytest.fixture
def memory() -> Iterator[Mapping]:
    fd = os.memfd_create("test")
    os.ftruncate(fd, LINE + slots_nbytes(SCHEMA, max(COUNT, LATEST_SLOTS)))
    mapping = Mapping(fd, os.fstat(fd).st_size, writable=True)
    os.close(fd)
    yield mapping
    mapping.close()


def put(writer: LatestWriter | QueueWriter, number: int) -> bool:
    views = writer.claim()
    if views is None:
        return False
    views["number"][...] = number
    views["values"][:] = number
    writer.publish()
    return True


def whole(values: Any) -> int:
    """The number in a value, which must be of one piece."""
    number = int(values["number"])
    assert (values["values"] == number).all()
    return number


def test_a_word_keeps_its_value(memory: Mapping) -> None:
    AtomicInt64(memory, 0).store(-7)
    assert AtomicInt64(memory, 0).load() == -7


def test_the_latest_value_and_only_that(memory: Mapping) -> None:
    writer, reader = LatestWriter(memory, LINE, SCHEMA), LatestReader(memory, LINE, SCHEMA)
    assert not reader.refresh()
    assert reader.sequence == 0
    for last in (1, 2, 9, 30):
        for number in range(last - 1, last + 1):
            put(writer, number)
        assert reader.refresh()
        assert whole(reader.values) == last
        assert not reader.refresh()


def test_a_reader_is_not_disturbed_by_what_is_being_written(memory: Mapping) -> None:
    writer, reader = LatestWriter(memory, LINE, SCHEMA), LatestReader(memory, LINE, SCHEMA)
    put(writer, 5)
    writer.claim()["values"][:] = 6
    assert reader.refresh()
    assert whole(reader.values) == 5


@given(st.lists(st.sampled_from(["put", "take", "new writer", "new reader"]), max_size=60))
def test_a_queue_is_a_queue_whoever_is_replaced(steps: list[str]) -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, slots_nbytes(SCHEMA, COUNT))
    memory = Mapping(fd, os.fstat(fd).st_size, writable=True)
    os.close(fd)
    writer, reader = (kind(memory, 0, SCHEMA, COUNT) for kind in (QueueWriter, QueueReader))
    model: list[int] = []
    for number, step in enumerate(steps):
        if step == "put":
            accepted = put(writer, number)
            assert accepted == (len(model) < COUNT)
            model += [number] if accepted else []
        elif step == "take":
            views = reader.peek()
            assert (views is not None) == bool(model)
            if views is not None:
                assert whole(views) == model.pop(0)
                reader.release()
        elif step == "new writer":
            writer = QueueWriter(memory, 0, SCHEMA, COUNT)
        else:
            reader = QueueReader(memory, 0, SCHEMA, COUNT)
    del writer, reader
    memory.close()


class _Death(BaseException):
    pass


def die_after(lines: int, work: Callable[[], object]) -> bool:
    """Run ``work`` and end it after so many executed lines; whether it got that far."""
    left = lines

    def trace(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left < 0:
                raise _Death
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except _Death:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("kind", ["latest", "queue"])
def test_a_death_between_any_two_lines_shows_nothing_half_done(memory: Mapping, kind: str) -> None:
    def new_writer() -> LatestWriter | QueueWriter:
        if kind == "latest":
            return LatestWriter(memory, LINE, SCHEMA)
        return QueueWriter(memory, LINE, SCHEMA, COUNT)

    reader: Any = (
        LatestReader(memory, LINE, SCHEMA)
        if kind == "latest"
        else QueueReader(memory, LINE, SCHEMA, COUNT)
    )

    def newest() -> int:
        if isinstance(reader, LatestReader):
            reader.refresh()
            return whole(reader.values)
        last = -1
        while (views := reader.peek()) is not None:
            last = whole(views)
            reader.release()
        return last

    put(new_writer(), 1)
    assert newest() == 1
    lines, died = 0, True
    while died:
        writer = new_writer()
        died = die_after(lines, lambda writer=writer: put(writer, 100))
        assert newest() in ({1, 100} if kind == "latest" else {-1, 100})
        put(new_writer(), 1)  # the successor
        assert newest() == 1
        lines += 1
    assert lines > 5


def test_kill_9_of_a_writer_at_full_speed() -> None:
    """A real process writes as fast as it can; killed anywhere, its successor goes on."""
    dims = Dims(state=500, action=3, chunk=5)
    fd = create_segment(dims)
    rng = random.Random(0)
    try:
        with SharedState(fd, dims) as box:
            latest, queue = box.latest_reader("commands"), box.queue_reader("joints")
            seen = 0
            for _ in range(2):
                process = subprocess.Popen([sys.executable, str(WRITER), str(fd)], pass_fds=[fd])
                target = seen + rng.randrange(50, 1000)
                while seen < target:
                    assert process.poll() is None
                    seen = _drain(queue, seen)
                    if latest.refresh():
                        assert (latest.values["velocity"] == latest.values["tick"]).all()
                process.send_signal(signal.SIGKILL)
                process.wait()
                seen = _drain(queue, seen)
            del latest, queue
    finally:
        os.close(fd)


def _drain(queue: QueueReader, seen: int) -> int:
    """Take what is there: every number once, in order."""
    while (views := queue.peek()) is not None:
        number = int(views["stamp_ns"])
        assert number == seen + 1
        assert (views["position"] == number).all()
        queue.release()
        seen = number
    return seen


def test_a_segment_of_other_sizes_is_refused() -> None:
    fd = create_segment(Dims(14, 14, 100))
    try:
        with pytest.raises(ValueError, match=r"mailbox: got .* bytes, expected"):
            SharedState(fd, Dims(14, 14, 10_000))
    finally:
        os.close(fd)


def test_orders_come_back_as_they_were_given() -> None:
    for number, order, argument in ((0, Order.HOLD, 0), (3, Order.RESUME, 2**24 - 1)):
        assert decode_order(encode_order(number, order, argument)) == (number, order, argument)


def test_texts_are_cut_not_torn(memory: Mapping) -> None:
    from runtime.eval_real.shared_state import get_text, put_text

    view = np.full(8, 255, np.uint8)
    put_text(view, "short")
    assert get_text(view) == "short"
    put_text(view, "longer than that")
    assert get_text(view) == "longer t"
