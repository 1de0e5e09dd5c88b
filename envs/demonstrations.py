"""Records demonstrations of the scripted expert in ACT's HDF5 format.

``python -m envs.demonstrations --task sim_transfer_cube --num 200 --out data/transfer_cube``

Each file is one episode: ``observations/qpos``, ``observations/qvel`` and ``action`` (T, 14)
float32, ``observations/images/<camera>`` (T, H, W, 3) uint8, and the attribute ``sim``. Other
trainers ignore the additional ``metronome/object_qpos`` (T, 7 * objects) and
``metronome/reward`` (T,), both at the time of the observation, and the attributes that describe
the recording. Row t holds the observation of tick t and the action commanded after it. An episode
whose last tick is not a success is discarded.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from envs.aloha_physics import DT_S, STATE_DIM, AlohaSim
from envs.aloha_tasks import MAX_REWARD, TASKS, find_task
from envs.errors import EnvError
from envs.gl_context import import_mujoco
from envs.kinematics import Unreachable
from envs.scripted_expert import EPISODE_TICKS, plan_episode
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT, MSAA, PIXELS, PROCESSES, SEED
from policies.standard_streams import run_command

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
    """

    task: str
    folder: Path
    cameras: tuple[str, ...] = ("top",)
    image_hw: tuple[int, int] = (240, 320)
    shadows: bool = False
    msaa: int = 0


@dataclass(frozen=True, slots=True)
class RecordedEpisode:
    """Result of one attempt: seed, last and highest reward, and the file if the episode is kept."""

    seed: int
    last_reward: int
    highest_reward: int
    path: Path | None


def record_episode(recording: Demonstration, seed: int) -> RecordedEpisode:
    """Execute the expert's plan from ``seed`` and write the episode if it ends in success.

    The file gets its final name only when it is complete.
    """
    import h5py

    sim = _simulation(recording)
    sim.reset(seed)
    try:
        actions = plan_episode(sim)
    except Unreachable as error:
        log.warning("seed %d: %s", seed, error)
        return RecordedEpisode(seed, 0, 0, None)
    objects = len(sim.object_qpos)
    qpos, qvel = np.empty((2, EPISODE_TICKS, STATE_DIM), np.float32)
    object_qpos = np.empty((EPISODE_TICKS, objects), np.float32)
    reward_seen = np.empty(EPISODE_TICKS, np.float32)
    pictures = {
        camera: np.empty((EPISODE_TICKS, *recording.image_hw, 3), np.uint8)
        for camera in recording.cameras
    }
    reward = highest = sim.reward()
    for tick, action in enumerate(actions):
        qpos[tick], qvel[tick] = sim.agent_pos, sim.agent_vel
        object_qpos[tick], reward_seen[tick] = sim.object_qpos, reward
        for camera, frames in pictures.items():
            sim.render_camera(camera, out=frames[tick])
        reward = sim.step(action)
        highest = max(highest, reward)
    if reward != MAX_REWARD:
        return RecordedEpisode(seed, reward, highest, None)
    path = recording.folder / f"seed_{seed}.hdf5"
    partial = path.with_suffix(".partial")
    with h5py.File(partial, "w") as file:
        file.attrs["sim"] = True
        file.attrs["task"] = sim.task.name
        file.attrs["seed"] = seed
        file.attrs["dt_s"] = DT_S
        file.attrs["shadows"], file.attrs["msaa"] = recording.shadows, recording.msaa
        file.attrs["mujoco"] = import_mujoco().mj_versionString()
        file["observations/qpos"], file["observations/qvel"] = qpos, qvel
        file["action"] = actions
        for camera, frames in pictures.items():
            file.create_dataset(
                f"observations/images/{camera}",
                data=frames,
                chunks=(1, *frames.shape[1:]),
                compression="lzf",
            )
        file["metronome/object_qpos"], file["metronome/reward"] = object_qpos, reward_seen
    partial.rename(path)
    return RecordedEpisode(seed, reward, highest, path)


def record(
    recording: Demonstration, *, num: int, workers: int = 1, first_seed: int = FIRST_SEED
) -> Generator[RecordedEpisode, None, None]:
    """Attempt seeds from ``first_seed`` on until ``num`` episodes are kept; yield each attempt.

    The episodes are ``episode_0.hdf5`` to ``episode_<num-1>.hdf5`` in the order of their seeds, for
    any number of workers.

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
    if any(recording.folder.glob("*.hdf5")):
        raise EnvError(f"{recording.folder}: got a folder with episodes, expected a new one")
    seeds = itertools.count(first_seed)
    kept = failures = 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
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
                path = recording.folder / f"episode_{kept}.hdf5"
                outcome.path.rename(path)
                outcome = RecordedEpisode(
                    outcome.seed, outcome.last_reward, outcome.highest_reward, path
                )
                kept, failures = kept + 1, 0
            yield outcome


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
