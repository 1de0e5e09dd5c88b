"""One finished episode as the evaluation leaves it for the recorder: raw pictures and columns.

A folder with ``columns.npz``, ``episode.json`` and, for each camera, a file of pictures one after
another. Which of them a frame shows is the column ``picture/<camera>``. It is written by the
process that has the pictures, and encoding is left to the recorder process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS_FILE, EPISODE_FILE, TIMES_FILE = "columns.npz", "episode.json", "picture_times.npz"
PICTURE = "picture/"


class PictureSpool:
    """Files of raw pictures in a new folder, one for each camera.

    Args:
        folder: Is created.
        cameras: Camera name to (height, width) in pixels.

    Raises:
        OSError: The folder or a file cannot be created; it exists already.
    """

    def __init__(self, folder: Path, cameras: Mapping[str, tuple[int, int]]) -> None:
        folder.mkdir(parents=True)
        self._cameras = dict(cameras)
        self._folder = folder
        self._files = {
            name: _picture_file(folder, number).open("wb") for number, name in enumerate(cameras)
        }
        self._times_ns: dict[str, list[int]] = {name: [] for name in cameras}

    def add(self, camera: str, picture: NDArray[np.uint8], received_ns: int = 0) -> None:
        """Write ``picture`` after the others of ``camera``.

        Args:
            camera: One of ``cameras``.
            picture: (height, width, 3) uint8 RGB.
            received_ns: This host's monotonic clock.

        Raises:
            OSError: It cannot be written.
            ValueError: It has another size.
        """
        if picture.shape != (*self._cameras[camera], 3):
            raise ValueError(
                f"picture of {camera!r}: got {picture.shape}, expected {self._cameras[camera]}"
            )
        self._files[camera].write(np.ascontiguousarray(picture).data)
        self._times_ns[camera].append(received_ns)

    def close(self) -> None:
        """Write the pictures' times, and close the files. Raises ``OSError``."""
        for file in self._files.values():
            file.close()
        times = {name: np.asarray(all_ns, np.int64) for name, all_ns in self._times_ns.items()}
        np.savez(self._folder / TIMES_FILE, allow_pickle=False, **times)


def picture_times(folder: Path) -> dict[str, NDArray[np.int64]]:
    """Return when each picture of a closed spool was received, in ns, by camera."""
    with np.load(folder / TIMES_FILE, allow_pickle=False) as times:
        return dict(times)


def write_columns(
    folder: Path,
    columns: Mapping[str, NDArray[Any]],
    shown: Mapping[str, NDArray[np.int64]],
    task: str,
) -> None:
    """Complete a folder whose pictures are written. Raises ``OSError``.

    Args:
        folder: The spool's.
        columns: Column to (n,) or (n, D), one row per frame.
        shown: Camera to (n,), the number of the picture that each frame shows.
        task: The instruction in words.
    """
    pictures = {PICTURE + name: numbers for name, numbers in shown.items()}
    np.savez(folder / COLUMNS_FILE, allow_pickle=False, **columns, **pictures)
    text = json.dumps({"task": task, "cameras": list(shown)})
    (folder / EPISODE_FILE).write_text(text, encoding="utf-8")


@dataclass(frozen=True, slots=True, eq=False)
class SpooledEpisode:
    """A complete folder.

    Attributes:
        folder: Where it is.
        columns: Column to (n,) or (n, D), one row per frame.
        shown: Camera to (n,) int64, the number of the picture that each frame shows.
        cameras: The cameras, in the order of their files.
        task: The instruction in words.
    """

    folder: Path
    columns: Mapping[str, NDArray[Any]]
    shown: Mapping[str, NDArray[np.int64]]
    cameras: tuple[str, ...]
    task: str

    @classmethod
    def load(cls, folder: Path) -> SpooledEpisode:
        """Read a folder that ``write_columns`` completed. Raises ``OSError``, ``ValueError``."""
        text = json.loads((folder / EPISODE_FILE).read_text(encoding="utf-8"))
        with np.load(folder / COLUMNS_FILE, allow_pickle=False) as arrays:
            columns = dict(arrays)
        shown = {name: columns.pop(PICTURE + name) for name in text["cameras"]}
        return cls(folder, columns, shown, tuple(text["cameras"]), text["task"])

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def pictures(self, camera: str, hw: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
        """Yield the picture of every frame, (H, W, 3) uint8, of a size of ``hw``."""
        path = _picture_file(self.folder, self.cameras.index(camera))
        stored = np.memmap(path, np.uint8, mode="r").reshape(-1, *hw, 3)
        for number in self.shown[camera]:
            yield stored[number]


def _picture_file(folder: Path, number: int) -> Path:
    return folder / f"camera_{number}.rgb"
