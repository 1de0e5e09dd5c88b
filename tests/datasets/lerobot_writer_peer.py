"""Run by LeRobot's interpreter: writes a dataset with its own ``LeRobotDataset``.

``python lerobot_writer_peer.py DATASET images|videos``: 7 episodes of ``episode``, with limits that
make several files with several episodes each, in several chunks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

EPISODES, FPS, HW = 7, 30, (64, 96)
CAMERAS = ("top", "wrist")
KEYS = {name: f"observation.images.{name}" for name in CAMERAS}


def episode(index: int) -> dict[str, np.ndarray]:
    """Columns and pictures of 20 to 26 frames."""
    rng = np.random.default_rng(index)
    n = 20 + index
    y, x = np.mgrid[: HW[0], : HW[1]]
    columns = {
        "observation.state": rng.normal(size=(n, 3)).astype(np.float32),
        "action": rng.normal(size=(n, 2)).astype(np.float32),
        "observation.environment_state": rng.normal(size=(n, 7)).astype(np.float32),
    }
    for number, key in enumerate(KEYS.values()):
        frames = [
            np.stack([x + y + 3 * k, 2 * y + 20 * number, 40 * index + x], -1) for k in range(n)
        ]
        columns[key] = (np.abs(np.stack(frames) % 512 - 256)).clip(0, 255).astype(np.uint8)
    return columns


def write(root: Path, kind: str) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    shapes = {key: value.shape[1:] for key, value in episode(0).items()}
    features = {
        key: {
            "dtype": kind.removesuffix("s") if len(shape) == 3 else "float32",
            "shape": shape,
            "names": ["height", "width", "channels"] if len(shape) == 3 else None,
        }
        for key, shape in shapes.items()
    }
    dataset = LeRobotDataset.create(
        "metronome/test", FPS, features, root=root, video_backend="pyav", robot_type="toy",
        use_videos=kind == "videos",
    )  # fmt: skip
    # Below a megabyte, which its own function does not take: then these small episodes fill files.
    dataset.meta.info |= {
        "chunks_size": 2,
        "data_files_size_in_mb": 0.014,
        "video_files_size_in_mb": 0.006,
    }
    for index in range(EPISODES):
        columns = episode(index)
        for frame in range(len(columns["action"])):
            dataset.add_frame(
                {key: value[frame] for key, value in columns.items()}
                | {"task": f"task {index % 2}"}
            )
        dataset.save_episode()
    dataset.finalize()


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
