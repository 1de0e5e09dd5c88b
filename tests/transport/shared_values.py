"""A latest value and a queue in one segment; values that show whether they are whole; deaths."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from transport.schema import ArraySpec, Schema
from transport.shm.latest_value import LatestValueReader, LatestValueWriter, latest_value_nbytes
from transport.shm.segment import MappedSegment, create_anonymous
from transport.shm.spsc_queue import QueueReader, QueueWriter, queue_nbytes

SCHEMA = Schema((ArraySpec("number", "int64", ()), ArraySpec("values", "int64", (500,))))
COUNT = 4
"""Length of the queue."""
SLOTS = 8
"""Of the latest value."""
QUEUE_OFFSET = latest_value_nbytes(SCHEMA, SLOTS)
NBYTES = QUEUE_OFFSET + queue_nbytes(SCHEMA, COUNT)


def create() -> int:
    return create_anonymous("test", NBYTES)


class Shared:
    """The segment, mapped."""

    def __init__(self, fd: int) -> None:
        self.memory = MappedSegment(fd, NBYTES, writable=True)
        self.seen = MappedSegment(fd, NBYTES, writable=False)

    def latest_writer(self) -> LatestValueWriter:
        return LatestValueWriter(self.memory, 0, SCHEMA, SLOTS)

    def latest_reader(self) -> LatestValueReader:
        return LatestValueReader(self.seen, 0, SCHEMA, SLOTS)

    def queue_writer(self) -> QueueWriter:
        return QueueWriter(self.memory, QUEUE_OFFSET, SCHEMA, COUNT)

    def queue_reader(self) -> QueueReader:
        return QueueReader(self.memory, QUEUE_OFFSET, SCHEMA, COUNT)

    def close(self) -> None:
        self.memory.close()
        self.seen.close()


def put(writer: LatestValueWriter | QueueWriter, number: int) -> bool:
    """Write ``number`` everywhere in the next value; False where there is no room."""
    arrays = writer.claim()
    if arrays is None:
        return False
    arrays["number"][...] = number
    arrays["values"][:] = number
    writer.publish()
    return True


def whole(arrays: Any) -> int:
    """The number in a value, which must be of one piece."""
    number = int(arrays["number"])
    assert (arrays["values"] == number).all()
    return number


class _Death(BaseException):
    pass


def die_after(lines: int, work: Callable[[], object]) -> bool:
    """Run ``work`` and end it after so many executed lines; whether it had not ended before."""
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
