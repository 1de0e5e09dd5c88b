"""The memory that a trace is recorded into: fixed-size records, the newest ones kept."""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

CAPACITY = 1 << 18
"""Records kept: 12 MiB, a quarter of an hour of a real-time evaluation at 50 Hz."""
RECORD = np.dtype(
    [
        ("begin_ns", "=i8"),
        ("end_ns", "=i8"),
        ("flow", "=u8"),
        ("number", "=i8"),
        ("value", "=i8"),
        ("name", "=u2"),
        ("kind", "=u1"),
        ("link", "=u1"),
        ("thread", "=u4"),
    ]
)
_pack_into = struct.Struct("=qqQqqHBBI").pack_into


class TraceError(Exception):
    """A trace that cannot be had, read or put together."""


class EventKind(IntEnum):
    """What a record is.

    SPAN: Time spent in one thread. TICK: the same, of a control loop; ``value`` is its lateness.
    REQUEST: A whole request. PART: of one, whoever's time it was. INSTANT: a moment; ``value``
    counts.
    """

    SPAN = 0
    TICK = 1
    REQUEST = 2
    PART = 3
    INSTANT = 4


class FlowPosition(IntEnum):
    """Where on a request's way a span is: an arrow is drawn from the first to the last."""

    NONE = 0
    FIRST = 1
    ON_THE_WAY = 2
    LAST = 3


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a trace held at its end.

    Attributes:
        process: What the process is called.
        records: (n,) of ``RECORD``, in the order in which they ended.
        names: By the records' ``name``.
        threads: Native id to name.
        dropped: Records that were overwritten, older than all of these.
    """

    process: str
    records: NDArray[np.void]
    names: tuple[str, ...]
    threads: Mapping[int, str]
    dropped: int


class Trace:
    """Records of one process. Any thread may add.

    Args:
        process: What the process is called.
        capacity: Records kept, the newest ones.
    """

    def __init__(self, process: str, capacity: int = CAPACITY) -> None:
        self._process, self._capacity = process, capacity
        self._records = np.zeros(capacity, RECORD)
        self._bytes: Any = self._records.view(np.uint8)
        self._bytes.fill(0)  # touched: a page fault is nobody's tick
        self._count = itertools.count()  # its next is one step under the GIL: no lock
        self._names: dict[str, int] = {}
        self._threads: dict[int, int] = {}
        self._thread_names: dict[int, str] = {}
        self._lock = threading.Lock()

    def add(
        self,
        name: str,
        begin_ns: int,
        end_ns: int,
        number: int = -1,
        *,
        value: int = 0,
        flow: int = 0,
        kind: EventKind = EventKind.SPAN,
        link: FlowPosition = FlowPosition.NONE,
    ) -> None:
        """Note that ``name`` lasted from ``begin_ns`` to ``end_ns`` (``time.monotonic_ns``).

        Args:
            number: Tick, request or the like; -1 for none.
            value: See ``Kind``.
            flow: Which request, in all processes; 0 for none.
            link: Where on its way.
        """
        number_of_name = self._names.get(name)
        if number_of_name is None:
            number_of_name = self._intern(name)
        thread = self._threads.get(threading.get_ident())
        if thread is None:
            thread = self._meet_thread()
        place = next(self._count) % self._capacity * RECORD.itemsize
        _pack_into(
            self._bytes,
            place,
            *(begin_ns, end_ns, flow, number, value, number_of_name, kind, link, thread),
        )

    def recorded(self) -> Recorded:
        """Everything so far; to be called once, at the end."""
        count = next(self._count)
        kept = self._records[:count]
        if count > self._capacity:
            kept = np.roll(self._records, -(count % self._capacity))
        return Recorded(
            self._process,
            kept,
            tuple(self._names),
            dict(self._thread_names),
            max(0, count - self._capacity),
        )

    def _intern(self, name: str) -> int:
        with self._lock:
            return self._names.setdefault(name, len(self._names))

    def _meet_thread(self) -> int:
        thread = threading.current_thread()
        native = threading.get_native_id()
        with self._lock:
            self._threads[threading.get_ident()] = native
            self._thread_names[native] = thread.name
        return native
