"""Writes the pictures of a rollout to disk while it runs, without delaying the sensing loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from robots.base import CameraSample
from runtime.datasets.spooled_episode import PictureSpool
from transport.child_process import send_event

MOST_WAITING = 64
"""Pictures that wait for the disk; beyond it they are dropped, and counted."""


class NewPictures:
    """Finds the pictures that were not there before.

    Args:
        cameras: Names of the cameras that count.
    """

    def __init__(self, cameras: Iterable[str]) -> None:
        self._cameras = tuple(cameras)
        self._seen: dict[str, int] = {}

    def among(self, frames: Mapping[str, CameraSample]) -> Iterator[tuple[str, CameraSample]]:
        """Yield each new picture with its camera's name."""
        for name in self._cameras:
            sample = frames.get(name)
            if sample is not None and self._seen.get(name) != sample.received_ns:
                self._seen[name] = sample.received_ns
                yield name, sample


class PictureSpooler:
    """A ``PictureSpool`` that a thread fills.

    Args:
        folder: The spool's.
        cameras: Camera name to (height, width) in pixels.
    """

    def __init__(self, folder: Path, cameras: Mapping[str, tuple[int, int]]) -> None:
        self._folder, self._cameras = folder, cameras
        self._waiting: queue.Queue[tuple[str, CameraSample] | None] = queue.Queue(MOST_WAITING)
        self._new = NewPictures(cameras)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="picture spool", daemon=True)
        self._thread.start()

    def add(self, frames: Mapping[str, CameraSample]) -> None:
        """Write each picture that is new. Never waits."""
        for name, sample in self._new.among(frames):
            try:
                self._waiting.put_nowait((name, sample))
            except queue.Full:
                self._dropped += 1

    def close(self) -> None:
        """Have the thread finish, which sends the event ``spooled``, or its problem; returns soon.

        A full queue is waited for: the arm is at rest.
        """
        self._waiting.put(None)

    def _write(self) -> None:
        problem = ""
        try:
            spool = PictureSpool(self._folder, self._cameras)
            try:
                while (item := self._waiting.get()) is not None:
                    name, sample = item
                    spool.add(name, sample.image, sample.received_ns)
            finally:
                spool.close()
        except (OSError, ValueError) as error:
            problem = str(error)
            while self._waiting.get() is not None:
                continue
        send_event("spooled", dropped=self._dropped, problem=problem)
