"""Records demonstrations of the scripted expert in ACT's HDF5 format, or as a LeRobotDataset v3.

``python -m envs.demonstrations --task sim_transfer_cube --num 200 --out data/transfer_cube``

Each HDF5 file is one episode: ``observations/qpos``, ``observations/qvel`` and ``action`` (T, 14)
float32, ``observations/images/<camera>`` (T, H, W, 3) uint8, and the attribute ``sim``. Other
trainers ignore the additional ``metronome/object_qpos`` (T, 7 * objects) and
``metronome/reward`` (T,), both at the time of the observation, and the attributes that describe
the recording. Row t holds the observation of tick t and the action commanded after it. An episode
whose last tick is not a success is discarded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import logging
import multiprocessing
import os
import sys
import typing
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from envs.aloha_physics import DT_S, STATE_DIM, AlohaSim
from envs.aloha_tasks import MAX_REWARD, TASKS, find_task
from envs.demonstration_files import (
    DatasetFolder,
    EpisodeRows,
    Hdf5Folder,
    write_hdf5,
    write_spool,
)
from envs.errors import EnvError
from envs.gl_context import import_mujoco
from envs.kinematics import Unreachable
from envs.scripted_expert import EPISODE_TICKS, plan_episode
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT, MSAA, PIXELS, PROCESSES, SEED
from policies.standard_streams import run_command

Format = Literal["hdf5", "lerobot"]
log = logging.getLogger(__name__)

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
FIRST_SEED = 1_000_000
"""First seed of demonstrations; evaluations use the seeds below it."""
MAX_FAILURES = 50
"""Consecutive failures of the expert after which recording stops."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Options of a recording.

    Attributes:
        task: Name of the task.
        folder: Output folder for the episodes.
        cameras: The model's cameras.
        image_hw: (height, width) of every image in pixels.
        shadows, msaa: Render options, see ``OffscreenRenderer``.
        format: ACT's HDF5 files, or one LeRobotDataset v3.
        lossless: Whether a LeRobotDataset stores pictures as PNG, and not as video.
    """

    task: str
    folder: Path
    cameras: tuple[str, ...] = ("top",)
    image_hw: tuple[int, int] = (240, 320)
    shadows: bool = False
    msaa: int = 0
    format: Format = "hdf5"
    lossless: bool = False


@dataclass(frozen=True, slots=True)
class RecordedEpisode:
    """Result of one attempt: seed, last and highest reward, and where the episode is if kept."""

    seed: int
    last_reward: int
    highest_reward: int
    path: Path | None


def record_episode(recording: Demonstration, seed: int) -> RecordedEpisode:
    """Execute the expert's plan from ``seed`` and write the episode if it ends in success."""
    sim = _simulation(recording)
    sim.reset(seed)
    try:
        actions = plan_episode(sim)
    except Unreachable as error:
        log.warning("seed %d: %s", seed, error)
        return RecordedEpisode(seed, 0, 0, None)
    rows = _perform(recording, sim, actions)
    reward, highest = int(rows.rewards[-1]), int(rows.rewards.max())
    if reward != MAX_REWARD:
        return RecordedEpisode(seed, reward, highest, None)
    if recording.format == "lerobot":
        path = write_spool(recording.folder, f"seed_{seed}", rows, sim.task.name)
        return RecordedEpisode(seed, reward, highest, path)
    path = recording.folder / f"seed_{seed}.hdf5"
    attributes = {
        "sim": True,
        "task": sim.task.name,
        "seed": seed,
        "dt_s": DT_S,
        "shadows": recording.shadows,
        "msaa": recording.msaa,
        "mujoco": import_mujoco().mj_versionString(),
    }
    write_hdf5(path, rows, attributes)
    return RecordedEpisode(seed, reward, highest, path)


def _perform(recording: Demonstration, sim: AlohaSim, actions: NDArray[np.float32]) -> EpisodeRows:
    """Execute ``actions`` and return what was seen."""
    qpos, qvel = np.empty((2, EPISODE_TICKS, STATE_DIM), np.float32)
    object_qpos = np.empty((EPISODE_TICKS, len(sim.object_qpos)), np.float32)
    rewards = np.empty(EPISODE_TICKS + 1, np.float32)
    pictures = {
        camera: np.empty((EPISODE_TICKS, *recording.image_hw, 3), np.uint8)
        for camera in recording.cameras
    }
    rewards[0] = sim.reward()
    for tick, action in enumerate(actions):
        qpos[tick], qvel[tick] = sim.agent_pos, sim.agent_vel
        object_qpos[tick] = sim.object_qpos
        for camera, frames in pictures.items():
            sim.render_camera(camera, out=frames[tick])
        rewards[tick + 1] = sim.step(action)
    return EpisodeRows(qpos, qvel, actions, object_qpos, rewards, pictures)


