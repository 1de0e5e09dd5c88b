"""What a robot's owner shows to everyone on its host: joint states and pictures in one segment.

Each sensor is a latest value of ``transport.shm.latest_value``, which keeps some values before the
newest one as well: one writer, readers that never wait and never disturb it.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingType
from dataclasses import dataclass

from transport.channel import Arrays
from transport.schema import ArraySpec, Schema
from transport.shm.atomics import CACHE_LINES, AtomicInt64
from transport.shm.latest_value import (
    LATEST_SLOTS,
    LatestValueReader,
    LatestValueWriter,
    latest_value_nbytes,
)
from transport.shm.segment import MappedSegment, create_anonymous

JOINT_SLOTS, FRAME_SLOTS = 256, LATEST_SLOTS


@dataclass(frozen=True, slots=True)
class Sample:
    """A copy of what a sensor showed.

    Attributes:
        sequence: Which value it is, counted from 1.
        stamp_ns: When it was measured.
        received_ns: When its owner had it; our monotonic clock.
        arrays: See ``Board``.
    """

    sequence: int
    stamp_ns: int
    received_ns: int
    arrays: Arrays


class SampleReader:
    """Reads the samples of one sensor."""

    def __init__(self, reader: LatestValueReader) -> None:
        self._reader = reader

    @property
    def count(self) -> int:
        """Samples published so far: the newest one's sequence."""
        return self._reader.newest

    def newest(self) -> Sample | None:
        """The newest sample, None where there is none yet."""
        return _sample(self._reader.read())

    def nearest(self, stamp_ns: int) -> Sample | None:
        """The sample, of those still there, whose stamp is nearest."""
        return _sample(self._reader.nearest("stamp_ns", stamp_ns))


class SensorMemory:
    """The segment, mapped.

    Args:
        fd: Of a segment that ``create`` made. Stays the caller's.
        qpos: Q, the length of a simulation's position vector; 0 without one.
        joints: S.
        cameras: Name to (height, width), in the segment's order.
        writable: Whether this process writes.

    Attributes:
        watchers: How many connections look at pictures. With none, none are rendered.
        refused_since_ns: Since when no command reaches the device, our monotonic clock; or 0.
        joints: Samples with ``position`` (S,) float32, ``qpos`` (Q,) float64 if there is one, and
            the outcome: ``episode``, ``step``, ``success`` and ``reward``.
        cameras: Samples with ``image`` (H, W, 3) uint8.

    Raises:
        ProtocolError: The segment was made for other lengths.
    """

    def __init__(
        self,
        fd: int,
        *,
        qpos: int,
        joints: int,
        cameras: MappingType[str, tuple[int, int]],
        writable: bool,
    ) -> None:
        self._layout = _Layout(qpos, joints, cameras)
        self._memory = MappedSegment(fd, self._layout.nbytes, writable=writable)
        self.watchers = AtomicInt64(self._memory, 0)
        self.refused_since_ns = AtomicInt64(self._memory, CACHE_LINES)
        self.joints = self._reader(self._layout.joints)
        self.cameras = {name: self._reader(at) for name, at in self._layout.cameras.items()}

    @staticmethod
    def create(*, qpos: int, joints: int, cameras: MappingType[str, tuple[int, int]]) -> int:
        """The descriptor of a new segment, full of zeros. It has no name that could be left."""
        return create_anonymous("metronome-robot", _Layout(qpos, joints, cameras).nbytes)

    def joint_writer(self) -> LatestValueWriter:
        """For the one who writes the joints; each value with ``stamp_ns`` and ``received_ns``."""
        return self._writer(self._layout.joints)

    def camera_writer(self, name: str) -> LatestValueWriter:
        """As ``joint_writer``, of one camera."""
        return self._writer(self._layout.cameras[name])

    def close(self) -> None:
        """Unmap, once the last reader and writer is gone. Idempotent."""
        self._memory.close()

    def _writer(self, place: _Place) -> LatestValueWriter:
        return LatestValueWriter(self._memory, place.offset, place.schema, place.slots)

    def _reader(self, place: _Place) -> SampleReader:
        return SampleReader(
            LatestValueReader(self._memory, place.offset, place.schema, place.slots)
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one sensor's samples are."""

    offset: int
    schema: Schema
    slots: int


class _Layout:
    """Where everything is, the same in every process that knows the lengths."""

    def __init__(self, qpos: int, joints: int, cameras: MappingType[str, tuple[int, int]]) -> None:
        self.nbytes = 2 * CACHE_LINES
        self.joints = self._add(JOINT_SLOTS, *_joint_arrays(qpos, joints))
        self.cameras = {
            name: self._add(FRAME_SLOTS, ArraySpec("image", "uint8", (*hw, 3)))
            for name, hw in cameras.items()
        }

    def _add(self, slots: int, *arrays: ArraySpec) -> _Place:
        stamps = ArraySpec("stamp_ns", "int64", ()), ArraySpec("received_ns", "int64", ())
        place = _Place(self.nbytes, Schema((*stamps, *arrays)), slots)
        self.nbytes += latest_value_nbytes(place.schema, slots)
        return place


def _joint_arrays(qpos: int, joints: int) -> list[ArraySpec]:
    arrays = [ArraySpec(name, "int64", ()) for name in ("episode", "step", "success")]
    arrays += ArraySpec("reward", "float64", ()), ArraySpec("position", "float32", (joints,))
    return [*arrays, ArraySpec("qpos", "float64", (qpos,))] if qpos else arrays


def _sample(found: tuple[int, Arrays] | None) -> Sample | None:
    if found is None:
        return None
    sequence, arrays = found
    return Sample(sequence, int(arrays["stamp_ns"]), int(arrays["received_ns"]), arrays)
