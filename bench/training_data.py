"""Training steps per second from a LeRobotDataset ÷ from the same episodes as HDF5.

    python bench/training_data.py

Both runs have the shipped recipe's network, and pictures of 480 x 640 that become 64 x 80. They
take turns in one process, step by step; each pair of steps is one ratio. CPU time is shown, too:
other processes disturb it less.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs.demonstration_files import DatasetFolder, EpisodeRows, Hdf5Folder, write_hdf5, write_spool
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT, THREADS
from policies.training.dataset import Demonstrations
from policies.training.trainer import TrainConfig, Trainer
from policies.types import CameraContract
from policies.yaml_config import load_config
from runtime.tools.train import episode_source

EPISODES, TICKS, HW = 20, 200, (480, 640)
TASK = "sim_transfer_cube"
CAMERA = CameraContract("top", source_hw=HW, model_hw=(64, 80), resize="area")


def episode(seed: int) -> EpisodeRows:
    """A bright square that moves over a gradient."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: HW[0], : HW[1]]
    pictures = np.empty((TICKS, *HW, 3), np.uint8)
    pictures[:] = np.stack([x // 3, y // 2, (x + y) // 5], -1)
    for tick, picture in enumerate(pictures):
        top, left = int(rng.integers(400)), 2 * tick
        picture[top : top + 60, left : left + 60] = 255
    return EpisodeRows(
        *rng.normal(size=(3, TICKS, 14)).astype(np.float32),
        object_qpos=rng.normal(size=(TICKS, 7)).astype(np.float32),
        rewards=np.zeros(TICKS + 1, np.float32),
        pictures={"top": pictures},
    )


def write_both(folder: Path, lossless: bool) -> dict[str, str]:
    """Write all episodes in both formats; return the values of ``--data``."""
    hdf5, dataset = folder / "hdf5", folder / "dataset"
    hdf5.mkdir()
    options = {"task": TASK, "cameras": {"top": HW}, "lossless": lossless}
    with Hdf5Folder(hdf5) as files, DatasetFolder(dataset, **options) as episodes:
        for seed in range(EPISODES):
            rows = episode(seed)
            write_hdf5(hdf5 / "written.hdf5", rows, {})
            files.keep(hdf5 / "written.hdf5")
            episodes.keep(write_spool(dataset, f"seed_{seed}", rows, TASK))
            print(f"written: {seed + 1} of {EPISODES}", file=sys.stderr)
    return {"HDF5": str(hdf5), "LeRobotDataset": f"lerobot:{dataset}"}


def trainer_of(name: str, data: str, folder: Path, options: dict[str, int]) -> Trainer:
    recipe = load_config(TrainConfig, f"act_{TASK}", kind="train")
    config = dataclasses.replace(
        recipe, demonstrations=Path(data), output=folder / f"run_{name}", cameras=(CAMERA,),
        **options,
    )  # fmt: skip
    start = time.monotonic()
    found = Demonstrations(episode_source(config), config.cameras, chunk_size=config.chunk_size)
    print(f"{name}: read in {time.monotonic() - start:.1f} s, {found.images.nbytes / 1e6:.0f} MB")
    return Trainer(config, found)


def run_step(trainer: Trainer) -> tuple[float, float]:
    """Train one step; return its wall time and its CPU time in s."""
    start, start_cpu = time.monotonic(), time.process_time()
    trainer._train_step()
    return time.monotonic() - start, time.process_time() - start_cpu


def main() -> int:
    cli = CommandLine(description="Training from a LeRobotDataset ÷ from HDF5.")
    cli.add_argument("--pairs", type=Number(int, COUNT), default=40, help="of steps (default 40)")
    cli.add_argument("--batch_size", type=Number(int, COUNT), default=8)
    cli.add_argument("--threads", type=Number(int, THREADS), default=1)
    cli.add_argument("--lossless", action="store_true", help="PNG in the dataset, not video")
    args = cli.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    options = {"batch_size": args.batch_size, "threads": args.threads}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = write_both(folder, args.lossless)
        trainers = [trainer_of(name, data[name], folder, options) for name in data]
        for trainer in trainers:
            run_step(trainer)  # warms up
        seconds = np.empty((args.pairs, 2, 2))
        for number in range(args.pairs):
            for one in (0, 1) if number % 2 else (1, 0):
                seconds[number, one] = run_step(trainers[one])
    for number, clock in enumerate(("wall", "CPU")):
        hdf5, dataset = np.median(seconds[:, :, number], 0)
        low, median, high = np.quantile(
            seconds[:, 0, number] / seconds[:, 1, number], (0.25, 0.5, 0.75)
        )
        print(
            f"{clock} time: HDF5 {1 / hdf5:.3f} steps/s, LeRobotDataset {1 / dataset:.3f} steps/s, "
            f"ratio of pairs: median {median:.3f}, quartiles {low:.3f} and {high:.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
