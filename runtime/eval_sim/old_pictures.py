"""Observations whose pictures are older than the joints beside them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from envs.world import World
from policies.types import MetaObs


class OldPictures:
    """Observations of one episode whose pictures are ``ticks`` ticks old.

    Before tick ``ticks`` they are those of tick 0.

    Args:
        world: Reset to the episode's start.
        ticks: Age of the pictures; 0 for none.
    """

    def __init__(self, world: World, ticks: int) -> None:
        self._world = world
        self._snapshots: deque[object] = deque(maxlen=ticks + 1)
        self.remember()

    def remember(self) -> None:
        """Keep this tick for later pictures; does nothing where they are of now."""
        if self._snapshots.maxlen != 1:
            self._snapshots.append(self._world.observation_snapshot())

    def observe(self, out: Mapping[str, NDArray[np.uint8]]) -> MetaObs:
        """Return the current state beside the old pictures; those of now are rendered into ``out``.

        With old pictures it costs two renderings.
        """
        if self._snapshots.maxlen == 1:
            return self._world.observe(out)
        obs = self._world.observe({})
        obs.images = self._world.observe_snapshot(self._snapshots[0]).images
        return obs
