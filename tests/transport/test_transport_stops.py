"""A process that was stopped and goes on: its late answer is dropped, and counted, and no other's.

And a policy that keeps what it was given: it never sees it change.
"""

from __future__ import annotations

import signal

import numpy as np
import pytest
from transport_forks import LONG, ForkServer
from transport_policies import STOP

from policies.types import ActionChunk, MetaObs
from runtime.client import PolicyClient
from runtime.errors import RequestTimeout, ServerLost
from tests.runtime.toy_policy import CHUNK, observation

ROUNDS = 20 if LONG else 1
STOPS = [
    (transport, duration_s)
    for transport in ("shm", "zmq")
    for duration_s in (0.01, 0.1, 2.0)
    if LONG or duration_s < 1 or transport == "shm"
]
pytestmark = pytest.mark.timeout(1800 if LONG else 120)


def value_of(chunk: ActionChunk) -> float:
    """The state that ``ToyPolicy`` was asked with."""
    assert chunk.actions.shape[0] == CHUNK
    return round(float(chunk.actions[0, 1]) - 0.1, 4)


@pytest.mark.parametrize(("transport", "duration_s"), STOPS)
def test_stopped_server_sends_no_client_anothers_reply(
    fork_server: ForkServer, transport: str, duration_s: float
) -> None:
    with fork_server.fork("transport_policies:serve_policy", kind="stopping") as server:
        address = f"127.0.0.1:{server.expect('listening')['port']}"
        with PolicyClient(address, transport=transport, timeout_s=30.0) as client:
            client.infer(observation(0.0))
            for number in range(1, ROUNDS + 1):
                with pytest.raises(RequestTimeout):
                    client.infer(observation(STOP, timestep=1000 + number), timeout_s=duration_s)
                server.await_stop()
                server.signal(signal.SIGCONT)
                chunk = client.infer(observation(number, timestep=number))
                assert (chunk.obs_timestep, value_of(chunk)) == (number, number)
                assert client.statistics().dropped_late == number
                assert client.statistics().sessions == 1
            assert client.statistics().replies == 1 + ROUNDS


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_late_replies_of_the_previous_session_are_not_seen(
    fork_server: ForkServer, transport: str
) -> None:
    with fork_server.fork("transport_policies:serve_policy", kind="stopping") as server:
        address = f"127.0.0.1:{server.expect('listening')['port']}"
        with PolicyClient(address, transport=transport, timeout_s=30.0) as client:
            client.infer(observation(0.0))
            client.submit(observation(STOP, timestep=1000))
            server.await_stop()
            server.signal(signal.SIGCONT)
            client.reconnect()
            chunk = client.infer(observation(3.0, timestep=7))
            assert (chunk.obs_timestep, value_of(chunk)) == (7, 3.0)
            assert client.poll() is None
            assert client.statistics().replies == 2


@pytest.mark.parametrize(("transport", "duration_s"), STOPS)
def test_stopped_client_takes_no_old_reply_for_a_new_one(
    fork_server: ForkServer, transport: str, duration_s: float
) -> None:
    """Meanwhile the server serves another, for as long as the stop lasts."""
    with fork_server.fork("transport_policies:serve_policy", kind="stopping") as server:
        port = server.expect("listening")["port"]
        what = {"port": port, "transport": transport, "rounds": ROUNDS}
        with (
            PolicyClient(f"127.0.0.1:{port}", timeout_s=30.0) as other,
            fork_server.fork("transport_policies:request_and_stop", **what) as client,
        ):
            other.infer(observation(0.0))
            for number in range(1, ROUNDS + 1):
                client.await_stop()
                with pytest.raises(RequestTimeout):
                    other.infer(observation(STOP), timeout_s=duration_s)
                server.await_stop()
                server.signal(signal.SIGCONT)
                assert value_of(other.infer(observation(9.0))) == 9.0
                client.signal(signal.SIGCONT)
                said = client.expect("went on")
                assert (said["got"], round(said["value"] - 0.1, 4)) == (number, 2.0)
            said = client.expect("done")
            assert (said["replies"], said["dropped_late"]) == (1 + ROUNDS, ROUNDS)


def keeping(number: int, keep: int) -> MetaObs:
    picture = np.full((24, 32, 3), number % 251, np.uint8)
    state = np.zeros(14, np.float32)
    state[1] = keep
    return MetaObs(images={"top": picture}, state=state, timestep=number)


@pytest.mark.parametrize("transport", ["shm", "zmq"])
@pytest.mark.parametrize("keep", [1, 2])
def test_policy_may_keep_the_last_two_observations(
    fork_server: ForkServer, transport: str, keep: int
) -> None:
    with fork_server.fork("transport_policies:serve_policy", kind="keeping") as server:
        address = f"127.0.0.1:{server.expect('listening')['port']}"
        with PolicyClient(address, transport=transport, timeout_s=30.0) as client:
            for number in range(50):
                assert client.infer(keeping(number, keep)).obs_timestep == number


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_policy_that_keeps_more_observations_ends_only_its_session(
    fork_server: ForkServer, transport: str
) -> None:
    with fork_server.fork("transport_policies:serve_policy", kind="keeping") as server:
        address = f"127.0.0.1:{server.expect('listening')['port']}"
        with (
            PolicyClient(address, transport=transport, timeout_s=30.0) as greedy,
            PolicyClient(address, transport=transport, timeout_s=30.0) as modest,
        ):
            modest.infer(keeping(0, 2))
            with pytest.raises(
                ServerLost, match="the policy keeps views of an observation: arrays of"
            ):
                for number in range(20):
                    greedy.infer(keeping(number, 3))
            for number in range(1, 20):
                assert modest.infer(keeping(number, 2)).obs_timestep == number
            greedy.reconnect()
            assert greedy.infer(keeping(1, 2)).obs_timestep == 1
