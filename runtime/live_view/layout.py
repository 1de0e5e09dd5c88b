"""What a live view shows, and the shared memory through which it gets it.

One anonymous segment, whose descriptor the processes inherit, with a queue for each kind of
message: ``ticks``, ``states``, ``chunks``, ``texts``, and one per camera. A queue has one writer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from policies.types import STAGES
from policies.yaml_config import as_plain, parse_config
from transport.schema import ArraySpec, Schema
from transport.shm.atomics import CACHE_LINES, AtomicInt64
from transport.shm.segment import MappedSegment, create_anonymous
from transport.shm.spsc_queue import QueueReader, QueueWriter, queue_nbytes

TICKS, STATES, CHUNKS, TEXTS = "ticks", "states", "chunks", "texts"
TEXT_BYTES = 240
LENGTHS = {TICKS: 4096, STATES: 4096, CHUNKS: 64, TEXTS: 256}
PICTURES = 16
"""Length of a camera's queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveViewLayout:
    """What every message of one evaluation has in common.

    Attributes:
        title: Name of the recording.
        state_names: S names of the measured joints.
        action_names: A names of the commanded joints.
        cameras: Camera name to the largest (height, width) of its pictures, in pixels.
        chunk_size: Largest number of actions in a chunk.
        step_s: Seconds from one action of a chunk to the next.
        origin_ns: The time that is shown as 0, by the clock of the messages.
        keeps_all: Whether messages wait for a full queue instead of being dropped.
    """

    title: str
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    cameras: Mapping[str, tuple[int, int]]
    chunk_size: int
    step_s: float
    origin_ns: int
    keeps_all: bool

    def to_json(self) -> str:
        """Return the layout as one line of JSON."""
        return json.dumps(as_plain(self))

    @classmethod
    def from_json(cls, text: str) -> LiveViewLayout:
        """Read what ``to_json`` returned. Raises ``InvalidConfig``."""
        return parse_config(cls, json.loads(text), source="layout of the live view")

    def queues(self) -> dict[str, tuple[Schema, int]]:
        """Return each queue's schema and length. Times are int64, in ns."""
        state, action = (len(self.state_names),), (len(self.action_names),)
        chunk = (self.chunk_size, *action)
        queues = {
            TICKS: _schema(
                *_numbers("time_ns", "number", "attempt", "source"),
                ("lateness_s", "float64", ()),
                ("age_s", "float64", ()),
                ("command", "float32", action),
            ),
            STATES: _schema(*_numbers("time_ns"), ("state", "float32", state)),
            CHUNKS: _schema(
                *_numbers("time_ns", "first_ns", "count"),
                ("stages_ns", "int64", (len(STAGES),)),
                ("actions", "float32", chunk),
            ),
            TEXTS: _schema(*_numbers("time_ns"), ("text", "uint8", (TEXT_BYTES,))),
        }
        sized = {name: (schema, LENGTHS[name]) for name, schema in queues.items()}
        for name, (height, width) in self.cameras.items():
            pixels = ("pixels", "uint8", (height * width * 3,))
            picture = _schema(*_numbers("time_ns", "height", "width"), pixels)
            sized[camera_queue(name)] = (picture, PICTURES)
        return sized


def camera_queue(camera: str) -> str:
    """Return the name of a camera's queue."""
    return f"camera {camera}"


def _schema(*specs: tuple[str, str, tuple[int, ...]]) -> Schema:
    return Schema(tuple(ArraySpec(*spec) for spec in specs))


def _numbers(*names: str) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, "int64", ()) for name in names]


def segment_nbytes(layout: LiveViewLayout) -> int:
    """Return the segment's length in bytes."""
    return sum(CACHE_LINES + queue_nbytes(*queue) for queue in layout.queues().values())


def create_segment(layout: LiveViewLayout) -> int:
    """Create the segment and return its descriptor. Raises ``OSError``: too little memory."""
    return create_anonymous("metronome-live-view", segment_nbytes(layout))


class LiveViewSegment:
    """One process' mapping of the segment.

    Args:
        fd: The descriptor from ``create_segment``. The caller closes it.
        layout: As it was created with.

    Attributes:
        dropped: Messages of each queue that were dropped; the queue's writer counts them.

    Raises:
        ProtocolError: The segment has another size than ``layout`` requires.
    """

    def __init__(self, fd: int, layout: LiveViewLayout) -> None:
        self._memory = MappedSegment(fd, segment_nbytes(layout), writable=True)
        self._queues: dict[str, tuple[Any, ...]] = {}
        self.dropped: dict[str, AtomicInt64] = {}
        end = 0
        for name, (schema, count) in layout.queues().items():
            self.dropped[name] = AtomicInt64(self._memory, end)
            self._queues[name] = (end + CACHE_LINES, schema, count)
            end += CACHE_LINES + queue_nbytes(schema, count)

    def writers(self) -> dict[str, QueueWriter]:
        """Return the sending end of each queue; only one process may use it."""
        return {name: QueueWriter(self._memory, *queue) for name, queue in self._queues.items()}

    def readers(self) -> dict[str, QueueReader]:
        """Return the receiving end of each queue; only one process may use it."""
        return {name: QueueReader(self._memory, *queue) for name, queue in self._queues.items()}

    def close(self) -> None:
        """Unmap the segment. Idempotent."""
        self._memory.close()
