"""The executor against a naive model, over a loop whose clock is moved by hand.

The model keeps a dict per tick and does what the definitions say, one number at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from policies.types import ActionChunk, PolicyContract
from runtime.control.blending import Strategy, make_strategy
from runtime.control.chunk_executor import ChunkExecutor
from runtime.control.clock import ManualClock
from runtime.control.control_loop import ControlLoop

T = 8
PERIOD_NS = 20_000_000
CONTRACT = PolicyContract(
    policy_type="test",
    cameras=(),
    state_dim=1,
    action_dim=1,
    chunk_size=T,
    n_action_steps=T,
    dt_s=PERIOD_NS / 1e9,
)


def smooth(x: float) -> float:
    x = min(1.0, x)
    return 3 * x**2 - 2 * x**3


@dataclass
class Naive:
    """Everything by its definition."""

    strategy: Strategy
    contributions: dict[int, list[float]] = field(default_factory=dict)
    value: dict[int, float] = field(default_factory=dict)
    newest: int = -1
    next_tick: int = 0
    window_end: int = 0
    last: float | None = None

    def accept(self, chunk: ActionChunk) -> bool:
        if chunk.obs_timestep <= self.newest:
            return False
        self.newest = chunk.obs_timestep
        first = chunk.obs_timestep + chunk.first_action_offset
        end = first + len(chunk)
        start = max(first, self.next_tick)
        if self.strategy.windowed:
            start = max(start, self.window_end)
            self.window_end = max(self.window_end, min(start + self.strategy.stride, end))
        if start >= end:
            return True
        before = self.value.get(start - 1)
        if before is None and start == self.next_tick:
            before = self.last
        new = {t: float(chunk.actions[t - first, 0]) for t in range(start, end)}
        for tick, action in new.items():
            self.value[tick] = self._combined(tick, tick - start, action)
        if self.strategy.aligned and before is not None:
            step = new[start + 1] - new[start] if start + 1 < end else 0.0
            offset = before - (new[start] - step)
            fade = min(self.strategy.coefficient, end - start)
            for tick in new:
                self.value[tick] += offset * (1 - smooth((tick - start + 1) / (fade + 1)))
        return True

    def _combined(self, tick: int, index: int, action: float) -> float:
        c = self.strategy.coefficient
        olds = self.contributions.setdefault(tick, [])
        olds.append(action)
        planned = self.value.get(tick)
        if planned is None:
            return action
        match self.strategy.blend.__name__:
            case "replace":
                return action
            case "ensemble":
                weights = [math.exp(-c * i) for i in range(len(olds))]
                return sum(w * a for w, a in zip(weights, olds, strict=True)) / sum(weights)
            case "overlap":
                return (1 - c) * action + c * planned
            case "crossfade":
                weight = smooth((index + 1) / (c + 1))
                return weight * action + (1 - weight) * planned
        raise AssertionError(self.strategy.blend)

    def command(self, tick: int) -> float:
        assert tick >= self.next_tick
        self.next_tick = tick + 1
        self.last = self.value.get(tick, self.last)
        assert self.last is not None
        return self.last

    def reset(self) -> None:
        self.__init__(self.strategy)


strategies = st.one_of(
    st.builds(
        make_strategy,
        st.just("temporal_ensemble"),
        chunk_size=st.just(T),
        n_action_steps=st.just(T),
        coefficient=st.floats(0, 1),
    ),
    st.builds(
        make_strategy,
        st.sampled_from(("sequential", "latest", "overlap", "crossfade", "align_fade")),
        chunk_size=st.just(T),
        n_action_steps=st.integers(1, T),
    ),
)


@dataclass(frozen=True)
class Arrival:
    """A chunk that comes in some step, and how old its observation is."""

    age: int
    length: int
    offset: int
    values: tuple[float, ...]


arrivals = st.builds(
    Arrival,
    age=st.integers(0, T + 3),
    length=st.integers(1, T),
    offset=st.integers(0, 2),
    values=st.tuples(*[st.floats(-3, 3, width=32)] * T),
)
steps = st.lists(
    st.tuples(
        st.lists(arrivals, max_size=2),
        st.sampled_from((0.1, 0.1, 0.1, 0.9, 2.7)),  # what the step costs, in periods
        st.sampled_from((False,) * 19 + (True,)),  # whether the episode ends with it
    ),
    min_size=1,
    max_size=60,
)


def actions(arrival: Arrival, obs_timestep: int) -> ActionChunk:
    values = np.array(arrival.values[: arrival.length], np.float32)[:, None]
    return ActionChunk(values, obs_timestep, first_action_offset=arrival.offset)


@given(strategy=strategies, script=steps)
def test_the_executor_is_its_definition(
    strategy: Strategy, script: list[tuple[list[Arrival], float, bool]]
) -> None:
    """Gaps, late and out-of-order chunks, missed ticks, many times round the ring."""
    # The contract's offset is the longest in the script: it says how far the ring must reach.
    executor = ChunkExecutor(replace(CONTRACT, first_action_offset=2), strategy)
    naive = Naive(strategy)
    clock = ManualClock()
    loop = ControlLoop(clock, PERIOD_NS / 1e9)
    remaining = iter(script)

    def step(tick: int) -> bool:
        coming, cost, ends = next(remaining, ([], 0.0, True))
        for arrival in coming:
            chunk = actions(arrival, max(0, tick - arrival.age))
            assert executor.accept(chunk) == naive.accept(chunk)
        assert executor.covers(tick) == (tick in naive.value)
        if tick in naive.value or naive.last is not None:
            expected = naive.command(tick)
            assert executor.command(tick)[0] == pytest.approx(expected, rel=1e-5, abs=1e-5)
            event("starved" if tick not in naive.value else "played")
        clock.advance_ns(round(cost * PERIOD_NS))
        return not ends

    for _ in range(4):
        loop.run(step)
        executor.reset()
        naive.reset()


def test_a_flush_waits_for_a_new_observation() -> None:
    strategy = make_strategy("sequential", chunk_size=T, n_action_steps=4)
    executor = ChunkExecutor(CONTRACT, strategy)
    chunk = ActionChunk(np.ones((T, 1), np.float32), 0)
    executor.requested(0)
    executor.accept(chunk)
    for tick in range(3):
        executor.command(tick)
    executor.flush()
    assert not executor.covers(3)
    assert executor.wants_chunk(3)
    assert not executor.accept(ActionChunk(chunk.actions, 1))  # it was on its way
    assert executor.accept(ActionChunk(chunk.actions, 2))
    assert executor.covers(3)


def test_a_chunk_takes_over_at_once_where_that_is_asked_for() -> None:
    strategy = make_strategy("sequential", chunk_size=T, n_action_steps=T)
    executor = ChunkExecutor(CONTRACT, strategy)
    executor.accept(ActionChunk(np.zeros((T, 1), np.float32), 0))
    executor.command(0)
    executor.accept(ActionChunk(np.ones((T, 1), np.float32), 1), at_once=True)
    assert executor.command(1)[0] == 1


def test_a_seam_that_is_aligned_goes_on_at_the_new_chunks_speed() -> None:
    strategy = make_strategy("align_fade", chunk_size=T, n_action_steps=T, coefficient=4)
    executor = ChunkExecutor(CONTRACT, strategy)
    ramp = np.arange(T, dtype=np.float32)[:, None]
    executor.accept(ActionChunk(ramp, 0))
    executor.accept(ActionChunk(ramp + 100.0, 6))  # from tick 8 on: 102, 103, …
    got = [float(executor.command(tick)[0]) for tick in range(6 + T)]
    assert got[:8] == list(range(8))
    assert abs(got[8] - 8) < 0.15 * (102 - 8)
    assert got[12:] == [106, 107]
    assert executor.statistics().seam_jump < 0.15 * (102 - 8)


def test_aligning_needs_positions() -> None:
    strategy = make_strategy("align_fade", chunk_size=T, n_action_steps=T)
    delta = replace(CONTRACT, ctrl_type="delta")
    with pytest.raises(ValueError, match="action manager: got 'align_fade' for actions that are"):
        ChunkExecutor(delta, strategy)
