"""Chunks in time: laws of the blending, and the executor against a naive model."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.types import ActionChunk, PolicyContract
from runtime.control.blending import ILSTUDIO_NAMES, STRATEGIES, Strategy, ensemble, make_strategy
from runtime.control.chunk_executor import ChunkExecutor

T, A = 10, 3
REFERENCE = Path(
    os.environ.get("METRONOME_REFERENCE", Path(__file__).parents[3] / "shared" / "fixtures")
)


def contract(chunk_size: int = T, action_dim: int = A, dt_s: float = 0.02) -> PolicyContract:
    return PolicyContract(
        policy_type="test",
        cameras=(),
        state_dim=A,
        action_dim=action_dim,
        chunk_size=chunk_size,
        n_action_steps=chunk_size,
        dt_s=dt_s,
    )


def strategy(name: str, **options: float) -> Strategy:
    return make_strategy(name, chunk_size=T, n_action_steps=T, **options)


def chunk(obs_timestep: int, value: float | None = None, length: int = T) -> ActionChunk:
    """Action i says 1000·obs + i, or ``value``, so that every command tells where it is from."""
    base = np.arange(length, dtype=np.float32)[:, None] + 1000.0 * obs_timestep
    actions = np.repeat(base, A, axis=1) if value is None else np.full((length, A), value)
    return ActionChunk(actions.astype(np.float32), obs_timestep)


def played(executor: ChunkExecutor, tick: int) -> float:
    command = executor.command(tick)
    assert len(set(command.tolist())) == 1
    return float(command[0])


# sequential


def test_sequential_in_lockstep_plays_n_action_steps_of_each_chunk() -> None:
    executor = ChunkExecutor(contract(), strategy("sequential", stride=4))
    got, asked = [], []
    for tick in range(12):
        if executor.wants_chunk(tick):
            asked.append(tick)
            executor.requested(tick)
            executor.accept(chunk(tick))
        got.append(played(executor, tick))
    assert asked == [0, 4, 8]
    assert got == [o * 1000 + i for o in asked for i in range(4)]
    assert executor.statistics().starved_ticks == 0


def test_sequential_takes_over_at_the_window_with_the_measured_delay() -> None:
    executor = ChunkExecutor(contract(), strategy("sequential", stride=4))
    executor.requested(0)
    executor.accept(chunk(0))
    got = [played(executor, tick) for tick in (0, 1)]
    assert executor.wants_chunk(2, latency_ticks=2)
    executor.requested(2)
    assert not executor.wants_chunk(3, latency_ticks=2)  # asked already
    got.append(played(executor, 2))
    executor.accept(chunk(2))  # early: it waits for its turn
    got += [played(executor, tick) for tick in range(3, 8)]
    # Ticks 4 to 7 are actions [d, d + n) of the second chunk, d = 2.
    assert got == [0, 1, 2, 3, 2002, 2003, 2004, 2005]


def test_sequential_plays_on_when_the_next_chunk_is_late() -> None:
    executor = ChunkExecutor(contract(), strategy("sequential", stride=4))
    executor.requested(0)
    executor.accept(chunk(0))
    got = [played(executor, tick) for tick in range(6)]  # 4 and 5 are the tail
    executor.accept(chunk(3))
    got.append(played(executor, 6))
    assert got == [0, 1, 2, 3, 4, 5, 3003]
    assert executor.statistics().discarded_actions == 3
    assert executor.statistics().starved_ticks == 0


def test_a_delay_beyond_the_window_requests_a_chunk_before_starving() -> None:
    executor = ChunkExecutor(contract(), strategy("sequential", stride=T))
    executor.requested(0)
    executor.accept(chunk(0))
    for tick in range(8):
        executor.command(tick)
    executor.requested(8)
    executor.command(8)
    executor.command(9)
    executor.accept(chunk(8))  # takes over at 10; has actions until 17, not until 19
    assert not executor.wants_chunk(10, latency_ticks=7)
    assert executor.wants_chunk(11, latency_ticks=7)


def test_starving_repeats_the_last_command_and_is_counted() -> None:
    executor = ChunkExecutor(contract(), strategy("sequential"))
    executor.accept(chunk(0))
    got = [played(executor, tick) for tick in range(T + 3)]
    assert got[T:] == [T - 1] * 3
    assert executor.statistics().starved_ticks == 3
    assert not executor.covers(T)


# order and time


def test_only_newer_chunks_are_accepted() -> None:
    executor = ChunkExecutor(contract(), strategy("latest"))
    assert executor.accept(chunk(5))
    assert not executor.accept(chunk(5))
    assert not executor.accept(chunk(4))
    assert executor.statistics().dropped_stale == 2
    assert played(executor, 6) == 5001


def test_actions_that_arrive_after_their_tick_are_discarded() -> None:
    executor = ChunkExecutor(contract(), strategy("latest"))
    executor.accept(chunk(0))
    for tick in range(7):
        executor.command(tick)
    executor.accept(chunk(1))
    assert executor.statistics().discarded_actions == 6
    assert played(executor, 7) == 1006


def test_a_tick_is_emitted_once() -> None:
    executor = ChunkExecutor(contract(), strategy("latest"))
    executor.accept(chunk(0))
    executor.command(3)
    with pytest.raises(ValueError, match="tick: got 3, expected at least 4"):
        executor.command(3)


def test_before_the_first_chunk_there_is_no_command() -> None:
    executor = ChunkExecutor(contract(), strategy("latest"))
    with pytest.raises(LookupError, match="no chunk has come yet, at tick 0"):
        executor.command(0)


def test_first_action_offset_shifts_the_chunk() -> None:
    executor = ChunkExecutor(contract(), strategy("latest"))
    executor.accept(ActionChunk(chunk(0).actions, 0, first_action_offset=2))
    assert not executor.covers(1)
    assert played(executor, 2) == 0


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((T, A + 1)), r"got shape \(10, 4\), expected \(<= 10, 3\)"),
        (np.zeros((T + 1, A)), "got 11 actions, expected 1 to 10"),
        (np.zeros((0, A)), "got 0 actions"),
        (np.full((T, A), np.nan), "got NaN or infinity"),
    ],
)
def test_a_bad_chunk_is_refused_and_the_plan_stays(actions: np.ndarray, message: str) -> None:
    executor = ChunkExecutor(contract(), strategy("latest"))
    executor.accept(chunk(0))
    with pytest.raises(ValueError, match=message):
        executor.accept(ActionChunk(actions.astype(np.float32), 1))
    assert played(executor, 0) == 0


def test_reset_forgets_the_episode() -> None:
    executor = ChunkExecutor(contract(), strategy("sequential"))
    executor.requested(0)
    executor.accept(chunk(0))
    executor.command(5)
    executor.reset()
    assert executor.wants_chunk(0)
    assert executor.accept(chunk(0))
    assert played(executor, 0) == 0
    assert executor.statistics().chunks == 1


def test_a_chunk_is_requested_early_when_the_plan_ends_before_the_answer() -> None:
    executor = ChunkExecutor(contract(), strategy("TemporalOlderManager"))  # every 8th tick
    executor.requested(0)
    executor.accept(chunk(0))
    assert not executor.wants_chunk(6, latency_ticks=3)
    assert executor.wants_chunk(7, latency_ticks=3)  # the plan ends with tick 9
    executor.requested(7)
    assert not executor.wants_chunk(7, latency_ticks=3)


def test_starving_with_deltas_commands_no_motion() -> None:
    delta = dataclasses.replace(contract(), ctrl_type="delta")
    executor = ChunkExecutor(delta, strategy("sequential"))
    executor.accept(chunk(0, 0.5))
    assert played(executor, T - 1) == 0.5
    assert played(executor, T) == 0.0


def test_a_command_is_as_old_as_its_observation_also_when_starving() -> None:
    executor = ChunkExecutor(contract(), strategy("latest"))
    executor.accept(chunk(2))
    executor.command(5)
    assert executor.last_source == 2
    executor.command(40)
    assert executor.last_source == 2
    assert executor.statistics().staleness_ticks == 38


def test_seam_jump_is_relative_to_the_replaced_plan() -> None:
    executor = ChunkExecutor(contract(), strategy("latest"))
    executor.accept(chunk(0, 1.0))
    executor.command(0)
    executor.accept(chunk(1, 1.5))
    assert executor.statistics().seam_jump == pytest.approx(0.5)


def test_a_ramp_without_a_seam_has_no_jump_but_its_own_step() -> None:
    executor = ChunkExecutor(contract(), strategy("sequential", stride=T))
    ramp = np.repeat(np.arange(3 * T, dtype=np.float32)[:, None], A, axis=1)
    executor.requested(0)
    executor.accept(ActionChunk(ramp[:T], 0))
    for tick in range(T - 2):
        executor.command(tick)
    executor.accept(ActionChunk(ramp[T - 2 : 2 * T - 2], T - 2))  # early; takes over at tick T
    assert executor.statistics().seam_jump == pytest.approx(1.0)


# blending


@given(m=st.floats(0, 2), values=st.lists(st.floats(-10, 10), min_size=1, max_size=30))
def test_the_ensemble_is_the_weighted_mean_of_its_definition(m: float, values: list[float]) -> None:
    planned = np.zeros((1, 1))
    for rank, value in enumerate(values):
        ensemble(planned, np.array([[value]]), np.array([rank]), m)
    weights = np.exp(-m * np.arange(len(values)))
    expected = float((weights * values).sum() / weights.sum())
    assert planned[0, 0] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    m=st.floats(-1, 1),
    arrivals=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=40),
    value=st.floats(-3, 3),
)
def test_equal_chunks_blend_to_themselves(
    m: float, arrivals: list[tuple[int, int]], value: float
) -> None:
    """The weights sum to one, whatever the gaps and the order."""
    for name, options in (
        ("temporal_ensemble", {"coefficient": m}),
        ("overlap", {}),
        ("latest", {}),
    ):
        executor = ChunkExecutor(contract(), strategy(name, **options))
        tick = -1
        for gap, age in arrivals:
            tick += gap + 1
            executor.accept(chunk(max(0, tick - age), value))
            if executor.covers(tick):
                assert executor.command(tick) == pytest.approx(np.full(A, value), abs=1e-5)


@given(
    m=st.floats(-1, 1),
    arrivals=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=40),
)
def test_the_ensemble_agrees_with_a_naive_model(m: float, arrivals: list[tuple[int, int]]) -> None:
    """Gaps, late and out-of-order chunks, and ticks that wrap around the ring."""
    executor = ChunkExecutor(contract(), strategy("temporal_ensemble", coefficient=m))
    accepted: list[tuple[ActionChunk, int]] = []
    tick, newest = -1, -1
    for gap, age in arrivals:
        tick += gap + 1
        arriving = chunk(max(0, tick - age))
        assert executor.accept(arriving) == (arriving.obs_timestep > newest)
        if arriving.obs_timestep > newest:
            newest = arriving.obs_timestep
            accepted.append((arriving, tick))
        covering = [
            c.actions[tick - c.obs_timestep]
            for c, _ in accepted
            if c.obs_timestep <= tick < c.obs_timestep + T
        ]
        assert executor.covers(tick) == bool(covering)
        if covering:
            weights = np.exp(-m * np.arange(len(covering)))[:, None]
            expected = (weights * covering).sum(0) / weights.sum()
            np.testing.assert_allclose(executor.command(tick), expected, rtol=1e-5)


@pytest.mark.needs_reference
def test_the_ensemble_matches_the_reference_series() -> None:
    path = REFERENCE / "temporal_ensemble.npz"
    if not path.exists():
        pytest.skip("the reference series is not beside this clone")
    with np.load(path) as reference:
        chunks, expected, m = reference["chunks"], reference["actions"], float(reference["coeff"])
    n, horizon, dim = chunks.shape
    executor = ChunkExecutor(
        contract(horizon, dim),
        make_strategy(
            "temporal_ensemble", chunk_size=horizon, n_action_steps=horizon, coefficient=m
        ),
    )
    got = np.empty((n, dim))
    for tick in range(n):
        executor.accept(ActionChunk(chunks[tick].astype(np.float32), tick))
        got[tick] = executor.command(tick)
    assert np.abs(got - expected).max() / np.abs(expected).max() <= 1e-5


def test_ilstudio_names_have_their_intended_meaning() -> None:
    first = strategy("OlderFirstManager", coefficient=0.5)
    assert (first.stride, first.windowed) == (5, True)
    older = strategy("TemporalOlderManager", coefficient=0.2)
    assert (older.stride, older.coefficient, older.blend.__name__) == (8, 0.2, "overlap")
    assert strategy("BasicActionManager").blend is strategy("latest").blend
    overlap = ChunkExecutor(contract(), strategy("TemporalAggManager", coefficient=0.25))
    overlap.accept(chunk(0, 1.0))
    overlap.accept(chunk(1, 2.0))
    assert played(overlap, 1) == pytest.approx(0.75 * 2.0 + 0.25 * 1.0)


def test_delay_free_plays_c_seconds_per_step() -> None:
    executor = ChunkExecutor(contract(), strategy("DelayFreeManager", coefficient=0.05))
    executor.accept(chunk(0))
    assert [played(executor, t) for t in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fastest", {}, "action_manager: got 'fastest', expected one of"),
        ("sequential", {"stride": 11}, "n_action_steps: got 11, expected 1 to chunk_size = 10"),
        ("overlap", {"coefficient": 1.5}, "manager_coef: got 1.5, expected 0 to 1 for overlap"),
        ("temporal_ensemble", {"coefficient": math.nan}, "manager_coef: got nan"),
        ("sequential", {"coefficient": 0.1}, "manager_coef: got 0.1, expected none: sequential"),
        (
            "DelayFreeManager",
            {"coefficient": 0.0},
            "got 0.0, expected more than 0, at most 100",
        ),
    ],
)
def test_a_bad_strategy_is_refused(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy(name, **options)


def test_every_name_makes_a_strategy() -> None:
    for name in STRATEGIES + ILSTUDIO_NAMES:
        assert 1 <= strategy(name).stride <= T
