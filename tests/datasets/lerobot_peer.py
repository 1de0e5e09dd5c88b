"""Run by LeRobot's interpreter: what its own ``LeRobotDataset`` reads, as npz files.

``python lerobot_peer.py DATASET OUT [DATASET OUT ...]``
"""

from __future__ import annotations

import sys

import numpy as np
from lerobot.datasets.compute_stats import aggregate_stats, compute_episode_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def read_dataset(root: str, out: str) -> None:
    dataset = LeRobotDataset("metronome/test", root=root, video_backend="pyav")
    meta = dataset.meta
    read: dict[str, list[np.ndarray]] = {}
    tasks = []
    for index in range(len(dataset)):
        item = dataset[index]
        tasks.append(item.pop("task"))
        for key, value in item.items():
            array = value.numpy()
            if key in meta.camera_keys:
                array = np.round(array.transpose(1, 2, 0) * 255).astype(np.uint8)
            read.setdefault(key, []).append(array)
    arrays = {key: np.stack(values) for key, values in read.items()}
    for index in range(meta.total_episodes):
        entry = meta.episodes[index]
        arrays[f"bounds/{index}"] = np.array(
            [entry["dataset_from_index"], entry["dataset_to_index"], entry["length"]]
        )
    for key, values in meta.stats.items():
        for name, value in values.items():
            arrays[f"stats/{key}/{name}"] = value
    numbers = {key: one for key, one in meta.features.items() if key not in meta.camera_keys}
    per_episode = []
    for index in range(meta.total_episodes):
        rows = arrays["episode_index"] == index
        data = {key: arrays[key][rows].astype(np.float64) for key in numbers}
        per_episode.append(compute_episode_stats(data, numbers))
    for key, values in aggregate_stats(per_episode).items():
        for name, value in values.items():
            arrays[f"lerobot_stats/{key}/{name}"] = value
    np.savez(out, tasks=np.array(tasks), total=len(dataset), **arrays)


if __name__ == "__main__":
    for number in range(1, len(sys.argv), 2):
        read_dataset(*sys.argv[number : number + 2])
