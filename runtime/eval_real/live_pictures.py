"""Sends a robot's pictures to a live view, from the sensing process."""

from __future__ import annotations

import os
from collections.abc import Mapping

from robots.base import CameraSample
from runtime.eval_real.picture_spooler import NewPictures
from runtime.live_view.layout import LiveViewLayout
from runtime.live_view.live_view_writer import LiveViewWriter

LAST_WITHIN_S = 2.0
"""For the last pictures to find room."""


class LivePictures:
    """The sensing process' part of a live view.

    Args:
        fd: The live view's shared memory.
        layout: As it was created with.
    """

    def __init__(self, fd: int, layout: LiveViewLayout) -> None:
        self._fd = fd
        self._writer = LiveViewWriter(fd, layout)
        self._new = NewPictures(layout.cameras)

    def add(self, frames: Mapping[str, CameraSample]) -> None:
        """Show each picture that is new, at the time it was received. Never waits."""
        for name, sample in self._new.among(frames):
            self._writer.picture(name, sample.received_ns, sample.image)

    def pump(self) -> None:
        """Write what waits for room."""
        self._writer.pump()

    def close(self) -> None:
        """Write what waits, for a short time, and close the shared memory."""
        self._writer.flush(LAST_WITHIN_S, lambda: True)
        self._writer.close()
        os.close(self._fd)
