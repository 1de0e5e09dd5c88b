"""Shared memory in which the owner process of a robot publishes joint states and images.

Each sensor is a latest value of ``transport.shm.latest_value``, which also keeps some older values.
It has one writer. Readers never wait and never delay the writer.
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
JOINTS = "joints"
"""Name of the sensor that measures the joints, beside the cameras' names."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A copy of one sample of a sensor.

    Attributes:
        sequence: Number of the sample, from 1.
        stamp_ns: When it was measured, by the sensor's clock.
        received_ns: When the owner received it, by this host's monotonic clock.
        arrays: Its values; see ``SensorMemory``.
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
        """Number of samples published so far: ``sequence`` of the newest one."""
        return self._reader.newest

    def newest(self) -> Sample | None:
        """The newest sample; None before the first."""
        return _sample(self._reader.read())

    def nearest(self, stamp_ns: int) -> Sample | None:
        """The kept sample whose stamp is nearest to ``stamp_ns``; None before the first."""
        return _sample(self._reader.nearest("stamp_ns", stamp_ns))


class SensorMemory:
    """The shared-memory segment, mapped into this process.

    Args:
        fd: File descriptor from ``create``. The caller keeps it and closes it.
        qpos: Q, the length of a simulation's position vector; 0 without one.
        joints: S, the number of measured joints.
        cameras: Name to (height, width), in the segment's order.
        writable: Whether this process writes.

    Attributes:
        camera_clients: Number of connections that read cameras. With 0, no images are rendered.
        refused_since_ns: Since when no command reaches the device, by this host's monotonic clock;
            0 while commands reach it.
        fault_until_ns: A sensor's name (``JOINTS``, or a camera) to when its last fault ends, by
            this host's monotonic clock; 0 before the first fault.
        joints: Samples with ``position`` (S,) float32, ``qpos`` (Q,) float64 if Q > 0, and the
            outcome: ``episode``, ``step``, ``success`` and ``reward``.
        cameras: Camera's name to samples with ``image`` (H, W, 3) uint8.

    Raises:
        ProtocolError: The segment was created for other lengths.
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
        self.camera_clients = AtomicInt64(self._memory, 0)
        self.refused_since_ns = AtomicInt64(self._memory, CACHE_LINES)
        self.fault_until_ns = {
            name: AtomicInt64(self._memory, offset)
            for name, offset in self._layout.fault_offsets.items()
        }
        self.joints = self._reader(self._layout.joints)
        self.cameras = {name: self._reader(region) for name, region in self._layout.cameras.items()}

    @staticmethod
    def create(*, qpos: int, joints: int, cameras: MappingType[str, tuple[int, int]]) -> int:
        """Create a segment of zeros and return its file descriptor. It has no name to leak."""
        return create_anonymous("metronome-robot", _Layout(qpos, joints, cameras).nbytes)

    def joint_writer(self) -> LatestValueWriter:
        """The writer of joint states; each also needs ``stamp_ns`` and ``received_ns``."""
        return self._writer(self._layout.joints)

    def camera_writer(self, name: str) -> LatestValueWriter:
        """The writer of one camera's images; see ``joint_writer``."""
        return self._writer(self._layout.cameras[name])

    def close(self) -> None:
        """Unmap the segment once its last reader and writer are deleted. Idempotent."""
        self._memory.close()

    def _writer(self, region: _Region) -> LatestValueWriter:
        return LatestValueWriter(self._memory, region.offset, region.schema, region.slots)

    def _reader(self, region: _Region) -> SampleReader:
        return SampleReader(
            LatestValueReader(self._memory, region.offset, region.schema, region.slots)
        )


@dataclass(frozen=True, slots=True)
class _Region:
    """The part of the segment with one sensor's samples."""

    offset: int
    schema: Schema
    slots: int


class _Layout:
    """The regions of a segment. They follow from the lengths alone, in every process."""

    def __init__(self, qpos: int, joints: int, cameras: MappingType[str, tuple[int, int]]) -> None:
        self.nbytes = 2 * CACHE_LINES
        self.fault_offsets: dict[str, int] = {}
        for name in (JOINTS, *cameras):
            self.fault_offsets[name] = self.nbytes
            self.nbytes += CACHE_LINES
        self.joints = self._add(JOINT_SLOTS, *_joint_arrays(qpos, joints))
        self.cameras = {
            name: self._add(FRAME_SLOTS, ArraySpec("image", "uint8", (*hw, 3)))
            for name, hw in cameras.items()
        }

    def _add(self, slots: int, *arrays: ArraySpec) -> _Region:
        stamps = ArraySpec("stamp_ns", "int64", ()), ArraySpec("received_ns", "int64", ())
        region = _Region(self.nbytes, Schema((*stamps, *arrays)), slots)
        self.nbytes += latest_value_nbytes(region.schema, slots)
        return region


def _joint_arrays(qpos: int, joints: int) -> list[ArraySpec]:
    arrays = [ArraySpec(name, "int64", ()) for name in ("episode", "step", "success")]
    arrays += ArraySpec("reward", "float64", ()), ArraySpec("position", "float32", (joints,))
    return [*arrays, ArraySpec("qpos", "float64", (qpos,))] if qpos else arrays


def _sample(value: tuple[int, Arrays] | None) -> Sample | None:
    if value is None:
        return None
    sequence, arrays = value
    return Sample(sequence, int(arrays["stamp_ns"]), int(arrays["received_ns"]), arrays)
