"""The shared memory of the processes of a robot evaluation: one anonymous segment.

The processes inherit its file descriptor. Every integer, latest value and queue has one writer:

========  ======================  ==================================================
writer    readers                 fields
========  ======================  ==================================================
control   sensing                 ``progress``, ``joints``
control   parent                  ``progress``, ``ticks``, ``accepted``, ``events``
control   watchdog, successor     ``progress``, ``commands``
sensing   control, parent         ``sensing``, ``chunks``
watchdog  parent, control         ``watchdog_heartbeat``
parent    control                 ``control_command``
========  ======================  ==================================================

The watchdog writes control's fields only after control has died, so there is still one writer.
The segment has no name, so no process that dies can leak it.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.types import STAGES, ActionChunk
from runtime.eval_real.control_enums import ControlCommand
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
    """Lengths of state, action and chunk, which determine the sizes in the segment."""

    state: int
    action: int
    chunk: int


def _schema(*specs: tuple[str, str, tuple[int, ...]]) -> Schema:
    return Schema(tuple(ArraySpec(*spec) for spec in specs))


def _numbers(*names: str) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, "int64", ()) for name in names]


class SharedStateLayout:
    """Schemas and offsets of the fields; the same in every process that has the same ``Dims``."""

    def __init__(self, dims: Dims) -> None:
        state, action = (dims.state,), (dims.action,)
        chunk = (
            *_numbers(
                "attempt",
                "request_seq",
                "obs_timestep",
                "first_action_offset",
                "count",
                "t_capture_ns",
            ),
            ("stages_ns", "int64", (len(STAGES),)),
            ("actions", "float32", (dims.chunk, dims.action)),
        )
        row = (
            *_numbers("row", "attempt", "tick", "played", "phase", "signals", "advance", "source"),
            *_numbers("deadline_ns", "captured_ns", "stamp_ns", "received_ns"),
            *((name, "float64" if name == "seam_jump" else "int64", ()) for name in COUNTED),
            ("command", "float32", action),
            ("pose", "float32", action),
            ("state", "float32", state),
        )
        self.latest = {
            "progress": _schema(
                *_numbers(
                    "phase",
                    "acked_command",
                    "attempt",
                    "tick",
                    "t0_ns",
                    "request_seq",
                    "dropped_rows",
                ),
                ("fault", "uint8", (TEXT_BYTES,)),
            ),
            "commands": _schema(*row, ("velocity", "float64", action)),
            "sensing": _schema(
                *_numbers(
                    "heartbeat_ns",
                    "frame_ns",
                    "attempt",
                    "request_seq",
                    "submitted",
                    "obs_timestep",
                ),
                *_numbers("server", "reports_outcome", "success", "steps"),
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
                _schema(*_numbers("stamp_ns", "attempt", "tick"), ("text", "uint8", (TEXT_BYTES,))),
                EVENTS,
            ),
        }
        self.offsets: dict[str, int] = {}
        end = 0
        for name in ("control_command", "watchdog_heartbeat"):
            self.offsets[name], end = end, end + CACHE_LINES
        for name, schema in self.latest.items():
            self.offsets[name], end = end, end + latest_value_nbytes(schema)
        for name, (schema, count) in self.queues.items():
            self.offsets[name], end = end, end + queue_nbytes(schema, count)
        self.nbytes = end


def create_segment(dims: Dims) -> int:
    """Create a segment for ``dims`` and reserve its memory. Returns the file descriptor.

    Raises:
        OSError: There is not enough memory.
    """
    return create_anonymous("metronome-eval-real", SharedStateLayout(dims).nbytes)


class SharedState:
    """One process' mapping of the segment; makes readers and writers of its fields on request.

    Args:
        fd: The descriptor from ``create_segment``. The caller closes it.
        dims: The dimensions that the segment was created with.

    Attributes:
        control_command: The parent's newest command, see ``encode_command``.
        watchdog_heartbeat: Monotonic time in ns at which the watchdog last ran.

    Raises:
        ProtocolError: The segment has another size than ``dims`` requires.
    """

    def __init__(self, fd: int, dims: Dims) -> None:
        self.dims = dims
        self._layout = SharedStateLayout(dims)
        self._memory = MappedSegment(fd, self._layout.nbytes, writable=True)
        self.control_command = AtomicInt64(self._memory, self._layout.offsets["control_command"])
        self.watchdog_heartbeat = AtomicInt64(
            self._memory, self._layout.offsets["watchdog_heartbeat"]
        )

    def latest_writer(self, name: str) -> LatestValueWriter:
        """The writer of the latest value ``name``; raises ``KeyError`` for an unknown name."""
        return LatestValueWriter(
            self._memory, self._layout.offsets[name], self._layout.latest[name]
        )

    def latest_reader(self, name: str) -> LatestValueReader:
        """A reader of the latest value ``name``; raises ``KeyError`` for an unknown name."""
        return LatestValueReader(
            self._memory, self._layout.offsets[name], self._layout.latest[name]
        )

    def queue_writer(self, name: str) -> QueueWriter:
        """The writer of the queue ``name``; raises ``KeyError`` for an unknown name."""
        return QueueWriter(self._memory, self._layout.offsets[name], *self._layout.queues[name])

    def queue_reader(self, name: str) -> QueueReader:
        """The reader of the queue ``name``; raises ``KeyError`` for an unknown name."""
        return QueueReader(self._memory, self._layout.offsets[name], *self._layout.queues[name])

    def close(self) -> None:
        """Unmap the segment, once the last reader and writer are gone. Idempotent."""
        self._memory.close()

    def __enter__(self) -> SharedState:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def encode_command(number: int, command: ControlCommand, argument: int = 0) -> int:
    """Pack a command into 64 bits.

    Args:
        number: Sequence number of the command, below 2**31.
        command: What control is to do.
        argument: 24 bits; the seed of ``START``.
    """
    return number << 32 | argument << 8 | command


def decode_command(word: int) -> tuple[int, ControlCommand, int]:
    """(number, command, argument), the inverse of ``encode_command``."""
    return word >> 32, ControlCommand(word & 0xFF), word >> 8 & 0xFFFFFF


def write_chunk(chunk: ActionChunk, attempt: int, request_seq: int, views: Arrays) -> None:
    """Copy ``chunk`` into ``views``, a claimed message of the queue ``chunks``.

    Args:
        attempt, request_seq: The attempt and the request of control that it answers.
    """
    count = len(chunk)
    views["actions"][:count] = chunk.actions
    views["actions"][count:] = 0
    views["attempt"][...], views["request_seq"][...] = attempt, request_seq
    views["count"][...] = count
    views["obs_timestep"][...] = chunk.obs_timestep
    views["first_action_offset"][...] = chunk.first_action_offset
    views["t_capture_ns"][...] = chunk.t_capture_ns
    views["stages_ns"][:] = [chunk.stages_ns.get(stage, 0) for stage in STAGES]


def read_chunk(views: Arrays) -> ActionChunk:
    """The chunk in ``views``, a message of the queue ``chunks``, copied."""
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
