"""Writes videos and still images; frames are (H, W, 3) uint8 RGB."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], fps: int) -> None:
    """Write ``frames`` to ``path`` as H.264 in mp4, ``fps`` frames per second, at least 1.

    H.264 needs even sizes: an odd height or width loses its last row or column.

    Raises:
        ValueError: ``frames`` is empty.
        OSError: The file cannot be written.
    """
    import av

    fps = max(1, fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = None
        for frame in frames:
            height, width = (n - n % 2 for n in frame.shape[:2])
            if stream is None:
                stream = container.add_stream("libx264", rate=fps)
                stream.height, stream.width = height, width
                stream.pix_fmt = "yuv420p"
            image = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        if stream is None:
            raise ValueError(f"{path}: got no frames, expected at least one")
        container.mux(stream.encode())


def write_still(path: Path, frame: NDArray[np.uint8]) -> None:
    """Write one frame to ``path`` as PNG."""
    import_matplotlib()
    from matplotlib import image

    path.parent.mkdir(parents=True, exist_ok=True)
    image.imsave(path, frame)


def import_matplotlib() -> None:
    """Import matplotlib with the file-only backend, whatever ``MPLBACKEND`` says.

    With a notebook's or an unknown backend the import would fail, at the end of an evaluation.
    """
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib

    matplotlib.use("Agg")
