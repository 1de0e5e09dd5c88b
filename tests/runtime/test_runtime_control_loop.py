"""The control loop on a manual clock: deadlines, missed ticks, no drift."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.control.clock import ManualClock, MonotonicClock
from runtime.control.control_loop import ControlLoop

PERIOD_NS = 20_000_000


def run(costs_ns: list[int], *, slack_ns: int = 0) -> tuple[list[int], list[int], ControlLoop]:
    """Run one tick per cost; the ticks that ran and the times at which they began."""
    clock = ManualClock(123)
    loop = ControlLoop(clock, PERIOD_NS / 1e9)
    ticks: list[int] = []
    starts: list[int] = []

    def step(tick: int) -> bool:
        ticks.append(tick)
        starts.append(clock.now_ns() - 123)
        clock.advance_ns(costs_ns[len(ticks) - 1])
        return len(ticks) < len(costs_ns)

    loop.run(step, slack=(lambda _: clock.advance_ns(slack_ns)) if slack_ns else None)
    return ticks, starts, loop


@given(st.lists(st.integers(0, 5 * PERIOD_NS), min_size=1, max_size=60))
def test_every_tick_starts_near_its_own_deadline_or_is_skipped(costs_ns: list[int]) -> None:
    ticks, starts, loop = run(costs_ns)
    for tick, start in zip(ticks, starts, strict=True):
        assert 0 <= start - tick * PERIOD_NS <= PERIOD_NS // 2
    assert all(b - a >= PERIOD_NS // 2 for a, b in itertools.pairwise(starts))
    assert ticks == sorted(set(ticks))
    statistics = loop.statistics()
    assert statistics.ticks == len(costs_ns)
    assert statistics.missed_ticks == ticks[-1] + 1 - len(ticks)


def test_ten_thousand_ticks_do_not_drift() -> None:
    ticks, starts, loop = run([7_000_000] * 10_000)
    assert ticks[-1] == 9_999
    assert starts[-1] == 9_999 * PERIOD_NS
    assert loop.statistics().missed_ticks == 0


def test_an_overrun_skips_ticks_and_does_not_bunch_them() -> None:
    ticks, starts, loop = run([0, int(3.6 * PERIOD_NS), 0, 0])
    assert ticks == [0, 1, 5, 6]
    assert loop.statistics().missed_ticks == 3
    assert starts[2:] == [5 * PERIOD_NS, 6 * PERIOD_NS]


def test_a_tick_less_than_half_a_period_late_still_runs() -> None:
    ticks, starts, loop = run([PERIOD_NS + 1, 0, 0])
    assert ticks == [0, 1, 2]
    assert starts == [0, PERIOD_NS + 1, 2 * PERIOD_NS]
    assert loop.statistics().missed_ticks == 0


def test_an_overrun_of_the_last_tick_misses_none_beyond_the_end() -> None:
    clock = ManualClock()
    loop = ControlLoop(clock, PERIOD_NS / 1e9)
    loop.run(lambda tick: clock.advance_ns(100 * PERIOD_NS if tick == 9 else 0), 10)
    assert loop.statistics().missed_ticks == 0


def test_a_step_that_takes_exactly_a_period_misses_nothing() -> None:
    ticks, _, loop = run([PERIOD_NS] * 5)
    assert ticks == [0, 1, 2, 3, 4]
    assert loop.statistics().missed_ticks == 0


def test_lateness_is_taken_after_the_step_and_before_the_slack() -> None:
    _, _, loop = run([1_000, 2_000, 3_000], slack_ns=5_000_000)
    assert loop.lateness_ns().tolist() == [1_000, 2_000, 3_000]


def test_slack_counts_towards_an_overrun() -> None:
    ticks, _, loop = run([0, 0, 0], slack_ns=int(1.6 * PERIOD_NS))
    assert ticks == [0, 2, 4]
    assert loop.statistics().missed_ticks == 2


def test_max_ticks_stop_and_errors_end_the_loop() -> None:
    loop = ControlLoop(ManualClock(), 0.02)
    seen: list[int] = []
    loop.run(seen.append, 3)
    assert seen == [0, 1, 2]
    loop.run(lambda tick: loop.stop())
    assert loop.statistics().ticks == 4

    def fails(tick: int) -> bool:
        raise RuntimeError("the step's own")

    with pytest.raises(RuntimeError, match="the step's own"):
        loop.run(fails)


def test_the_monotonic_clock_never_returns_early() -> None:
    clock = MonotonicClock(spin_ns=50_000)
    for delay_ns in (0, 10_000, 300_000, 2_000_000):
        deadline_ns = clock.now_ns() + delay_ns
        clock.wait_until_ns(deadline_ns)
        assert clock.now_ns() >= deadline_ns


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="period_s: got 0, expected a positive"):
        ControlLoop(ManualClock(), 0)
    with pytest.raises(ValueError, match="spin_ns: got -1"):
        MonotonicClock(-1)
    with pytest.raises(ValueError, match="duration_ns: got -5"):
        ManualClock().advance_ns(-5)
