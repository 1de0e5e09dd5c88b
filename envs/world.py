"""What the evaluator sees of a simulation: ``World``, in the vocabulary of policies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from envs.errors import EnvError
from policies.types import MetaObs

Pictures = Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one tick brought.

    Attributes:
        reward: Of this tick.
        highest_reward: Since the reset.
        success: The job is done in this tick.
        terminated: The episode is over by the task's own rule.
        truncated: ``max_timesteps`` have been played.
    """

    reward: float
    highest_reward: float
    success: bool
    terminated: bool
    truncated: bool


@runtime_checkable
class World(Protocol):
    """A simulated world. Stepping never renders; ``observe`` does. Belongs to one thread.

    Attributes:
        dt_s: Simulated seconds per tick.
        max_timesteps: Ticks after which an episode is truncated.
        action_dim, state_dim: Lengths of the action and the state.
        control: (space, type) of the actions it takes, as a contract names them; None: any.
        camera_names: As the policy calls them, in the policy's order.
        camera_hw: Their (height, width), by the policy's name.
        task: What is to be done, a name.
        language: The instruction, empty where there is none.
    """

    @property
    def dt_s(self) -> float: ...
    @property
    def max_timesteps(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def state_dim(self) -> int: ...
    @property
    def control(self) -> tuple[str, str] | None: ...
    @property
    def camera_names(self) -> tuple[str, ...]: ...
    @property
    def camera_hw(self) -> Mapping[str, tuple[int, int]]: ...
    @property
    def task(self) -> str: ...
    @property
    def language(self) -> str: ...

    def reset(self, seed: int) -> None:
        """A new episode. Equal seeds give equal episodes for equal actions."""
        ...

    def observe(self, out: Pictures | None = None) -> MetaObs:
        """The present state, with every camera rendered now.

        Args:
            out: By the policy's camera name, the arrays to render into, (H, W, 3) uint8 of any
                size the camera can have; the observation then holds these. New ones where absent.
        """
        ...

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """One tick towards ``action``, (A,) in physical units.

        Raises:
            EnvError: Another shape or a value that is not finite; the simulation diverged.
        """
        ...

    def snapshot(self) -> object:
        """What ``frame`` needs to show this moment later. Cheap, unless the world can't go back."""
        ...

    def frame(self, snapshot: object = None) -> NDArray[np.uint8]:
        """A picture for a video, (H, W, 3) uint8: of the present, or of an earlier snapshot."""
        ...

    def info(self) -> dict[str, Any]:
        """Versions, renderer and options, for the result file; plain JSON types."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


def check_action(action: NDArray[Any], action_dim: int) -> None:
    """Raises ``EnvError`` unless ``action`` is (action_dim,) and finite."""
    if action.shape != (action_dim,):
        raise EnvError(f"action: got shape {action.shape}, expected ({action_dim},)")
    if not np.isfinite(action).all():
        raise EnvError(f"action: got {action}, expected finite numbers")
