"""openpi's gateway, with a raw client: what is answered, what is refused, who survives."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus

from policies.types import CameraContract
from policies.yaml_config import InvalidConfig
from runtime.client import PolicyClient
from runtime.gateway.config import SessionOptions
from runtime.gateway.openpi.clients import describe
from runtime.gateway.openpi.gateway import MORE_SOCKETS, OpenpiGateway, max_frame_bytes
from runtime.options.api_keys import ApiKeys
from runtime.options.observation_keys import ImageSource, ObservationKeys, StateSource
from runtime.server import PolicyServer
from runtime.wire_formats.msgpack_arrays import pack
from tests.gateway.openpi_serving import (
    StatelessPolicy,
    ask,
    command_for,
    connect_to,
    expected,
    gateway_to,
    sent,
    wait_for_client_threads,
)
from tests.runtime.serving import serving
from tests.runtime.toy_policy import CONTRACT, ToyPolicy

KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def server() -> Iterator[PolicyServer]:
    with serving(StatelessPolicy()) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(server: PolicyServer) -> Iterator[OpenpiGateway]:
    with gateway_to(server) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def _clients_are_gone() -> Iterator[None]:
    yield
    wait_for_client_threads()


def actions(reply: dict[str, Any] | str) -> Any:
    assert isinstance(reply, dict), reply
    return reply["actions"]


def sessions(server: PolicyServer, count: int) -> list[Any]:
    """The server's sessions, as soon as there are ``count``."""
    deadline_s = time.monotonic() + 5.0
    while True:
        with contextlib.suppress(RuntimeError):  # its own thread changes what is read here
            found: list[Any] = server.status()["sessions"]
            if len(found) == count:
                return found
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


# What is answered


def test_an_observation_is_answered_with_the_policys_actions(gateway: OpenpiGateway) -> None:
    with connect_to(gateway) as client:
        first = ask(client, sent(0.5, shade=20))
        second = ask(client, sent(-1.5, shade=200, prompt="lift"))
        third = ask(client, sent(0.0))
    assert isinstance(first, dict) and isinstance(second, dict)
    assert first["actions"].dtype == np.float32
    np.testing.assert_array_equal(first["actions"], expected(0.5, shade=20))
    again = expected(-1.5, shade=200, timestep=1, prompt="lift")
    np.testing.assert_array_equal(second["actions"], again)
    np.testing.assert_array_equal(actions(third), expected(0.0, timestep=2))
    assert set(first["server_timing"]) == {"infer_ms"}
    assert 0 < second["server_timing"]["infer_ms"] < second["server_timing"]["prev_total_ms"] * 1000


@pytest.mark.parametrize("layout", ["nested", "flat", "one camera", "chw", "one of a batch"])
def test_the_usual_keys_of_openpi_are_found(gateway: OpenpiGateway, layout: str) -> None:
    image = np.random.default_rng(1).integers(0, 256, (24, 32, 3), np.uint8)
    state = np.arange(14, dtype=np.float64)
    message: dict[str, Any] = {
        "nested": {"state": state, "images": {"top": image}},
        "flat": {"state": list(map(float, state)), "images/top": image},
        "one camera": {"observation/state": state, "observation/image": image},
        "chw": {"state": state, "images": {"top": image.transpose(2, 0, 1)}},
        "one of a batch": {"state": state[None], "images": {"top": image[None]}},
    }[layout]
    with connect_to(gateway) as client:
        reply = actions(ask(client, message))
    brightness = np.float32(image.mean(dtype=np.float64) / 1000)
    np.testing.assert_array_equal(reply[3, 2:], state[2:].astype(np.float32) + 3 + brightness)


def test_a_map_of_keys_is_followed(server: PolicyServer) -> None:
    keys = ObservationKeys(
        cameras={"top": ImageSource("view/main", "chw")},
        state=(StateSource("arm", 0, 13), StateSource("gripper", 1, 2)),
    )
    image = np.full((3, 24, 32), 100, np.uint8)
    message = {"view": {"main": image}, "arm": np.zeros(20), "gripper": np.array([5.0, 0.0])}
    with gateway_to(server, keys=keys) as gateway, connect_to(gateway) as client:
        np.testing.assert_array_equal(actions(ask(client, message)), expected())
        refused = ask(client, sent())
    assert refused == ("images.top: got keys ['state', 'images/top'], expected 'view/main'")


