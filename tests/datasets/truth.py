"""What ``eval_sim --dataset`` has to record, from the same episodes seen by another observer."""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.factory import load_env_config, make_world
from envs.world import StepResult, World
from policies.types import Policy, RolloutPolicy
from runtime.control.chunk_executor import ChunkExecutor
from runtime.control.strategy_selection import choose_execution, strategy_of
from runtime.eval_sim.episode import run_lockstep
from runtime.eval_sim.in_process_policy import InProcessPolicy
from tests.datasets import two_camera_policy


class Witness:
    """Observes before every step."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Any]] = {}

    def before_step(self, world: World, command: np.ndarray, source: int, age_s: float) -> None:
        obs = world.observe()
        self._add("observation.state", obs.state.copy())
        for name, image in obs.images.items():
            self._add(f"observation.images.{name}", image.copy())
        self._add("action", command.copy())
        self._add("metronome.source_frame", source)
        self._add("metronome.action_age_s", age_s)

    def after_step(self, world: World, result: StepResult) -> None:
        self._add("next.reward", np.float32(result.reward))
        self._add("next.success", result.success)

    def _add(self, key: str, value: Any) -> None:
        self.seen.setdefault(key, []).append(value)


def episodes(
    env: str, overrides: dict[str, str], count: int, played: Policy | None = None
) -> list[dict[str, np.ndarray]]:
    """The columns of each episode, by seed from 0 on; ``played``: the policy of two cameras."""
    played = played or two_camera_policy.make()
    contract = played.contract
    config = load_env_config(env, overrides)
    world = make_world(config, cameras=contract.cameras, rendering=None)
    policy: RolloutPolicy = InProcessPolicy(played)
    execution = choose_execution(contract, None, None, None)
    executor = ChunkExecutor(contract, strategy_of(contract, execution))
    found = []
    for seed in range(count):
        witness = Witness()
        run_lockstep(policy, world, executor, seed, [witness])
        found.append({key: np.stack(values) for key, values in witness.seen.items()})
    world.close()
    return found
