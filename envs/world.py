"""``World``: the interface between a simulation and the evaluation, in the types of a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from envs.errors import EnvError
from policies.types import MetaObs

Pictures = Mapping[str, NDArray[np.uint8]]
"""Camera name to (H, W, 3) uint8 RGB."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of one tick.

    Attributes:
        reward: Reward of this tick.
        highest_reward: Highest reward since the reset.
        success: Whether the task is done in this tick.
        terminated: Whether the task's own rule ended the episode.
        truncated: Whether ``max_timesteps`` ticks are over.
    """

    reward: float
    highest_reward: float
    success: bool
    terminated: bool
    truncated: bool


@dataclass(frozen=True, slots=True, eq=False)
class RecordedObservation:
    """What a dataset keeps of one tick.

    Attributes:
        images: The policy's camera name to (H, W, 3) uint8 RGB.
        state: (S,) float32, as in ``MetaObs``.
        objects: (O,) float32, the poses of the objects; empty where the world has none.
    """

    images: Pictures
    state: NDArray[np.float32]
    objects: NDArray[np.float32]


@runtime_checkable
class World(Protocol):
    """A simulated world, used by one thread. ``step`` never renders; ``observe`` does."""

    @property
    def dt_s(self) -> float:
        """Simulated seconds per tick."""
        ...

    @property
    def max_timesteps(self) -> int:
        """Ticks after which an episode is truncated."""
        ...

    @property
    def action_dim(self) -> int:
        """Length A of the action."""
        ...

    @property
    def state_dim(self) -> int:
        """Length S of the state."""
        ...

    @property
    def control(self) -> tuple[str, str] | None:
        """(space, type) of the actions, as in ``PolicyContract``; None accepts any."""
        ...

    @property
    def camera_names(self) -> tuple[str, ...]:
        """The policy's camera names, in the policy's order."""
        ...

    @property
    def camera_hw(self) -> Mapping[str, tuple[int, int]]:
        """The policy's camera name to (height, width) in pixels."""
        ...

    @property
    def task(self) -> str:
        """Name of the task."""
        ...

    @property
    def language(self) -> str:
        """The instruction, empty where there is none."""
        ...

    def reset(self, seed: int) -> None:
        """Start a new episode. Equal seeds give equal episodes for equal actions."""
        ...

    def observe(self, out: Pictures | None = None) -> MetaObs:
        """Return the current state, with every camera rendered now.

        Args:
            out: The policy's camera name to the array to render into, (H, W, 3) uint8 of any size
                the camera supports. The observation then holds these arrays, and new ones for
                cameras that are not in ``out``.
        """
        ...

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Run one tick towards ``action``, (A,) in physical units.

        Raises:
            EnvError: Another shape, a value that is not finite, or a simulation that diverged.
        """
        ...

    def snapshot(self) -> object:
        """Return what ``frame`` needs to show this moment later.

        Cheap, except in worlds that cannot go back to an earlier state.
        """
        ...

    def frame(self, snapshot: object = None) -> NDArray[np.uint8]:
        """Return an image for a video, (H, W, 3) uint8: of the current state or of a snapshot."""
        ...

    @property
    def object_pose_names(self) -> tuple[str, ...]:
        """O names of the numbers in ``RecordedObservation.objects``."""
        ...

    def observation_snapshot(self) -> object:
        """Return what ``observe_snapshot`` needs to observe this moment later, as ``snapshot``."""
        ...

    def observe_snapshot(self, snapshot: object) -> RecordedObservation:
        """Return the observation at ``snapshot``, from ``observation_snapshot``, without a change
        to the simulation.
        """
        ...

    def info(self) -> dict[str, Any]:
        """Return versions, renderer and options for the result file, as plain JSON types."""
        ...

    def close(self) -> None:
        """Release what the world holds. Idempotent."""
        ...


def check_action(action: NDArray[Any], action_dim: int) -> None:
    """Raise ``EnvError`` unless ``action`` is (action_dim,) and finite."""
    if action.shape != (action_dim,):
        raise EnvError(f"action: got shape {action.shape}, expected ({action_dim},)")
    if not np.isfinite(action).all():
        raise EnvError(f"action: got {action}, expected finite numbers")