def test_the_server_says_first_what_it_serves() -> None:
    described = describe(CONTRACT)
    assert described["cameras"] == {"top": [24, 32]}
    assert (described["state_dim"], described["action_dim"], described["chunk_size"]) == (
        *(14, 14, 10),
    )
    assert pack(described)


def test_two_clients_are_two_sessions_with_their_own_time(
    server: PolicyServer, gateway: OpenpiGateway
) -> None:
    with connect_to(gateway) as one, connect_to(gateway) as other:
        for timestep in range(3):
            np.testing.assert_array_equal(
                actions(ask(one, sent(1.0))), expected(1.0, timestep=timestep)
            )
        np.testing.assert_array_equal(actions(ask(other, sent(2.0))), expected(2.0))
        names = {session["client"] for session in sessions(server, 2)}
        ports = {client.local_address[1] for client in (one, other)}
        assert names == {f"openpi 127.0.0.1:{port}" for port in ports}
    sessions(server, 0)


def test_a_health_check_and_other_paths(gateway: OpenpiGateway) -> None:
    assert get(gateway.port, "/healthz") == (200, b"OK\n")
    status, text = get(gateway.port, "/other")
    assert (status, text) == (
        404,
        b"path: got /other, expected one of /, /v1/realtime/robot/openpi, /healthz\n",
    )


# What is refused


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            {"images": {"top": np.zeros((224, 224, 3), np.uint8)}},
            "images.top: got shape (224, 224, 3), expected (24, 32, 3)",
        ),
        (
            {"images": {"top": np.zeros((24, 32, 3), np.float32)}},
            "images.top: got dtype float32, expected uint8 (24, 32, 3)",
        ),
        ({"images": {"top": "a picture"}}, "images.top: got str, expected a uint8 array"),
        ({"images": {"side": np.zeros(1)}}, "images.top: got keys ['state', 'images/side'], "),
        ({"state": np.zeros(7)}, "state: got 7 numbers (state 7), expected 14"),
        ({"state": "fourteen"}, "state (state): got 'fourteen', expected numbers"),
        ({"state": b"\0" * 14}, "state (state): got b'"),
        ({"state": [[1.0], [1.0, 2.0]]}, "state (state): got [[1.0], [1.0, 2.0]], expected"),
        ({"state": np.full(14, np.nan)}, "state: got NaN or infinity, expected finite numbers"),
        ({"state": np.full(14, 1e300)}, "state: got NaN or infinity, expected finite numbers"),
        ({"prompt": 3}, "prompt: got int, expected text"),
        ({"prompt": "x" * 1025}, "raw_lang: got 1025 bytes, expected at most 1024"),
    ],
)
def test_an_observation_that_does_not_fit_is_an_error_and_the_connection_stays(
    gateway: OpenpiGateway, change: dict[str, Any], error: str
) -> None:
    with connect_to(gateway) as client:
        reply = ask(client, {**sent(), **change})
        assert isinstance(reply, str) and reply.startswith(error)
        np.testing.assert_array_equal(actions(ask(client, sent())), expected())


def test_an_error_of_the_policy_is_an_error_of_the_protocol(gateway: OpenpiGateway) -> None:
    with connect_to(gateway) as client:
        np.testing.assert_array_equal(actions(ask(client, sent())), expected())
        reply = ask(client, sent(666.0))
        assert isinstance(reply, str) and "a bug in the policy" in reply
        np.testing.assert_array_equal(actions(ask(client, sent())), expected(timestep=1))


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (b"\xc1", "frame: got type 0xc1"),
        (b"\x80extra", "frame: got 5 bytes after the map, expected none"),
        (b"\x93\1\2\3", "frame: got list, expected a map"),
        (pack({"state": np.zeros(14)})[:-20], "state: got an end after"),
        ("text", "frame: got text, expected a binary frame"),
    ],
)
def test_a_malformed_frame_is_an_error_and_the_end(
    gateway: OpenpiGateway, frame: bytes | str, error: str
) -> None:
    with connect_to(gateway) as client:
        client.send(frame)
        reply = client.recv(5.0)
        assert isinstance(reply, str) and reply.startswith(error)
        with pytest.raises(ConnectionClosed, match="1007"):
            client.recv(5.0)


