"""What the processes of a robot's evaluation share: one anonymous segment, inherited by descriptor.

Every cell and queue has one writer:

=============  =======================  ==================================================
control        -> sensing               ``progress``, ``joints``
control        -> parent                ``progress``, ``ticks``, ``accepted``, ``events``
control        -> guardian, successor   ``progress``, ``commands``
sensing        -> control, parent       ``senses``, ``chunks``
guardian       -> parent, control       ``watchdog_beat``
parent         -> control               ``order``
=============  =======================  ==================================================

The guardian takes over what control wrote only once control is dead, so there is one writer still.
The segment has no name: no death of anybody can leak it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.types import STAGES, ActionChunk
from runtime.eval_real.phases import Order
from runtime.eval_real.rollout_counts import COUNTED
from transport.channel import Arrays
from transport.schema import ArraySpec, Schema
from transport.shm.atomics import CACHE_LINES, AtomicInt64
from transport.shm.latest_value import LatestValueReader, LatestValueWriter, latest_value_nbytes
from transport.shm.segment import MappedSegment, create_anonymous
from transport.shm.spsc_queue import QueueReader, QueueWriter, queue_nbytes

TEXT_BYTES = 240
CHUNKS, ACCEPTED, JOINTS, TICKS, EVENTS = 16, 64, 256, 2048, 64
"""Lengths of the queues. ``TICKS`` is 4 s at 500 Hz: how long the parent may be held up."""


@dataclass(frozen=True, slots=True)
class Dims:
    """What the sizes in the segment follow from: lengths of state, action and chunk."""

    state: int
    action: int
    chunk: int


def _schema(*specs: tuple[str, str, tuple[int, ...]]) -> Schema:
    return Schema(tuple(ArraySpec(*spec) for spec in specs))


def _numbers(*names: str) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, "int64", ()) for name in names]


class SharedStateLayout:
    """Schemas and offsets, the same in every process that knows the ``Dims``."""

    def __init__(self, dims: Dims) -> None:
        state, action = (dims.state,), (dims.action,)
        chunk = (
            *_numbers("leg", "ask", "obs_timestep", "first_action_offset", "count", "t_capture_ns"),
            ("stages_ns", "int64", (len(STAGES),)),
            ("actions", "float32", (dims.chunk, dims.action)),
        )
        row = (
            *_numbers("row", "leg", "tick", "played", "phase", "signals", "advance", "source"),
            *_numbers("deadline_ns", "captured_ns", "stamp_ns", "received_ns"),
            *((name, "float64" if name == "seam_jump" else "int64", ()) for name in COUNTED),
            ("command", "float32", action),
            ("pose", "float32", action),
            ("state", "float32", state),
        )
        self.latest = {
            "progress": _schema(
                *_numbers("phase", "obeyed", "leg", "tick", "t0_ns", "ask", "dropped_rows"),
                ("fault", "uint8", (TEXT_BYTES,)),
            ),
            "commands": _schema(*row, ("velocity", "float64", action)),
            "senses": _schema(
                *_numbers("beat_ns", "frame_ns", "leg", "ask", "submitted", "obs_timestep"),
                *_numbers("server", "tells", "success", "steps"),
                ("reward", "float64", ()),
                ("fault", "uint8", (TEXT_BYTES,)),
            ),
        }
        self.queues = {
            "chunks": (_schema(*chunk), CHUNKS),
            "accepted": (_schema(*chunk, *_numbers("row", "arrived_ns")), ACCEPTED),
            "joints": (
                _schema(("position", "float32", state), *_numbers("stamp_ns", "received_ns")),
                JOINTS,
            ),
            "ticks": (_schema(*row, *_numbers("sent_ns")), TICKS),
            "events": (
                _schema(*_numbers("stamp_ns", "leg", "tick"), ("text", "uint8", (TEXT_BYTES,))),
                EVENTS,
            ),
        }
        self.offsets: dict[str, int] = {}
        end = 0
        for word in ("order", "guardian_beat"):
            self.offsets[word], end = end, end + CACHE_LINES
        for name, schema in self.latest.items():
            self.offsets[name], end = end, end + latest_value_nbytes(schema)
        for name, (schema, count) in self.queues.items():
            self.offsets[name], end = end, end + queue_nbytes(schema, count)
        self.nbytes = end


def create_segment(dims: Dims) -> int:
    """Descriptor of a segment for ``dims``, its memory reserved.

    Raises:
        OSError: There is not that much memory.
    """
    return create_anonymous("metronome-mailbox", SharedStateLayout(dims).nbytes)


class SharedState:
    """One process' view of the segment; ends are made as they are asked for.

    Args:
        fd: Of ``create_segment``; stays the caller's to close.
        dims: Those it was made with.

    Raises:
        ProtocolError: The segment is not of this size.
    """

    def __init__(self, fd: int, dims: Dims) -> None:
        self.dims = dims
        self._layout = SharedStateLayout(dims)
        self._memory = MappedSegment(fd, self._layout.nbytes, writable=True)
        self.order = AtomicInt64(self._memory, self._layout.offsets["order"])
        self.watchdog_beat = AtomicInt64(self._memory, self._layout.offsets["guardian_beat"])

    def latest_writer(self, name: str) -> LatestValueWriter:
        return LatestValueWriter(
            self._memory, self._layout.offsets[name], self._layout.latest[name]
        )

    def latest_reader(self, name: str) -> LatestValueReader:
        return LatestValueReader(
            self._memory, self._layout.offsets[name], self._layout.latest[name]
        )

    def queue_writer(self, name: str) -> QueueWriter:
        return QueueWriter(self._memory, self._layout.offsets[name], *self._layout.queues[name])

    def queue_reader(self, name: str) -> QueueReader:
        return QueueReader(self._memory, self._layout.offsets[name], *self._layout.queues[name])

    def close(self) -> None:
        """Unmap, once the last end is gone. Idempotent."""
        self._memory.close()

    def __enter__(self) -> SharedState:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def encode_order(number: int, order: Order, argument: int = 0) -> int:
    """One word: which order this is in the row, what is wanted, and a number with it."""
    return number << 32 | argument << 8 | order


def decode_order(word: int) -> tuple[int, Order, int]:
    """What ``encode_order`` put together."""
    return word >> 32, Order(word & 0xFF), word >> 8 & 0xFFFFFF


def put_text(view: NDArray[np.uint8], text: str) -> None:
    """Write ``text`` into a text field, cut to its length."""
    data = text.encode()[: view.size]
    view[: len(data)] = np.frombuffer(data, np.uint8)
    view[len(data) :] = 0


def get_text(view: NDArray[np.uint8]) -> str:
    return view.tobytes().rstrip(b"\0").decode(errors="replace")


def write_chunk(chunk: ActionChunk, attempt: int, ask: int, views: Arrays) -> None:
    """Copy ``chunk`` into a message of the mailbox."""
    count = len(chunk)
    views["actions"][:count] = chunk.actions
    views["actions"][count:] = 0
    views["leg"][...], views["ask"][...], views["count"][...] = attempt, ask, count
    views["obs_timestep"][...] = chunk.obs_timestep
    views["first_action_offset"][...] = chunk.first_action_offset
    views["t_capture_ns"][...] = chunk.t_capture_ns
    views["stages_ns"][:] = [chunk.stages_ns.get(stage, 0) for stage in STAGES]


def read_chunk(views: Arrays) -> ActionChunk:
    """The chunk in the mailbox, copied out of it."""
    count = int(views["count"])
    return ActionChunk(
        actions=views["actions"][:count].copy(),
        obs_timestep=int(views["obs_timestep"]),
        t_capture_ns=int(views["t_capture_ns"]),
        first_action_offset=int(views["first_action_offset"]),
        stages_ns={
            name: int(ns) for name, ns in zip(STAGES, views["stages_ns"], strict=True) if ns
        },
    )
