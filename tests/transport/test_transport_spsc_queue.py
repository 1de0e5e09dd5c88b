"""The queue: every value once and in order, also after a writer or reader was replaced."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st
from shared_values import COUNT, Shared, create, die_after, put, whole


def make_shared() -> Shared:
    fd = create()
    shared = Shared(fd)
    os.close(fd)
    return shared


@given(st.lists(st.sampled_from(["put", "take", "new writer", "new reader"]), max_size=60))
def test_values_arrive_once_and_in_order_after_replacements(steps: list[str]) -> None:
    shared = make_shared()
    writer, reader = shared.queue_writer(), shared.queue_reader()
    model: list[int] = []
    for number, step in enumerate(steps):
        if step == "put":
            accepted = put(writer, number)
            assert accepted == (len(model) < COUNT)
            model += [number] if accepted else []
        elif step == "take":
            arrays = reader.peek()
            assert (arrays is not None) == bool(model)
            if arrays is not None:
                assert whole(arrays) == model.pop(0)
                reader.release()
        elif step == "new writer":
            writer = shared.queue_writer()
        else:
            reader = shared.queue_reader()
    shared.close()


def test_full_queue_counts_refused_values() -> None:
    shared = make_shared()
    writer, reader = shared.queue_writer(), shared.queue_reader()
    for number in range(COUNT):
        assert put(writer, number)
    assert not put(writer, COUNT)
    assert (writer.refused, writer.published) == (1, COUNT)
    assert reader.peek() is not None
    reader.release()
    assert put(writer, COUNT)
    shared.close()


def test_a_death_between_any_two_lines_shows_nothing_half_done() -> None:
    shared = make_shared()
    reader = shared.queue_reader()

    def newest() -> int:
        last = -1
        while (arrays := reader.peek()) is not None:
            last = whole(arrays)
            reader.release()
        return last

    lines, died = 0, True
    while died:
        writer = shared.queue_writer()
        died = die_after(lines, lambda writer=writer: put(writer, 100))
        assert newest() in (-1, 100)
        put(shared.queue_writer(), 1)  # the successor
        assert newest() == 1
        lines += 1
    assert lines > 5
    shared.close()
