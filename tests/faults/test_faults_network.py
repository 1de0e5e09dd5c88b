"""The server on another host: a network namespace behind a relay that delays, stalls and cuts."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from policies.types import MetaObs
from runtime.client import PolicyClient
from runtime.errors import ServerLost
from tests.faults.crowd_policy import STATE_DIM
from tests.faults.rig import (
    PERIOD_S,
    Motion,
    Program,
    Server,
    evaluation,
    max_sensing_age_s,
    stop_s,
    twin,
)
from tests.hosts import INSIDE, NoOtherHost, other_host, slow_cable, unplugged

SOAK = bool(os.environ.get("METRONOME_SOAK"))

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, ...]]:
    """What to put before a command that shall run on another host."""
    with contextlib.ExitStack() as stack:
        try:
            prefix = stack.enter_context(other_host())
        except NoOtherHost as error:
            pytest.skip(str(error))
        yield prefix


@pytest.mark.long
@pytest.mark.skipif(not SOAK, reason="METRONOME_SOAK is not set")
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
        assert motion.rest_s(at_ns) <= 30 * PERIOD_S + max_sensing_age_s() + stop_s(arm.limits)
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


CROWD = "tests.faults.crowd_policy"
KBIT_PER_S = 5000
SILENCE_S = 5.0
"""After which either side gives the other up."""


@pytest.fixture
def far(elsewhere: tuple[str, ...]) -> Iterator[Server]:
    """A server on the other host, for pictures of 240x320."""
    with Server("make_for_a_camera", host=INSIDE, prefix=elsewhere, module=CROWD) as server:
        yield server


def picture(index: int) -> MetaObs:
    shades = np.linspace(0, 255, 240 * 320 * 3).astype(np.uint8).reshape(240, 320, 3)
    return MetaObs({"top": shades}, np.full(STATE_DIM, index, np.float32), timestep=index)


def median_s(client: PolicyClient, requests: int) -> float:
    spans = []
    for index in range(requests):
        began_s = time.monotonic()
        assert client.infer(picture(index), timeout_s=20).obs_timestep == index
        spans.append(time.monotonic() - began_s)
    return float(np.median(spans))


def test_a_slow_link_is_slow_and_nothing_else(far: Server) -> None:
    """A picture takes a third of a second: heartbeats behind it must not be missed."""
    pytest.importorskip("simplejpeg")
    with slow_cable(KBIT_PER_S):
        with PolicyClient(far.address, timeout_s=20) as client:
            raw_s = median_s(client, 16)
            assert client.transport == "zmq"
        with PolicyClient(far.address, resize=True, jpeg_quality=90, timeout_s=20) as client:
            small_s = median_s(client, 8)
    expected_s = 240 * 320 * 3 * 8 / (KBIT_PER_S * 1e3)
    assert 0.8 * expected_s < raw_s < 2 * expected_s
    assert small_s < raw_s / 5


def test_a_cable_pulled_for_three_seconds_loses_nothing(far: Server) -> None:
    with PolicyClient(far.address, timeout_s=20) as client:
        median_s(client, 3)
        client.submit(picture(3))
        with unplugged():
            client.submit(picture(4))
            time.sleep(3.0)
        # Both were asked for, and both are answered once TCP has tried again.
        assert client.infer(picture(5), timeout_s=20).obs_timestep == 5
        median_s(client, 3)
        assert client.statistics().sessions == 1


def test_a_cable_pulled_for_good_is_a_lost_server_in_bounded_time(far: Server) -> None:
    with PolicyClient(far.address, timeout_s=60) as client:
        median_s(client, 3)
        with unplugged():
            began_s = time.monotonic()
            with pytest.raises(ServerLost):
                client.infer(picture(0))
            assert time.monotonic() - began_s < SILENCE_S + 3.0
            with pytest.raises(ServerLost, match="no server at"):
                client.reconnect(timeout_s=1.0)
        client.reconnect(timeout_s=30)
        median_s(client, 3)


def test_ten_milliseconds_that_vary_by_five(far: Server) -> None:
    relay = ("tests/relay.py", "--to", far.address, "--delay", "10", "--jitter", "5")
    with Program(*relay, keys=True) as between:
        address = f"127.0.0.1:{between.expect('[0-9]+')[0]}"
        with PolicyClient(address, timeout_s=20) as client:
            assert 0.015 < median_s(client, 40) < 0.15
            between.press("stall 1\n")
            median_s(client, 5)
            assert client.statistics().sessions == 1
