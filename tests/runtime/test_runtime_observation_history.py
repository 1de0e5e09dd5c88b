"""A policy that takes several ticks gets consecutive ones, wherever it runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from envs.fake_world import FakeWorld
from policies.errors import ContractMismatch
from policies.types import ActionChunk, MetaObs, RolloutPolicy
from runtime.control.blending import make_strategy
from runtime.control.chunk_executor import ChunkExecutor
from runtime.control.observation_history import ObservationHistory, stack_ticks
from runtime.eval_sim.episode import run_lockstep, run_realtime
from runtime.eval_sim.in_process_policy import InProcessPolicy
from runtime.eval_sim.world_compatibility import check_world
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import CHUNK, CONTRACT, ToyPolicy, observation

TICKS = 24


class CountingWorld(FakeWorld):
    """Its state and its picture are the number of its tick; notes which ticks were observed."""

    def __init__(self) -> None:
        super().__init__(camera_hw={"top": (24, 32)}, max_timesteps=TICKS)
        self.observed: list[int] = []

    def observe(self, out: Any = None) -> MetaObs:
        obs = super().observe(out)
        obs.state[:] = self._timestep
        obs.images["top"][:] = self._timestep
        self.observed.append(self._timestep)
        return obs


class TickPolicy(ToyPolicy):
    """Notes the ticks of every observation: as its state and as its pictures say."""

    def __init__(self, n_obs_steps: int, seen: list[Any] | None = None) -> None:
        super().__init__()
        self.contract = dataclasses.replace(CONTRACT, n_obs_steps=n_obs_steps)
        self.seen: list[Any] = [] if seen is None else seen

    def infer(self, obs: MetaObs) -> ActionChunk:
        states, pictures = obs.state[:, 0].astype(int), obs.images["top"][:, 0, 0, 0]
        self.seen.append((obs.timestep, states.tolist(), pictures.tolist()))
        actions = np.tile(obs.state[-1], (CHUNK, 1))
        return ActionChunk(actions, obs.timestep, obs.t_capture_ns)

    def fork(self) -> TickPolicy:
        return TickPolicy(self.contract.n_obs_steps, self.seen)


def executor(stride: int) -> ChunkExecutor:
    strategy = make_strategy("sequential", chunk_size=CHUNK, n_action_steps=CHUNK, stride=stride)
    return ChunkExecutor(CONTRACT, strategy)


@contextlib.contextmanager
def reached(policy: TickPolicy, transport: str) -> Iterator[RolloutPolicy]:
    """``policy``, in this process or served; what its warm-up saw is forgotten."""
    if transport == "in process":
        yield InProcessPolicy(policy)
        return
    with serving(policy) as server, connect(server, transport) as client:
        check_world(CountingWorld(), client, client.contract)
        policy.seen.clear()
        yield client


@pytest.mark.parametrize("transport", ["in process", "shm", "zmq"])
@pytest.mark.parametrize(("n_obs_steps", "stride"), [(2, 1), (2, 5), (3, 2), (5, 10)])
def test_lockstep_gives_the_last_ticks(transport: str, n_obs_steps: int, stride: int) -> None:
    policy, world = TickPolicy(n_obs_steps), CountingWorld()
    with reached(policy, transport) as reachable:
        for seed in (0, 1):  # the second episode has nothing of the first
            policy.seen.clear()
            run_lockstep(reachable, world, executor(stride), seed)
            asked = range(0, TICKS, stride)
            wanted = [[max(0, t - back) for back in reversed(range(n_obs_steps))] for t in asked]
            assert policy.seen == [(t, w, w) for t, w in zip(asked, wanted, strict=True)]


def test_lockstep_observes_only_ticks_that_a_request_has() -> None:
    world = CountingWorld()
    run_lockstep(InProcessPolicy(TickPolicy(2)), world, executor(8), 0)
    assert world.observed == [0, 7, 8, 15, 16, 23]
    world = CountingWorld()
    run_lockstep(InProcessPolicy(ToyPolicy()), world, executor(8), 0)
    assert world.observed == [0, 8, 16]


def test_real_time_gives_the_last_ticks() -> None:
    policy = TickPolicy(3)
    with reached(policy, "shm") as client:
        world = CountingWorld()
        run_realtime(client, world, executor(5), 0)  # type: ignore[arg-type]
    assert len(policy.seen) > 2
    assert policy.seen[0] == (0, [0, 0, 0], [0, 0, 0])
    for tick, states, pictures in policy.seen:
        # A tick that was missed was not observed, and has the one before it.
        known = [max(t for t in world.observed if t <= max(0, tick - back)) for back in (2, 1, 0)]
        assert states == pictures == known
        assert states[-1] == tick


def test_a_missed_tick_has_the_one_before_it() -> None:
    history = ObservationHistory(3)
    for tick, expected in ((0, [0, 0, 0]), (1, [0, 0, 1]), (2, [0, 1, 2]), (5, [2, 2, 5])):
        history.add(observation(tick, timestep=tick, shade=tick))
        stacked = history.stacked()
        assert stacked.state[:, 3].tolist() == expected
        assert stacked.images["top"][:, 0, 0, 0].tolist() == expected
        assert (stacked.timestep, stacked.t_capture_ns) == (tick, 12345 + tick)
    with pytest.raises(ValueError, match="timestep: got 5, expected more than 5"):
        history.add(observation(timestep=5))


def test_optional_arrays_are_stacked() -> None:
    one, other = (
        dataclasses.replace(
            observation(),
            state_ee=np.full(7, value, np.float32),
            depth={"top": np.full((24, 32), value, np.uint16)},
        )
        for value in (1, 2)
    )
    both = stack_ticks([one, other])
    assert both.state_ee is not None and both.state_ee[:, 0].tolist() == [1, 2]
    assert both.depth["top"][:, 0, 0].tolist() == [1, 2] and both.state_joint is None


def test_one_tick_for_a_policy_of_two_is_refused() -> None:
    with (
        serving(TickPolicy(2)) as server,
        connect(server) as client,
        pytest.raises(ContractMismatch, match=r"\(2, 24, 32, 3\), RGB, of 2 consecutive ticks"),
    ):
        client.infer(observation())


class DrawingPolicy(ToyPolicy):
    """Draws its actions."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = np.random.default_rng()

    def seed(self, seed: int) -> None:
        self._numbers = np.random.default_rng(seed)

    def infer(self, obs: MetaObs) -> ActionChunk:
        drawn = self._numbers.random(CONTRACT.action_dim, np.float32)
        return ActionChunk(np.tile(drawn, (CHUNK, 1)), obs.timestep, obs.t_capture_ns)

    def fork(self) -> DrawingPolicy:
        return DrawingPolicy()


def test_a_reset_with_a_seed_repeats_the_draws() -> None:
    def draw(policy: RolloutPolicy) -> float:
        return float(policy.infer(observation()).actions[0, 0])

    expected = np.random.default_rng(7).random(CONTRACT.action_dim, np.float32)[0]
    with serving(DrawingPolicy()) as server, connect(server) as one, connect(server) as other:
        one.reset(7)  # before the session opens
        for policy in (one, other, InProcessPolicy(DrawingPolicy())):
            if policy is not one:
                policy.reset(7)
            first, second = draw(policy), draw(policy)
            policy.reset(7)
            assert [first, draw(policy), draw(policy)] == [expected, expected, second]
        one.reset()
        assert draw(one) not in (first, second)  # without a seed the draws go on
        with pytest.raises(ValueError, match="seed: got -1"):
            one.reset(-1)
