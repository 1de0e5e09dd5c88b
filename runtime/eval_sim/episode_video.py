"""The video of one simulated episode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from envs.world import StepResult, World
from runtime.evaluation.video import write_still, write_video


class EpisodeVideo:
    """Stores a snapshot of the world every second tick; renders them after the episode.

    Rendering during the episode would delay a real-time loop.
    """

    EVERY = 2
    """Ticks per frame."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._snapshots: list[object] = []
        self._ticks = 0

    def before_step(
        self, world: World, command: NDArray[np.float32], source: int, age_s: float
    ) -> None:
        """Do nothing: a frame shows what a step led to."""

    def after_step(self, world: World, result: StepResult) -> None:
        """Store a snapshot of ``world`` if this tick has a frame."""
        if self._ticks % self.EVERY == 0:
            self._snapshots.append(world.snapshot())
        self._ticks += 1

    def write(self, stem: Path) -> None:
        """Write ``stem``.mp4, and the final state as ``stem``.png.

        Raises:
            OSError: A file cannot be written.
        """
        snapshots = [*self._snapshots, self._world.snapshot()]
        frames = (self._world.frame(snapshot) for snapshot in snapshots)
        write_video(stem.with_suffix(".mp4"), frames, fps=round(1 / self._world.dt_s / self.EVERY))
        write_still(stem.with_suffix(".png"), self._world.frame())
