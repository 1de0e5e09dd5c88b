"""What a robot's owner shows to everyone on its host: joint states and pictures in one segment.

Each stream is a ring of slots with one writer. A slot carries its number last and first withdrawn;
a reader copies the newest slot and takes the copy only if the number was the same before and after.
Readers never wait and never disturb the writer. Relies on stores being seen in order, as x86 and
everything that emulates it does.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

JOINT_SLOTS, FRAME_SLOTS = 256, 4
PAGE = 4096
WATCHING = 0
"""In the head: how many connections look at pictures. With none, none are rendered."""
REFUSED_SINCE = 1
"""In the head: since when no command reaches the device, our monotonic clock in ns; or 0."""
FIRST_STREAM = 8
WORDS_PER_LINE = 8


class Stream:
    """One ring. ``slots`` have the fields ``number``, ``stamp_ns`` and ``received_ns``."""

    def __init__(self, count: NDArray[np.int64], slots: NDArray[Any]) -> None:
        self._count = count
        self._slots = slots
        self._numbers = slots["number"]
        self._stamps = slots["stamp_ns"]

    @property
    def count(self) -> int:
        """Slots published so far."""
        return int(self._count[0])

    def begin(self) -> Any:
        """The next slot, withdrawn from readers, to be filled in."""
        slot = self._slots[self.count % len(self._slots)]
        slot["number"] = -1
        return slot

    def publish(self, slot: Any) -> None:
        slot["number"] = self.count
        self._count[0] += 1

    def newest(self) -> Any | None:
        """A copy of the newest slot, None where there is none yet."""
        while (number := self.count - 1) >= 0:
            if (copy := self._take(number)) is not None:
                return copy
        return None

    def nearest(self, stamp_ns: int) -> Any | None:
        """A copy of the slot, of those still there, whose stamp is nearest."""
        while (newest := self.count - 1) >= 0:
            stamps = np.where(self._numbers >= 0, self._stamps, -(2**62))
            index = int(np.abs(stamps - stamp_ns).argmin())
            behind = (newest - index) % len(self._slots)
            if (copy := self._take(newest - behind)) is not None:
                return copy
        return None

    def _take(self, number: int) -> Any | None:
        index = number % len(self._slots)
        if self._numbers[index] != number:
            return None
        copy = self._slots[index].copy()
        return copy if self._numbers[index] == number else None


class SensorMemory:
    """The segment, mapped.

    Args:
        fd: Of a segment that ``create`` made. Stays the caller's.
        qpos: Length of a simulation's position vector, 0 without one.
        joints: S.
        cameras: Name to (height, width), in the segment's order.
        writable: Whether this process writes.

    Attributes:
        head: (512,) int64 words; see ``WATCHING``.
        joints: Slots with ``position`` (S,) float32, ``qpos`` (Q,) float64, and the outcome.
        cameras: Slots with ``image`` (H, W, 3) uint8.
    """

    def __init__(
        self,
        fd: int,
        *,
        qpos: int,
        joints: int,
        cameras: Mapping[str, tuple[int, int]],
        writable: bool,
    ) -> None:
        size = _size(qpos, joints, cameras)
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        memory = memoryview(mmap.mmap(fd, size, access=access))
        self.head = np.frombuffer(memory[:PAGE], np.int64)
        offset, word = PAGE, FIRST_STREAM

        def stream(kind: np.dtype[Any], slots: int) -> Stream:
            nonlocal offset, word
            end = offset + slots * kind.itemsize
            made = Stream(self.head[word : word + 1], np.frombuffer(memory[offset:end], kind))
            offset, word = end, word + WORDS_PER_LINE
            return made

        self.joints = stream(_joint_slot(qpos, joints), JOINT_SLOTS)
        self.cameras = {name: stream(_frame_slot(hw), FRAME_SLOTS) for name, hw in cameras.items()}

    @staticmethod
    def create(*, qpos: int, joints: int, cameras: Mapping[str, tuple[int, int]]) -> int:
        """The descriptor of a new segment, full of zeros. It has no name that could be left."""
        fd = os.memfd_create("metronome-robot")
        os.posix_fallocate(fd, 0, _size(qpos, joints, cameras))
        return fd


def _joint_slot(qpos: int, joints: int) -> np.dtype[Any]:
    return _slot(
        ("episode", np.int64),
        ("step", np.int64),
        ("success", np.int64),
        ("reward", np.float64),
        ("position", np.float32, (joints,)),
        ("qpos", np.float64, (qpos,)),
    )


def _frame_slot(hw: tuple[int, int]) -> np.dtype[Any]:
    return _slot(("image", np.uint8, (*hw, 3)))


def _slot(*fields: Any) -> np.dtype[Any]:
    head = [("number", np.int64), ("stamp_ns", np.int64), ("received_ns", np.int64)]
    packed = np.dtype([*head, *fields], align=True)
    lines = -(-packed.itemsize // 64) * 64
    padding = [("padding", np.uint8, (lines - packed.itemsize,))]
    return np.dtype([*head, *fields, *padding], align=True)


def _size(qpos: int, joints: int, cameras: Mapping[str, tuple[int, int]]) -> int:
    if FIRST_STREAM + WORDS_PER_LINE * (1 + len(cameras)) > PAGE // 8:
        raise ValueError(f"cameras: got {len(cameras)}, expected fewer")
    frames = sum(_frame_slot(hw).itemsize for hw in cameras.values())
    return PAGE + JOINT_SLOTS * _joint_slot(qpos, joints).itemsize + FRAME_SLOTS * frames
