"""Timing of the control loop: lateness samples, waits that signals interrupt, no allocation."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from runtime.control.clock import ManualClock
from runtime.control.control_loop import ControlLoop

ROOT = Path(__file__).resolve().parents[2]


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