def test_a_frame_larger_than_any_observation_ends_the_connection(gateway: OpenpiGateway) -> None:
    with connect_to(gateway) as client, pytest.raises(ConnectionClosed, match=r"1009.*exceeds"):
        client.send(bytes(max_frame_bytes(CONTRACT) + 1))
        client.recv(5.0)


def test_a_policy_with_episode_state_needs_the_path_that_has_a_reset() -> None:
    with serving(ToyPolicy()) as server, gateway_to(server) as gateway:
        refusal = pytest.raises(ConnectionClosed, match=r"1008.*needs a reset: use the path /v1/")
        with refusal, connect_to(gateway):
            pass


def test_keys_that_do_not_fit_are_refused(server: PolicyServer) -> None:
    command = command_for(f"{server.host}:{server.port}")
    with pytest.raises(InvalidConfig, match="cameras: got 'side', expected cameras of the policy"):
        OpenpiGateway(command, ObservationKeys({"side": ImageSource("x")}), None, CONTRACT)
    with PolicyClient(command.server) as client:
        assert not client.episode_state


def test_a_server_that_is_another_than_at_the_start_is_refused(server: PolicyServer) -> None:
    other = dataclasses.replace(CONTRACT, dt_s=0.1)
    command = command_for(f"{server.host}:{server.port}")
    with pytest.raises(InvalidConfig, match=r"policy: got .* with dt_s 0\.02, expected dt_s"):
        OpenpiGateway(command, ObservationKeys(), None, other)


def test_a_reload_with_other_statistics_keeps_serving(server: PolicyServer) -> None:
    """The server applies them; the server's own reload allows it, too."""
    before = dataclasses.replace(CONTRACT, normalizer_hash="before")
    command = command_for(f"{server.host}:{server.port}")
    OpenpiGateway(command, ObservationKeys(), None, before).close()


def test_a_gateway_that_can_accept_no_more_ends_with_an_error(server: PolicyServer) -> None:
    """So that it is started again, and is not deaf for good."""
    command = command_for(f"{server.host}:{server.port}")
    deaf = OpenpiGateway(command, ObservationKeys(), None, CONTRACT)
    deaf._server._listener.close()
    try:
        with pytest.raises(RuntimeError, match="cannot accept clients any more"):
            deaf.serve()
    finally:
        deaf.close()


def test_a_taken_port_is_an_error(gateway: OpenpiGateway, server: PolicyServer) -> None:
    command = command_for(f"{server.host}:{server.port}")
    command = dataclasses.replace(command, port=gateway.port)
    with pytest.raises(OSError, match="in use"):
        OpenpiGateway(command, ObservationKeys(), None, CONTRACT)


