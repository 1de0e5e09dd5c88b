"""The server on another host: a network namespace behind a relay that delays, stalls and cuts."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.rig import PERIOD_S, Motion, Program, Server, evaluation, stop_s, twin, watchdog_s
from tests.hosts import INSIDE, NoOtherHost, other_host

SOAK = bool(os.environ.get("METRONOME_SOAK"))

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not SOAK, reason="METRONOME_SOAK is not set"),
]


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, ...]]:
    """What to put before a command that shall run on another host."""
    with contextlib.ExitStack() as stack:
        try:
            prefix = stack.enter_context(other_host())
        except NoOtherHost as error:
            pytest.skip(str(error))
        yield prefix


def test_delay_stall_and_cut(elsewhere: tuple[str, ...], tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        arm = stack.enter_context(twin())
        server = stack.enter_context(Server("make_short", host=INSIDE, prefix=elsewhere))
        relay = stack.enter_context(
            Program("tests/relay.py", "--to", f"{INSIDE}:{server.port}", keys=True)
        )
        address = f"127.0.0.1:{relay.expect('[0-9]+')[0]}"
        flags = ("--max_timesteps", "1000000")
        program = stack.enter_context(evaluation(arm, address, tmp_path, *flags))
        program.expect("rollout 0")
        arm.robot.clear_record()
        program.press("\n")
        program.expect("^run$")

        # 5 ± 2 ms each way, and a stall that the chunk in hand covers: it goes on.
        time.sleep(2.0)
        relay.press("stall 0.1\n")
        time.sleep(2.0)
        assert program.said[-1] == "run"
        Motion.of(arm.record()).check(arm.limits)

        at_ns = time.monotonic_ns()
        relay.press("cut 3\n")
        program.expect("stopped: ")
        motion = Motion.of(arm.record())
        motion.check(arm.limits)
        assert motion.rest_s(at_ns) <= 30 * PERIOD_S + watchdog_s() + stop_s(arm.limits)
        time.sleep(3.0)
        program.press("r")
        program.expect("^run$")
        time.sleep(1.0)
        Motion.of(arm.record()).check(arm.limits)
        program.press("q")
        program.expect("stopped: ")
        program.press("q")
        assert program.wait() == 130
        assert any("zmq" in line for line in program.said), program.said
