"""Keeps camera pictures while a rollout runs, and encodes videos when it is over."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robots.base import CameraSample
from runtime.evaluation.video import write_video
from transport.child_process import send_event

MAX_PICTURES = 1000
"""Pictures of each camera in a video. A longer rollout gets half the frame rate."""


class VideoRecorder:
    """The pictures of one rollout, at a limited rate.

    Args:
        fps: Pictures kept per second and camera; 0 for none.
    """

    def __init__(self, fps: float) -> None:
        self._fps = fps
        self._next_ns = 0
        self._pictures: dict[str, list[NDArray[np.uint8]]] = {}

    def add(self, frames: Mapping[str, CameraSample], now_ns: int) -> None:
        """Keep one picture of each camera, unless the last ones were kept less than 1/fps ago."""
        if self._fps <= 0 or now_ns < self._next_ns:
            return
        self._next_ns = max(self._next_ns + round(1e9 / self._fps), now_ns)
        for name, sample in frames.items():
            self._pictures.setdefault(name, []).append(sample.image)
        if max(map(len, self._pictures.values()), default=0) > MAX_PICTURES:
            self._fps /= 2
            self._pictures = {name: kept[::2] for name, kept in self._pictures.items()}

    def save(self, stem: Path) -> None:
        """Write ``<stem>_<camera>.mp4`` in a thread (see ``file_name``).

        The thread then sends the event ``saved`` with the paths, or with the problem.
        """
        threading.Thread(target=self._write, args=(stem,), name="video", daemon=True).start()

    def _write(self, stem: Path) -> None:
        paths, problem = [], ""
        try:
            for name, pictures in self._pictures.items():
                path = stem.with_name(f"{stem.name}_{file_name(name)}.mp4")
                write_video(path, pictures, max(1, round(self._fps)))
                paths.append(str(path))
        except (OSError, ImportError) as error:
            problem = f"no video: {error}"
        send_event("saved", paths=paths, problem=problem)


def file_name(camera: str) -> str:
    """``camera`` as part of a file name.

    Characters other than letters, digits, ``.``, ``_``, ``-`` and blank become ``%`` and their code
    in hexadecimal: ``a/b`` becomes ``a%2Fb``.
    """
    return "".join(c if c.isalnum() or c in "._- " else f"%{ord(c):02X}" for c in camera)
