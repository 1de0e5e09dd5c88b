"""Pausing on the grid, waits that signals interrupt, and no allocation."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.control.clock import ManualClock
from runtime.control.control_loop import ControlLoop

ROOT = Path(__file__).resolve().parents[2]
PERIOD_NS = 20_000_000


@given(st.lists(st.integers(0, 3 * PERIOD_NS), min_size=1, max_size=20))
def test_a_pause_takes_whole_periods_and_no_ticks(idle_costs_ns: list[int]) -> None:
    clock = ManualClock()
    loop = ControlLoop(clock, PERIOD_NS / 1e9)
    ticks: list[int] = []
    starts: list[int] = []
    costs = iter(idle_costs_ns)

    def step(tick: int) -> bool:
        ticks.append(tick)
        starts.append(clock.now_ns())
        clock.advance_ns(PERIOD_NS // 10)
        if tick == 2:
            loop.pause()
            assert loop.paused
        return tick < 6

    def idle() -> None:
        assert ticks == [0, 1, 2]
        cost_ns = next(costs, None)
        if cost_ns is None:
            loop.resume()
        else:
            clock.advance_ns(cost_ns)

    loop.run(step, idle=idle)
    said = loop.statistics()
    assert ticks == list(range(7))
    assert said.missed_ticks == 0
    assert said.paused_periods >= len(idle_costs_ns) + 1
    # The first may be late by what the last period cost; the grid is where it was.
    assert all(start % PERIOD_NS == 0 for start in starts[4:])
    assert starts[6] - starts[4] == 2 * PERIOD_NS


def test_idle_can_end_the_loop_and_so_can_stop_without_it() -> None:
    loop = ControlLoop(ManualClock(), 0.02)
    loop.pause()
    loop.run(lambda tick: pytest.fail("paused"), idle=lambda: False)
    assert loop.statistics().ticks == 0

    class Stopping(ManualClock):
        def wait_until_ns(self, deadline_ns: int) -> None:
            super().wait_until_ns(deadline_ns)
            if deadline_ns > 5 * PERIOD_NS:
                waiting.stop()

    waiting = ControlLoop(Stopping(), 0.02)
    waiting.pause()
    waiting.run(lambda tick: pytest.fail("paused"))
    assert waiting.statistics().paused_periods == 7


def test_the_newest_samples_are_kept_in_order() -> None:
    clock = ManualClock()
    loop = ControlLoop(clock, 0.02, capacity=4)
    loop.run(clock.advance_ns, 7)
    assert loop.lateness_ns().tolist() == [3, 4, 5, 6]
    assert loop.statistics().lateness.count == 4


def test_a_tick_allocates_nothing_that_stays() -> None:
    loop = ControlLoop(ManualClock(), 0.02, capacity=10_000)
    blocks: dict[int, int] = {}

    def step(tick: int) -> None:
        if tick in (1000, 2000):
            blocks[tick] = sys.getallocatedblocks()

    loop.run(step, 2001)
    assert blocks[2000] - blocks[1000] <= 5  # the dict's own


def with_alarms(body: str) -> None:
    """Run ``body`` in a process of its own, with SIGALRM every 2 ms once it calls ``alarm``.

    Of its own, because a signal's handler runs on whatever stack the libraries that other tests
    have loaded set aside for it, and that may be too small for any handler.
    """
    script = f"""
import signal, time
from runtime.control.clock import MonotonicClock

def alarm(handler):
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)

{textwrap.dedent(body)}
signal.setitimer(signal.ITIMER_REAL, 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("spin_ns", [0, 100_000])
def test_a_signal_does_not_shorten_a_wait(spin_ns: int) -> None:
    with_alarms(f"""
        heard = []
        clock = MonotonicClock({spin_ns})
        alarm(lambda number, frame: heard.append(number))
        deadline_ns = clock.now_ns() + 30_000_000
        clock.wait_until_ns(deadline_ns)
        assert time.monotonic_ns() >= deadline_ns
        assert heard
    """)


def test_what_a_handler_raises_ends_the_wait() -> None:
    with_alarms("""
        def interrupt(number, frame):
            raise KeyboardInterrupt

        alarm(interrupt)
        try:
            MonotonicClock().wait_until_ns(time.monotonic_ns() + 60_000_000_000)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("the wait went on")
    """)
