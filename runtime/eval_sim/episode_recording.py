"""Keeps what a dataset needs of one simulated episode."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from envs.world import StepResult, World
from policies.types import PolicyContract
from runtime.datasets.features import (
    ACTION,
    ACTION_AGE,
    DONE,
    ENVIRONMENT,
    LATENESS,
    REWARD,
    SOURCE,
    STATE,
    SUCCESS,
    TIME,
    DatasetFeatures,
    names_or_numbers,
)
from runtime.datasets.spooled_episode import PictureSpool, write_columns


class EpisodeRecording:
    """Takes a snapshot before every step; renders them after the episode.

    Rendering during the episode would delay a real-time loop.

    Args:
        realtime: Whether the loop runs by the wall clock; otherwise times are simulated ones.
        with_objects: Whether the objects' poses are recorded.
    """

    def __init__(self, *, realtime: bool, with_objects: bool) -> None:
        self._realtime, self._with_objects = realtime, with_objects
        self._snapshots: list[object] = []
        self._commands: list[NDArray[np.float32]] = []
        self._results: list[StepResult] = []
        self._times_s: list[float] = []
        self._ages_s: list[float] = []
        self._sources: list[int] = []

    def before_step(
        self, world: World, command: NDArray[np.float32], source: int, age_s: float
    ) -> None:
        """Keep the moment and the command."""
        tick = len(self._commands)
        self._times_s.append(time.monotonic() if self._realtime else tick * world.dt_s)
        self._snapshots.append(world.observation_snapshot())
        self._commands.append(command.copy())
        self._sources.append(source)
        self._ages_s.append(age_s)

    def after_step(self, world: World, result: StepResult) -> None:
        """Keep the reward and the outcome."""
        self._results.append(result)

    def spool(self, world: World, folder: Path) -> None:
        """Render the episode and leave it in ``folder`` for the recorder. Raises ``OSError``."""
        states, objects = [], []
        pictures = PictureSpool(folder, world.camera_hw)
        try:
            for snapshot in self._snapshots:
                observation = world.observe_snapshot(snapshot)
                states.append(observation.state)
                objects.append(observation.objects)
                for name, image in observation.images.items():
                    pictures.add(name, image)
        finally:
            pictures.close()
        frames = np.arange(len(states))
        times_s = np.asarray(self._times_s) - self._times_s[0]
        columns = {
            STATE: np.stack(states),
            ACTION: np.stack(self._commands),
            REWARD: np.array([result.reward for result in self._results], np.float32),
            DONE: frames == frames[-1],
            SUCCESS: np.array([result.success for result in self._results]),
            TIME: times_s,
            LATENESS: times_s - frames * world.dt_s,
            ACTION_AGE: np.asarray(self._ages_s),
            SOURCE: np.asarray(self._sources),
        }
        if self._with_objects:
            columns[ENVIRONMENT] = np.stack(objects)
        shown = dict.fromkeys(world.camera_names, frames)
        write_columns(folder, columns, shown, world.language or world.task)


def dataset_features(
    world: World, contract: PolicyContract, world_name: str, *, lossless: bool, with_objects: bool
) -> DatasetFeatures:
    """Return the features of a dataset recorded in ``world`` with a policy of ``contract``."""
    return DatasetFeatures(
        fps=1 / world.dt_s,
        robot_type=world_name,
        state_names=names_or_numbers(contract.state_names, "state", world.state_dim),
        action_names=names_or_numbers(contract.action_names, "action", world.action_dim),
        cameras=dict(world.camera_hw),
        environment_names=world.object_pose_names if with_objects else (),
        lossless=lossless,
    )
