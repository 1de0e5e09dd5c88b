"""No message is missed while sleeping: without spinning, every message needs a wake-up.

A wake-up that is lost leaves both sides asleep until a time-out of many seconds, which is an
error here, and counted.
"""

from __future__ import annotations

import logging
import threading

import pytest
from contracts.channel import PATIENCE_S
from transport_forks import LONG, ForkServer
from transport_rig import connected

from transport.errors import ChannelClosed

MESSAGES = 1_000_000 if LONG else 20_000
_log = logging.getLogger(__name__)
pytestmark = pytest.mark.timeout(1800 if LONG else 120)


@pytest.mark.parametrize("bursts", [1, 3], ids=["ping-pong", "bursts-and-work"])
def test_every_message_wakes_a_sleeping_reader(fork_server: ForkServer, bursts: int) -> None:
    what = {"count": MESSAGES, "bursts": bursts, "seed": 1}
    with fork_server.fork("transport_streams:exchange_bursts", port=0, **what) as server:
        port = server.expect("listening")["port"]
        with fork_server.fork("transport_streams:exchange_bursts", port=port, **what) as client:
            for side in (client, server):
                said = side.expect("done", 1800)
                assert said["timeouts"] == 0
                assert said["messages"] >= MESSAGES
                assert said["sleeps"] > MESSAGES // 100, "hardly anybody slept: nothing was shown"
                _log.info("%s", said)


@pytest.mark.parametrize("spin_us", [0, 100])
def test_listener_misses_no_message_of_many_sessions(fork_server: ForkServer, spin_us: int) -> None:
    """Two clients at once, four sessions each, of which one and then three are in use."""
    each = MESSAGES // 4
    with fork_server.fork("transport_streams:wait_for_all", spin_us=spin_us) as server:
        what = {"port": server.expect("listening")["port"], "sessions": 4, "count": each}
        with (
            fork_server.fork("transport_streams:use_some", busy=1, seed=1, **what) as one,
            fork_server.fork("transport_streams:use_some", busy=3, seed=2, **what) as other,
        ):
            for client in (one, other):
                said = client.expect("done", 1800)
                assert (said["count"], said["timeouts"]) == (each, 0)
                _log.info("%s", said)
            server.signal(15)
            said = server.expect("done")
            assert (said["answered"], said["nothing"], said["timeouts"]) == (2 * each, 0, 0)
            _log.info("%s", said)


def test_close_from_another_thread_ends_recv_with_an_error() -> None:
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
