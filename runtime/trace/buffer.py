"""The buffer of a trace: fixed-size records in memory, of which the newest are kept."""

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
"""Records kept: 12 MiB, about 15 minutes of a real-time evaluation at 50 Hz."""
RECORD = np.dtype(
    [
        ("begin_ns", "=i8"),
        ("end_ns", "=i8"),
        ("flow", "=u8"),
        ("number", "=i8"),
        ("value", "=i8"),
        ("name", "=u2"),
        ("kind", "=u1"),
        ("flow_position", "=u1"),
        ("thread", "=u4"),
    ]
)
_pack_into = struct.Struct("=qqQqqHBBI").pack_into


class TraceError(Exception):
    """A trace that cannot be recorded, read or merged."""


class EventKind(IntEnum):
    """The kind of a record.

    SPAN: Time spent in one thread. TICK: A SPAN of a control loop; ``value`` is its lateness in ns.
    REQUEST: A whole request. PART: One stage of a request, on either side. INSTANT: A point in
    time; ``value`` is a count.
    """

    SPAN = 0
    TICK = 1
    REQUEST = 2
    PART = 3
    INSTANT = 4


class FlowPosition(IntEnum):
    """The position of a span in a request's flow, which a viewer draws as an arrow."""

    NONE = 0
    FIRST = 1
    MIDDLE = 2
    LAST = 3


@dataclass(frozen=True, slots=True)
class TraceRecords:
    """The content of a ``TraceBuffer`` at the end of a trace.

    Attributes:
        process: The process' name in the viewer.
        records: (n,) of dtype ``RECORD``, in the order in which they ended.
        names: Names of the records; a record's ``name`` is an index into it.
        threads: Native thread id to name.
        dropped: Number of overwritten records, all older than ``records``.
    """

    process: str
    records: NDArray[np.void]
    names: tuple[str, ...]
    threads: Mapping[int, str]
    dropped: int


class TraceBuffer:
    """A ring buffer for the records of one process. Every thread may add to it.

    Args:
        process: The process' name in the viewer.
        capacity: Number of records kept.
    """

    def __init__(self, process: str, capacity: int = CAPACITY) -> None:
        self._process, self._capacity = process, capacity
        self._records = np.zeros(capacity, RECORD)
        self._bytes: Any = self._records.view(np.uint8)
        self._bytes.fill(0)  # page faults happen here, not during a tick
        self._count = itertools.count()  # ``next`` is atomic under the GIL: no lock
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
        position: FlowPosition = FlowPosition.NONE,
    ) -> None:
        """Record that ``name`` lasted from ``begin_ns`` to ``end_ns`` (``time.monotonic_ns``).

        Args:
            name: The span's name in the viewer.
            begin_ns, end_ns: Equal for an instant.
            number: Number of a tick, request or episode; -1 for none.
            value: See ``EventKind``.
            flow: The request's id in all processes; 0 for none.
            kind: What the record is.
            position: The span's position in the request's flow.
        """
        number_of_name = self._names.get(name)
        if number_of_name is None:
            number_of_name = self._intern(name)
        thread = self._threads.get(threading.get_ident())
        if thread is None:
            thread = self._register_thread()
        place = next(self._count) % self._capacity * RECORD.itemsize
        _pack_into(
            self._bytes,
            place,
            *(begin_ns, end_ns, flow, number, value, number_of_name, kind, position, thread),
        )

    def records(self) -> TraceRecords:
        """Return all records so far; call it once, at the end."""
        count = next(self._count)
        kept = self._records[:count]
        if count > self._capacity:
            kept = np.roll(self._records, -(count % self._capacity))
        return TraceRecords(
            self._process,
            kept,
            tuple(self._names),
            dict(self._thread_names),
            max(0, count - self._capacity),
        )

    def _intern(self, name: str) -> int:
        with self._lock:
            return self._names.setdefault(name, len(self._names))

    def _register_thread(self) -> int:
        thread = threading.current_thread()
        native = threading.get_native_id()
        with self._lock:
            self._threads[threading.get_ident()] = native
            self._thread_names[native] = thread.name
        return native