def test_a_client_needs_one_of_the_keys(server: PolicyServer, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_text(f"another-key-0000\n{KEY}\n", encoding="utf-8")
    with gateway_to(server, api_keys=ApiKeys(path)) as gateway:
        for key in (None, "", KEY[:-1], KEY + "0", KEY.upper(), "\xe9" * 16):
            with pytest.raises(InvalidStatus, match="401"), connect_to(gateway, key):
                pass
        with connect_to(gateway, KEY) as client:
            np.testing.assert_array_equal(actions(ask(client, sent())), expected())
        assert get(gateway.port, "/healthz") == (200, b"OK\n")
        assert get(gateway.port, "/")[0] == 401


def test_too_many_clients_are_refused_with_the_number(server: PolicyServer) -> None:
    with gateway_to(server, max_clients=1) as gateway:
        with connect_to(gateway) as client:
            refusal = pytest.raises(ConnectionClosed, match="clients: got 2, expected at most 1")
            with refusal, connect_to(gateway):
                pass
            np.testing.assert_array_equal(actions(ask(client, sent())), expected())
        deadline_s = time.monotonic() + 5.0
        while True:
            try:
                with connect_to(gateway):
                    return
            except ConnectionClosed:  # the first is not quite gone
                assert time.monotonic() < deadline_s
                time.sleep(0.01)


def test_sockets_that_say_nothing_are_bounded(server: PolicyServer) -> None:
    with gateway_to(server, max_clients=1) as gateway:
        address = ("127.0.0.1", gateway.port)
        silent = [socket.create_connection(address) for _ in range(MORE_SOCKETS + 1)]
        with socket.create_connection(address, timeout=5.0) as more:
            assert more.recv(1) == b""
        for one in silent:
            one.close()


def test_a_robot_that_the_server_cannot_admit_gets_the_reason(server: PolicyServer) -> None:
    robot = SessionOptions("robot", rate_hz=1000.0, deadline_ms=0.001)
    with gateway_to(server) as first, connect_to(first) as client:
        ask(client, sent())  # now the server knows how long one takes
    with (
        gateway_to(server, sessions=robot) as gateway,
        pytest.raises(ConnectionClosedError, match=r"deadline_ms: got its own 0\.001"),
        connect_to(gateway),
    ):
        pass


# Who survives


def test_a_client_that_vanishes_leaves_nothing_behind(
    server: PolicyServer, gateway: OpenpiGateway
) -> None:
    threads, descriptors = threading.active_count(), open_descriptors()
    with connect_to(gateway) as other:
        ask(other, sent())
        with connect_to(gateway) as client:
            ask(client, sent())
            client.send(pack(sent()))
            client.socket.shutdown(socket.SHUT_RDWR)
            sessions(server, 1)
            np.testing.assert_array_equal(actions(ask(other, sent())), expected(timestep=1))
    sessions(server, 0)
    deadline_s = time.monotonic() + 5.0
    while threading.active_count() > threads or open_descriptors() > descriptors:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_lost_server_is_an_error_until_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        with serving(StatelessPolicy()) as server:
            port = server.port
            gateway = stack.enter_context(gateway_to(server, timeout_s=0.5))
            client = stack.enter_context(connect_to(gateway))
            assert isinstance(ask(client, sent()), dict)
        late = stack.enter_context(connect_to(gateway))
        for one in (client, late):
            assert isinstance(ask(one, sent()), str)
        with serving(StatelessPolicy(), port=port):
            for one, timestep in ((client, 1), (late, 0)):
                np.testing.assert_array_equal(
                    actions(ask(one, sent())), expected(timestep=timestep)
                )
            stack.close()


def test_a_gateway_that_stops_says_so_and_ends_all_sessions(server: PolicyServer) -> None:
    with gateway_to(server) as gateway, connect_to(gateway) as client:
        ask(client, sent())
        gateway.stop()
        gateway.stop()
        gateway.close()
        gateway.close()
        gateway.stop()
        with pytest.raises(ConnectionClosed, match=r"1001.*the gateway stops"):
            client.recv(5.0)
        sessions(server, 0)
    with pytest.raises(ConnectionRefusedError), connect_to(gateway):
        pass


def test_a_gateway_that_stops_waits_for_the_request_at_the_server() -> None:
    gate = threading.Semaphore(0)
    policy = StatelessPolicy(gate)
    with serving(policy) as server, gateway_to(server) as gateway, connect_to(gateway) as client:
        client.send(pack(sent()))
        assert policy.entered.acquire(timeout=5.0)
        gateway.stop()
        closing = threading.Thread(target=gateway.close)
        closing.start()
        with pytest.raises(ConnectionClosed, match="1001"):
            client.recv(5.0)
        gate.release()
        closing.join(5.0)
        assert not closing.is_alive()


def test_the_same_error_is_logged_once(
    gateway: OpenpiGateway, caplog: pytest.LogCaptureFixture
) -> None:
    with connect_to(gateway) as client:
        for value in (np.nan, np.nan, 666.0, np.nan):
            assert isinstance(ask(client, sent(value)), str)
    logged = [one.message for one in caplog.records if one.name == "runtime.gateway.openpi.clients"]
    assert sum("got NaN" in text for text in logged) == 2


def test_a_gateway_that_never_served_can_be_closed(server: PolicyServer) -> None:
    command = command_for(f"{server.host}:{server.port}")
    gateway = OpenpiGateway(command, ObservationKeys(), None, CONTRACT)
    gateway.close()


def test_the_largest_frame_follows_from_the_pictures() -> None:
    large = dataclasses.replace(
        CONTRACT, cameras=(CameraContract("top", (480, 640), (480, 640)), *CONTRACT.cameras[1:])
    )
    grown = max_frame_bytes(large) - max_frame_bytes(CONTRACT)
    assert grown == 3 * (480 * 640 - 24 * 32)
