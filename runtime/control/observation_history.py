"""Observations of the last consecutive ticks, for a policy that takes several."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from policies.types import MetaObs


class ObservationHistory:
    """The observations of one episode's newest ticks.

    A tick that was not observed has the observation of the tick before it: in real time a tick may
    be missed. Ticks before the first observation have the first one, as in LeRobot.

    Args:
        n_obs_steps: Consecutive ticks of one stacked observation.
    """

    def __init__(self, n_obs_steps: int) -> None:
        self.n_obs_steps = n_obs_steps
        self._observed: deque[MetaObs] = deque(maxlen=n_obs_steps)

    def add(self, obs: MetaObs) -> None:
        """Keep ``obs`` and its arrays, which must not change afterwards.

        Raises:
            ValueError: ``obs.timestep`` is not above the last one's.
        """
        if self._observed and obs.timestep <= self._observed[-1].timestep:
            last = self._observed[-1].timestep
            raise ValueError(f"timestep: got {obs.timestep}, expected more than {last}")
        self._observed.append(obs)

    def stacked(self) -> MetaObs:
        """The observation of the last ``n_obs_steps`` ticks, the newest observed one included."""
        newest = self._observed[-1].timestep
        ticks = range(newest - self.n_obs_steps + 1, newest + 1)
        return stack_ticks([self._at(tick) for tick in ticks])

    def _at(self, tick: int) -> MetaObs:
        known = [obs for obs in self._observed if obs.timestep <= tick]
        return known[-1] if known else self._observed[0]


def stack_ticks(ticks: Sequence[MetaObs]) -> MetaObs:
    """One observation of several ticks, the oldest first; the same object for a single tick.

    The optional arrays of ``MetaObs`` are stacked if the newest tick has them.
    """
    newest = ticks[-1]
    if len(ticks) == 1:
        return newest
    return dataclasses.replace(
        newest,
        images={name: np.stack([obs.images[name] for obs in ticks]) for name in newest.images},
        depth={name: np.stack([obs.depth[name] for obs in ticks]) for name in newest.depth},
        state=np.stack([obs.state for obs in ticks]),
        state_ee=_stack([obs.state_ee for obs in ticks]),
        state_joint=_stack([obs.state_joint for obs in ticks]),
    )


def _stack(states: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    present = [state for state in states if state is not None]
    return np.stack(present) if len(present) == len(states) else None
