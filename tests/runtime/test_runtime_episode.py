"""Episodes on the fake world: what is asked when, and what happens in ticks that were missed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from envs.fake_world import FakeWorld
from policies.errors import ContractMismatch
from policies.types import ActionChunk, MetaObs
from runtime.control.blending import make_strategy
from runtime.control.chunk_executor import ChunkExecutor
from runtime.errors import RuntimeFault
from runtime.eval_sim.episode import run_lockstep
from runtime.eval_sim.in_process_policy import InProcessPolicy
from runtime.eval_sim.world_compatibility import check_world
from runtime.latency_stats import LatencyEstimate
from tests.runtime.toy_policy import CHUNK, CONTRACT, ToyPolicy


class Oracle(ToyPolicy):
    """Knows the target and goes there; notes which ticks it was asked at."""

    def __init__(self, world: FakeWorld) -> None:
        super().__init__()
        self._world = world
        self.ticks: list[int] = []

    def infer(self, obs: MetaObs) -> ActionChunk:
        self.ticks.append(obs.timestep)
        actions = np.tile(self._world.target.astype(np.float32), (CHUNK, 1))
        return ActionChunk(actions, obs.timestep, obs.t_capture_ns)


def world(max_timesteps: int = 60) -> FakeWorld:
    return FakeWorld(camera_hw={"top": (24, 32)}, max_timesteps=max_timesteps)


def executor(stride: int) -> ChunkExecutor:
    strategy = make_strategy("sequential", chunk_size=CHUNK, n_action_steps=CHUNK, stride=stride)
    return ChunkExecutor(CONTRACT, strategy)


class Poses:
    """The pose after every step."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def before_step(self, *_: object) -> None:
        pass

    def after_step(self, world: FakeWorld, _: object) -> None:
        self.seen.append(world.snapshot())


def test_lockstep_reaches_the_target_and_stops_there() -> None:
    there = world()
    oracle = Oracle(there)
    poses = Poses()
    episode = run_lockstep(InProcessPolicy(oracle), there, executor(3), 5, [poses])
    assert episode.success
    assert episode.reward == 4.0
    assert oracle.ticks == list(range(0, episode.horizon, 3))
    assert len(poses.seen) == episode.horizon < 60
    assert episode.missed_ticks == episode.executor.starved_ticks == 0
    # Asked every third tick: no command is older than two of them.
    assert episode.action_age_s.max() == pytest.approx(0.04)


def test_a_failure_lasts_to_the_end() -> None:
    episode = run_lockstep(InProcessPolicy(ToyPolicy()), world(25), executor(10), 5)
    assert (episode.success, episode.horizon) == (False, 25)


def test_the_same_seed_is_the_same_episode() -> None:
    def poses(seed: int) -> list[object]:
        there = world()
        poses = Poses()
        policy = InProcessPolicy(Oracle(there))
        run_lockstep(policy, there, executor(4), seed, [poses])
        return [pose.tolist() for pose in poses.seen]

    assert poses(1) == poses(1)
    assert poses(1) != poses(2)


def test_asking_ahead_allows_for_twice_the_worst() -> None:
    estimate = LatencyEstimate(0.02, window=2)
    assert estimate.ticks() == 1
    estimate.add(30_000_000)
    assert estimate.ticks() == 4
    estimate.add(1_000_000)
    assert estimate.ticks() == 4
    estimate.add(1_000_000)  # the worst has left the window
    assert estimate.ticks() == 2


def test_a_world_that_does_not_fit_is_refused_before_the_first_episode() -> None:
    check_world(world(), ToyPolicy(), CONTRACT)
    other = FakeWorld(camera_hw={"top": (9, 9)})
    with pytest.raises(ContractMismatch, match=r"images.top: got uint8 \(9, 9, 3\)"):
        check_world(other, ToyPolicy(), CONTRACT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dt_s": 0.04}, "1/25 s apart, the world runs at 50 Hz"),
        ({"action_dim": 7}, "action_dim: the world has 14, the policy was trained with 7"),
        (
            {"ctrl_type": "delta"},
            r"commands \('joint', 'delta'\), the world takes \('joint', 'abs'\)",
        ),
        ({"ctrl_space": "ee"}, r"commands \('ee', 'abs'\)"),
        ({"first_action_offset": 2}, "first_action_offset: got 2, expected 0"),
    ],
)
def test_a_contract_that_the_world_cannot_serve(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeFault, match=message):
        check_world(world(), ToyPolicy(), dataclasses.replace(CONTRACT, **changes))


def test_a_chunk_for_another_tick_is_an_error() -> None:
    class Forgetful(ToyPolicy):
        def infer(self, obs: MetaObs) -> ActionChunk:
            return dataclasses.replace(super().infer(obs), obs_timestep=0)

    with pytest.raises(RuntimeFault, match="obs_timestep: got a chunk for tick 0, expected 10"):
        run_lockstep(InProcessPolicy(Forgetful()), world(), executor(10), 0)