def record(
    recording: Demonstration, *, num: int, workers: int = 1, first_seed: int = FIRST_SEED
) -> Generator[RecordedEpisode, None, None]:
    """Attempt seeds from ``first_seed`` on until ``num`` episodes are kept; yield each attempt.

    The episodes are in the order of their seeds, for any number of workers: the files
    ``episode_0.hdf5`` to ``episode_<num-1>.hdf5``, or the episodes of the dataset.

    Raises:
        EnvError: ``folder`` already has episodes or cannot be created, the task is unknown, or the
            expert keeps failing.
    """
    find_task(recording.task)
    try:
        recording.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvError(
            f"{recording.folder}: {error.strerror}; expected a folder that can be created"
        ) from error
    seeds = itertools.count(first_seed)
    kept = failures = 0
    spawn = multiprocessing.get_context("spawn")
    # The pool ends first: then no process writes an episode that nobody would keep.
    with _episodes(recording) as episodes, ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        pending: deque[Future[RecordedEpisode]] = deque()
        while kept < num:
            # Never run more attempts at a time than can still be needed.
            while len(pending) < min(2 * workers, num - kept):
                pending.append(pool.submit(record_episode, recording, next(seeds)))
            outcome = pending.popleft().result()
            if outcome.path is None:
                failures += 1
                if failures == MAX_FAILURES:
                    raise EnvError(f"{recording.task}: the expert failed {failures} times in a row")
            else:
                outcome = dataclasses.replace(outcome, path=episodes.keep(outcome.path))
                kept, failures = kept + 1, 0
            yield outcome


def _episodes(recording: Demonstration) -> Hdf5Folder | DatasetFolder:
    """Return what keeps the episodes."""
    if recording.format == "hdf5":
        return Hdf5Folder(recording.folder)
    return DatasetFolder(
        recording.folder,
        task=recording.task,
        cameras=dict.fromkeys(recording.cameras, recording.image_hw),
        lossless=recording.lossless,
    )


_simulations: dict[Demonstration, AlohaSim] = {}


def _simulation(recording: Demonstration) -> AlohaSim:
    """Return this process's simulation for ``recording``.

    Compiling the model and creating its GL context takes longer than stepping it, so each process
    does that once.
    """
    if recording not in _simulations:
        _simulations[recording] = AlohaSim(
            recording.task,
            max_hw=recording.image_hw,
            shadows=recording.shadows,
            msaa=recording.msaa,
        )
    return _simulations[recording]


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    cli = CommandLine(description="Record demonstrations by the scripted expert.")
    add = cli.add_argument
    pixels = Number(int, PIXELS)
    add("--task", required=True, help=f"one of {list(TASKS)}")
    add("--num", type=Number(int, COUNT), default=200, help="episodes to keep (default 200)")
    add("--out", type=Path, required=True, help="a new folder")
    add(
        "--format",
        choices=typing.get_args(Format),
        default="hdf5",
        help="a file for each episode in ACT's HDF5, or a LeRobotDataset v3 (default hdf5)",
    )
    add("--lossless", action="store_true", help="LeRobotDataset: pictures as PNG, not as video")
    add("--workers", type=Number(int, PROCESSES), default=os.cpu_count() or 1)
    add("--first-seed", type=Number(int, SEED), default=FIRST_SEED)
    add("--cameras", nargs="+", default=["top"])
    add("--height", type=pixels, default=240)
    add("--width", type=pixels, default=320)
    add("--shadows", action="store_true")
    add("--msaa", type=Number(int, MSAA), default=0)
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    from tqdm import tqdm

    recording = Demonstration(
        task=options.task,
        folder=options.out,
        cameras=tuple(options.cameras),
        image_hw=(options.height, options.width),
        shadows=options.shadows,
        msaa=options.msaa,
        format=options.format,
        lossless=options.lossless,
    )
    attempts = kept = 0
    try:
        with (
            tqdm(total=options.num, unit="episode", desc=options.task) as bar,
            contextlib.closing(
                record(
                    recording,
                    num=options.num,
                    workers=options.workers,
                    first_seed=options.first_seed,
                )
            ) as outcomes,
        ):
            for outcome in outcomes:
                attempts += 1
                if outcome.path is not None:
                    kept += 1
                    bar.update()
                bar.set_postfix_str(f"success {kept}/{attempts}")
    except (EnvError, OSError, BrokenProcessPool) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, EnvError) else FAILED
    except KeyboardInterrupt:
        print(f"interrupted: {kept} episodes in {options.out}", file=sys.stderr)
        return INTERRUPTED
    print(f"{kept} episodes in {options.out}, {attempts} attempts")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
