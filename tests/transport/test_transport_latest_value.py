"""The latest value: whole values only, wherever the writer dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shared_values import SLOTS, Shared, create, die_after, put, whole

from transport.shm.spsc_queue import QueueReader

WRITER = Path(__file__).with_name("value_writer.py")


@pytest.fixture
def shared() -> Iterator[Shared]:
    fd = create()
    shared = Shared(fd)
    os.close(fd)
    yield shared
    shared.close()


def test_reader_gets_only_the_latest_value(shared: Shared) -> None:
    writer, reader = shared.latest_writer(), shared.latest_reader()
    assert not reader.refresh()
    assert reader.read() is None
    assert reader.sequence == reader.newest == 0
    for last in (1, 2, 9, 30):
        for number in range(last - 1, last + 1):
            put(writer, number)
        assert reader.refresh()
        assert whole(reader.values) == last
        assert not reader.refresh()
        sequence, arrays = reader.read()
        assert whole(arrays) == last
        assert sequence == reader.newest == reader.sequence


def test_copied_value_does_not_change(shared: Shared) -> None:
    writer, reader = shared.latest_writer(), shared.latest_reader()
    put(writer, 1)
    _, first = reader.read()
    for number in range(2, 20):
        put(writer, number)
    _, last = reader.read()
    assert (whole(first), whole(last)) == (1, 19)


def test_a_reader_is_not_disturbed_by_what_is_being_written(shared: Shared) -> None:
    writer, reader = shared.latest_writer(), shared.latest_reader()
    put(writer, 5)
    writer.claim()["values"][:] = 6
    assert reader.refresh()
    assert whole(reader.values) == 5


@pytest.mark.parametrize("published", [1, 2, SLOTS - 1, SLOTS, SLOTS + 1, 5 * SLOTS + 3])
def test_the_nearest_value_of_those_still_there(shared: Shared, published: int) -> None:
    """One slot is being written, so one value fewer than there are slots is there."""
    writer, reader = shared.latest_writer(), shared.latest_reader()
    assert reader.nearest("number", 0) is None
    for number in range(1, published + 1):
        put(writer, 10 * number)
    writer.claim()["number"][...] = 3  # not published, so never the nearest
    oldest = max(1, published - (SLOTS - 2))
    for wanted, expected in (
        (0, oldest),
        (10 * oldest + 4, oldest),
        (10 * published - 4, published),
        (10 * published + 99, published),
    ):
        sequence, arrays = reader.nearest("number", wanted)
        assert (sequence, whole(arrays)) == (expected, 10 * expected)


def test_a_value_that_is_overwritten_while_it_is_copied_is_read_again(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer goes round once between the copy and the look at its counter."""
    from transport.shm import latest_value

    writer, reader = shared.latest_writer(), shared.latest_reader()
    numbers = iter(range(2, 2 + SLOTS))
    put(writer, 1)
    fence = latest_value.full_fence

    def held_up() -> None:
        monkeypatch.setattr(latest_value, "full_fence", fence)
        for number in numbers:
            put(writer, number)
        fence()

    monkeypatch.setattr(latest_value, "full_fence", held_up)
    sequence, arrays = reader.read()
    assert (sequence, whole(arrays)) == (1 + SLOTS, 1 + SLOTS)


def test_a_death_between_any_two_lines_shows_nothing_half_done(shared: Shared) -> None:
    reader = shared.latest_reader()

    def newest() -> int:
        reader.refresh()
        return whole(reader.values)

    put(shared.latest_writer(), 1)
    assert newest() == 1
    lines, died = 0, True
    while died:
        writer = shared.latest_writer()
        died = die_after(lines, lambda writer=writer: put(writer, 100))
        assert newest() in (1, 100)
        put(shared.latest_writer(), 1)  # the successor
        assert newest() == 1
        lines += 1
    assert lines > 5


def test_kill_9_of_a_writer_at_full_speed() -> None:
    """A real process writes as fast as it can; killed anywhere, its successor goes on."""
    fd = create()
    rng = random.Random(0)
    shared = Shared(fd)
    try:
        latest, queue = shared.latest_reader(), shared.queue_reader()
        seen = 0
        for _ in range(2):
            process = subprocess.Popen([sys.executable, str(WRITER), str(fd)], pass_fds=[fd])
            target = seen + rng.randrange(50, 1000)
            while seen < target:
                assert process.poll() is None
                seen = _drain(queue, seen)
                if latest.refresh():
                    whole(latest.values)
                if (found := latest.nearest("number", seen - 3)) is not None:
                    whole(found[1])
            process.send_signal(signal.SIGKILL)
            process.wait()
            seen = _drain(queue, seen)
    finally:
        os.close(fd)
        shared.close()


def _drain(queue: QueueReader, seen: int) -> int:
    """Take what is there: every number once, in order."""
    while (arrays := queue.peek()) is not None:
        number = whole(arrays)
        assert number == seen + 1
        queue.release()
        seen = number
    return seen
