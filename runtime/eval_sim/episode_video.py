"""The video of one simulated episode."""

from __future__ import annotations

from pathlib import Path

from envs.world import World
from runtime.evaluation.video import write_still, write_video


class EpisodeVideo:
    """Notes the world's state every other tick and renders afterwards, off the clock."""

    EVERY = 2

    def __init__(self, world: World) -> None:
        self._world = world
        self._snapshots: list[object] = []
        self._ticks = 0

    def note(self, world: World) -> None:
        if self._ticks % self.EVERY == 0:
            self._snapshots.append(world.snapshot())
        self._ticks += 1

    def write(self, stem: Path) -> None:
        """Write ``stem``.mp4, and ``stem``.png of the last moment: the success, if it is one.

        Raises:
            OSError: They cannot be written.
        """
        moments = [*self._snapshots, self._world.snapshot()]
        frames = (self._world.frame(snapshot) for snapshot in moments)
        write_video(stem.with_suffix(".mp4"), frames, fps=round(1 / self._world.dt_s / self.EVERY))
        write_still(stem.with_suffix(".png"), self._world.frame())
