"""Nobody sleeps through a message: with nothing watched, every hand-over is a wake-up.

A wake-up that is lost leaves both sides asleep until a time-out of many seconds, which is an
error here, and counted.
"""

from __future__ import annotations

import logging
import threading

import pytest
from contracts.channel import PATIENCE_S
from transport_forks import LONG, Nursery
from transport_rig import connected

from transport.errors import ChannelClosed

HAND_OVERS = 1_000_000 if LONG else 20_000
_log = logging.getLogger(__name__)
pytestmark = pytest.mark.timeout(1800 if LONG else 120)


@pytest.mark.parametrize("bursts", [1, 3], ids=["ping-pong", "bursts-and-work"])
def test_every_hand_over_wakes_the_sleeper(nursery: Nursery, bursts: int) -> None:
    what = {"count": HAND_OVERS, "bursts": bursts, "seed": 1}
    with nursery.fork("transport_streams:hand_over", port=0, **what) as server:
        port = server.expect("listening")["port"]
        with nursery.fork("transport_streams:hand_over", port=port, **what) as client:
            for side in (client, server):
                said = side.expect("done", 1800)
                assert said["timeouts"] == 0
                assert said["hand_overs"] >= HAND_OVERS
                assert said["sleeps"] > HAND_OVERS // 100, "hardly anybody slept: nothing was shown"
                _log.info("%s", said)


@pytest.mark.parametrize("spin_us", [0, 100])
def test_a_listener_sleeps_through_no_session_of_many(nursery: Nursery, spin_us: int) -> None:
    """Two clients at once, four sessions each, of which one and then three are in use."""
    each = HAND_OVERS // 4
    with nursery.fork("transport_streams:wait_for_all", spin_us=spin_us) as server:
        what = {"port": server.expect("listening")["port"], "sessions": 4, "count": each}
        with (
            nursery.fork("transport_streams:use_some", busy=1, seed=1, **what) as one,
            nursery.fork("transport_streams:use_some", busy=3, seed=2, **what) as other,
        ):
            for client in (one, other):
                said = client.expect("done", 1800)
                assert (said["count"], said["timeouts"]) == (each, 0)
                _log.info("%s", said)
            server.signal(15)
            said = server.expect("done")
            assert (said["answered"], said["nothing"], said["timeouts"]) == (2 * each, 0, 0)
            _log.info("%s", said)


def test_a_wait_that_another_thread_ends_by_closing_is_an_error_and_no_crash() -> None:
    """Against the rule of one thread; but a lab's clean-up does it."""
    said: list[BaseException] = []
    with connected("shm") as pair:

        def read() -> None:
            try:
                pair.server.recv(PATIENCE_S)
            except ChannelClosed as error:
                said.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        reader.join(0.2)  # by then it sleeps
        pair.server.close()
        reader.join(PATIENCE_S)
        assert not reader.is_alive()
    assert said
