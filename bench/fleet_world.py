"""A world whose episode sleeps for a second, and a policy that costs nothing: only the fleet works.

``-m python:bench.fleet_world:make -e gym:bench.fleet_world:Sleeping-v0``
"""

from __future__ import annotations

import time
from typing import Any

import gymnasium
import numpy as np

from policies.types import ActionChunk, MetaObs, PolicyContract, PolicyInfo

EPISODE_S = 1.0
DT_S = 0.02


class SleepingEnv(gymnasium.Env):
    """One step, which takes ``EPISODE_S``."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1 / DT_S}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        time.sleep(EPISODE_S)
        return np.zeros(1, np.float32), 1.0, True, False, {}

    def render(self) -> Any:
        return np.zeros((24, 32, 3), np.uint8)


gymnasium.register("Sleeping-v0", SleepingEnv)


class FreePolicy:
    """Commands zeros at once."""

    contract = PolicyContract(
        policy_type="free",
        cameras=(),
        state_dim=1,
        action_dim=1,
        chunk_size=1,
        n_action_steps=1,
        dt_s=DT_S,
    )
    info = PolicyInfo("free", engine="numpy", trained=False)

    def infer(self, obs: MetaObs) -> ActionChunk:
        return ActionChunk(np.zeros((1, 1), np.float32), obs.timestep, obs.t_capture_ns)

    def reset(self) -> None:
        pass

    def fork(self) -> FreePolicy:
        return self

    def close(self) -> None:
        pass


def make() -> FreePolicy:
    return FreePolicy()
