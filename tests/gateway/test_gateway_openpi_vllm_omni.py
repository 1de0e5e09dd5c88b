"""openpi's gateway, with clients of vLLM-Omni's robot endpoint: observations, and a reset.

A stand-in of its example client; the bytes are those that it sends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from runtime.gateway.openpi.gateway import VLLM_OMNI_PATH, OpenpiGateway
from runtime.wire_formats.msgpack_arrays import pack, unpack
from tests.gateway.openpi_serving import (
    StatelessPolicy,
    expected,
    gateway_to,
    sent,
    wait_for_client_threads,
)
from tests.runtime.serving import serving
from tests.runtime.toy_policy import CHUNK, CONTRACT, ToyPolicy


@pytest.fixture(scope="module")
def gateway() -> Iterator[OpenpiGateway]:
    """Of a policy that answers how often it was asked in the episode."""
    with serving(ToyPolicy()) as server, gateway_to(server) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def _clients_are_gone() -> Iterator[None]:
    yield
    wait_for_client_threads()


@contextlib.contextmanager
def robot(gateway: OpenpiGateway) -> Iterator[ClientConnection]:
    """A client after the server's first frame."""
    url = f"ws://127.0.0.1:{gateway.port}{VLLM_OMNI_PATH}"
    with connect(url, compression=None, close_timeout=1.0) as client:
        assert unpack(client.recv(5.0, decode=False))["action_horizon"] == CHUNK
        yield client


def ask(client: ClientConnection, request: Mapping[str, Any] | bytes) -> Any:
    """The reply: an array, or a map."""
    client.send(request if isinstance(request, bytes) else pack(request))
    return unpack(b"\x81\xa5reply" + client.recv(5.0, decode=False))["reply"]


def asked(reply: Any) -> int:
    """How often the policy was asked in its episode."""
    assert isinstance(reply, np.ndarray), reply
    assert (reply.shape, reply.dtype) == ((CHUNK, CONTRACT.action_dim), np.float32)
    return int(reply[0, 0])


def test_an_observation_is_answered_with_the_array_of_the_actions() -> None:
    with (
        serving(StatelessPolicy()) as server,
        gateway_to(server) as gateway,
        robot(gateway) as client,
    ):
        for timestep in range(2):
            reply = ask(client, sent(0.5, endpoint="infer", session_id="a", prompt="lift"))
            expectation = expected(0.5, timestep=timestep, prompt="lift")
            np.testing.assert_array_equal(reply, expectation)
        assert ask(client, {"endpoint": "reset"}) == {"status": "reset successful"}
        np.testing.assert_array_equal(ask(client, sent(0.5)), expected(0.5))


def test_a_reset_starts_an_episode(gateway: OpenpiGateway) -> None:
    with robot(gateway) as client:
        assert ask(client, {"endpoint": "reset"}) == {"status": "reset successful"}
        assert [asked(ask(client, sent())) for _ in range(3)] == [1, 2, 3]
        assert ask(client, {"endpoint": "reset", "more": 1}) == {"status": "reset successful"}
        assert [asked(ask(client, sent())) for _ in range(2)] == [1, 2]


def test_another_session_id_starts_an_episode(gateway: OpenpiGateway) -> None:
    with robot(gateway) as client:
        ids = ["a", "a", None, "", "b", "b", "a"]
        numbers = [asked(ask(client, sent(session_id=session_id))) for session_id in ids]
    assert numbers == [1, 2, 3, 4, 1, 2, 1]


def test_two_clients_have_episodes_of_their_own(gateway: OpenpiGateway) -> None:
    with robot(gateway) as one, robot(gateway) as other:
        assert [asked(ask(one, sent())) for _ in range(2)] == [1, 2]
        assert asked(ask(other, sent())) == 1
        ask(other, {"endpoint": "reset"})
        assert asked(ask(one, sent())) == 3


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (sent(np.nan), "state: got NaN or infinity"),
        (sent(666.0), "the policy failed"),
        ({"prompt": ""}, "images.top: got keys ['prompt'], expected 'images/top'"),
        ({"endpoint": "close"}, "endpoint: got 'close', expected 'infer' or 'reset'"),
        ({"endpoint": np.zeros(2)}, "endpoint: got array([0., 0.]), expected 'infer' or 'reset'"),
        (sent(session_id=np.zeros(2)), "session_id: got ndarray, expected text or a number"),
        (b"\xc1", "frame: got type 0xc1"),
        (b"\x93\1\2\3", "frame: got list, expected a map"),
        (pack(sent())[:-3], "images/top/shape: got 3 values in 0 bytes, expected"),
    ],
)
def test_an_error_is_a_map_and_the_connection_stays(
    gateway: OpenpiGateway, request_: Mapping[str, Any] | bytes, error: str
) -> None:
    with robot(gateway) as client:
        reply = ask(client, request_)
        assert set(reply) == {"type", "message"} and reply["type"] == "error"
        assert error in reply["message"]
        assert asked(ask(client, sent())) == 1


def test_text_and_empty_frames_are_ignored(gateway: OpenpiGateway) -> None:
    with robot(gateway) as client:
        client.send("hello")
        client.send(b"")
        assert asked(ask(client, sent())) == 1
