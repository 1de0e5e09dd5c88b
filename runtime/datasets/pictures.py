"""Encodes and decodes pictures, (H, W, 3) uint8 RGB: PNG without loss, H.264 with a small one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.datasets.features import PIXEL_FORMAT

Picture = NDArray[np.uint8]
X264 = {"crf": "16", "preset": "veryfast", "bf": "0", "threads": "1"}
"""Without B-frames the first frame's time is exactly 0. One thread leaves the other cores alone."""
KEYFRAME_EVERY = 2
"""Frames; as LeRobot writes videos, so that any frame is found by decoding at most two."""
SEEK_MARGIN_S = 1.0
"""Files are indexed by the times of decoding, which are before those of showing."""
PNG = {"compression_level": "1", "pred": "up"}


def encode_png(picture: Picture) -> bytes:
    """Return ``picture`` as the bytes of a PNG file."""
    import av

    # One context for each picture: one that has coded a picture before decodes the next one wrong.
    codec: Any = av.CodecContext.create("png", "w")
    codec.height, codec.width = picture.shape[:2]
    codec.pix_fmt, codec.time_base, codec.thread_count = "rgb24", Fraction(1), 1
    codec.options = PNG
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    frame.pts = 0
    return b"".join(bytes(packet) for packet in (*codec.encode(frame), *codec.encode(None)))


def decode_png(data: bytes) -> Picture:
    """Return the picture in the bytes of a PNG file. Raises ``av.FFmpegError``, ``IndexError``."""
    import av

    codec: Any = av.CodecContext.create("png", "r")
    codec.thread_count = 1
    frames = [*codec.decode(av.Packet(data)), *codec.decode(None)]
    return np.array(frames[0].to_ndarray(format="rgb24"))


def encode_video(path: Path, pictures: Iterable[Picture], rate: Fraction) -> None:
    """Write ``pictures`` to ``path``, an mp4 file with frame k at k / ``rate`` seconds.

    Raises:
        OSError: The file cannot be written.
        ValueError: There are no pictures.
    """
    import av

    with av.open(str(path), "w") as container:
        stream: Any = None
        for number, picture in enumerate(pictures):
            if stream is None:
                stream = container.add_stream("libx264", rate=rate, options=X264)
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = PIXEL_FORMAT
                stream.gop_size = KEYFRAME_EVERY
                stream.time_base = stream.codec_context.time_base = 1 / rate
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError(f"{path}: got no pictures, expected at least one")
        container.mux(stream.encode())


def decode_video(path: Path, from_s: float = 0.0) -> Iterator[tuple[float, Picture]]:
    """Yield (time in s, picture) of the frames of a video from ``from_s`` on, in order.

    Raises:
        OSError, av.FFmpegError, IndexError: It cannot be read, or has no pictures.
    """
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if from_s > SEEK_MARGIN_S:
            container.seek(int((from_s - SEEK_MARGIN_S) / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time >= from_s:
                yield frame.time, np.array(frame.to_ndarray(format="rgb24"))
