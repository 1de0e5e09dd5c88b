"""The ILStudio gateway: batches, episodes, errors, and clients that misbehave."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from policies.types import ActionChunk, CameraContract, MetaObs
from policies.yaml_config import InvalidConfig
from runtime.gateway import client_listener
from runtime.gateway.config import GatewayCommand, SessionOptions
from runtime.gateway.ilstudio import gateway as ilstudio_module
from runtime.gateway.ilstudio.gateway import IlstudioGateway
from runtime.gateway.ilstudio.observations import MAX_PICTURES, MAX_ROWS, IlstudioObservations
from runtime.gateway.observation_map import ObservationMap
from runtime.gateway.planes import interleave
from runtime.options.observation_keys import ImageSource, ObservationKeys, StateSource
from runtime.server import PolicyServer
from tests.gateway.gateways import ilstudio_gateway
from tests.gateway.ilstudio_messages import RawClient, asked, dumps, meta_obs, names, wait_until
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import CHUNK, CONTRACT, STATE_DIM, ToyPolicy

TWO_CAMERAS = dataclasses.replace(
    CONTRACT, cameras=(*CONTRACT.cameras, CameraContract("wrist", (24, 32), (24, 32)))
)


class TwoCameras(ToyPolicy):
    def __init__(self) -> None:
        super().__init__()
        self.contract = TWO_CAMERAS

    def fork(self) -> TwoCameras:
        return TwoCameras()


@pytest.fixture
def server() -> Iterator[PolicyServer]:
    with serving(ToyPolicy()) as server:
        yield server


@pytest.fixture
def gateway(server: PolicyServer) -> Iterator[IlstudioGateway]:
    with ilstudio_gateway(server.address, CONTRACT) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: IlstudioGateway) -> Iterator[RawClient]:
    with RawClient(gateway.port) as client:
        yield client


# What is answered


def test_a_row_gets_what_our_client_gets(server: PolicyServer, client: RawClient) -> None:
    draw = np.random.default_rng(0)
    with connect(server) as ours:
        for t in range(5):
            image = draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            state = draw.normal(size=STATE_DIM).astype(np.float32)
            wanted = ours.infer(MetaObs({"top": image}, state, timestep=t)).actions
            planes = np.ascontiguousarray(image.transpose(2, 0, 1))[None, None]
            got = client.actions(meta_obs(t=t, state=state[None], image=planes))
            assert got.dtype == np.float32 and np.array_equal(got[:, 0], wanted)


def test_each_action_says_what_it_is(client: RawClient) -> None:
    answer = client.ask(meta_obs(rows=2))
    assert len(answer) == CHUNK
    for step in answer:
        assert (step.shape, step.dtype) == ((2,), object)
        for action in step:
            assert action["action"].shape == (STATE_DIM,)
            assert {k: v for k, v in action.items() if k != "action"} == {
                "ctrl_space": "joint",
                "ctrl_type": "abs",
                "gripper_continuous": True,
            }


def test_a_batch_is_a_session_per_row(server: PolicyServer, client: RawClient) -> None:
    one = client.actions(meta_obs(t=0))
    three = client.actions(meta_obs(rows=3, t=10))
    assert (asked(one), asked(three)) == ([1], [2, 1, 1])
    assert three[0, :, 1].tolist() == pytest.approx([0.1, 1.1, 2.1])
    host, port = client.socket.getsockname()
    assert sorted(names(server)) == [f"ilstudio {host}:{port} [{row}]" for row in range(3)]


def test_rows_are_computed_side_by_side() -> None:
    both = threading.Barrier(3, timeout=5)
    chunks = [ActionChunk(np.zeros((1, 1), np.float32)) for _ in range(3)]

    def call(at: int) -> ActionChunk:
        both.wait()
        return chunks[at]

    got = ilstudio_module._side_by_side([lambda at=at: call(at) for at in range(3)])  # type: ignore[misc]
    assert all(a is b for a, b in zip(got, chunks, strict=True))


def test_rows_without_a_thread_of_their_own_end_before_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = []

    def call() -> ActionChunk:
        time.sleep(0.1)
        ended.append(True)
        return ActionChunk(np.zeros((1, 1), np.float32))

    start, starts = threading.Thread.start, iter([True, False])

    def start_once(thread: threading.Thread) -> None:
        if not next(starts):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_once)
    with pytest.raises(RuntimeError, match="can't start"):
        ilstudio_module._side_by_side([call] * 3)
    assert ended == [True]


@pytest.mark.parametrize(
    ("timesteps", "counts"),
    [
        ((0, 10, 20), [1, 2, 3]),
        ((0, 10, 0, 10), [1, 2, 1, 2]),
        ((10, 10, 5, 6), [1, 1, 1, 2]),
        ((None, None, 0, None), [1, 2, 1, 2]),
    ],
)
def test_a_timestep_not_above_the_last_one_is_a_reset(
    client: RawClient, timesteps: tuple[int | None, ...], counts: list[int]
) -> None:
    assert [asked(client.actions(meta_obs(t=t)))[0] for t in timesteps] == counts


def test_a_row_that_starts_again_does_not_reset_the_others(client: RawClient) -> None:
    client.actions(meta_obs(rows=2))
    got = client.actions(meta_obs(rows=2, timestep=np.array([[0], [1]])))
    assert asked(got) == [1, 2]


@pytest.mark.parametrize("timestep", [5, np.array(5), np.array([5]), np.array([5, 5], np.uint8)])
def test_forms_of_a_timestep(client: RawClient, timestep: Any) -> None:
    client.actions(meta_obs(rows=2, t=4))
    assert asked(client.actions(meta_obs(rows=2, timestep=timestep))) == [2, 2]


def test_two_clients_are_two_episodes(gateway: IlstudioGateway, client: RawClient) -> None:
    with RawClient(gateway.port) as other:
        counts = [asked(each.actions(meta_obs(t=t))) for t in range(3) for each in (client, other)]
    assert counts == [[1], [1], [2], [2], [3], [3]]


# Which picture is which camera, and the state


@pytest.mark.parametrize(
    ("cameras", "shade"), [({}, 100), ({"top": "image/1", "wrist": "image/0"}, 200)]
)
def test_pictures_are_in_the_contracts_order_or_the_maps(
    cameras: dict[str, str], shade: int
) -> None:
    keys = ObservationKeys({name: ImageSource(key) for name, key in cameras.items()})
    image = np.array([100, 200], np.uint8)[None, :, None, None, None]
    obs = meta_obs(image=image * np.ones((1, 2, 3, 24, 32), np.uint8))
    with (
        serving(TwoCameras()) as server,
        ilstudio_gateway(server.address, TWO_CAMERAS, keys) as gateway,
        RawClient(gateway.port) as client,
    ):
        assert client.actions(obs)[0, 0, 1] == np.float32(shade / 1000)


def test_a_map_may_leave_pictures_unused(server: PolicyServer) -> None:
    keys = ObservationKeys(
        {"top": ImageSource("image/2")}, (StateSource("state_ee"), StateSource("state", 0, 7))
    )
    image = np.array([1, 2, 3], np.uint8)[None, :, None, None, None]
    obs = meta_obs(
        image=image * np.ones((1, 3, 3, 24, 32), np.uint8), state_ee=np.full((1, 7), 5.0)
    )
    with (
        ilstudio_gateway(server.address, CONTRACT, keys) as gateway,
        RawClient(gateway.port) as client,
    ):
        got = client.actions(obs)[0, 0]
    assert got[1] == np.float32(5.003) and got[13] == np.float32(0.003)


def test_what_cannot_be_served_is_refused_at_the_start(server: PolicyServer) -> None:
    command = GatewayCommand("ilstudio", server=server.address, port=0)
    unknown = ObservationKeys({"nose": ImageSource("image/0")})
    with pytest.raises(InvalidConfig, match="got 'nose', expected cameras of the policy"):
        IlstudioGateway(command, unknown, None, CONTRACT)
    with pytest.raises(InvalidConfig, match="expected none: ILStudio"):
        IlstudioGateway(command, ObservationKeys(), object(), CONTRACT)  # type: ignore[arg-type]
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        busy = dataclasses.replace(command, port=taken.getsockname()[1])
        IlstudioGateway(busy, ObservationKeys(), None, CONTRACT)


# Errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"state": None}, "state: got nothing, expected an array (N, D)"),
        ({"state": np.zeros(14)}, "state: got float64 (14,), expected an array (N, D)"),
        ({"state": np.zeros((1, 13))}, "got 13 numbers (state 13), expected 14"),
        ({"state": np.zeros((0, 14))}, f"state: got 0 rows, expected 1 to {MAX_ROWS}"),
        ({"state": np.zeros((10**6, 0))}, f"state: got 1000000 rows, expected 1 to {MAX_ROWS}"),
        ({"state": np.full((1, 14), np.nan)}, "state: got NaN or infinity, expected finite"),
        ({"state": np.full((1, 14), 666.0)}, "a bug in the policy"),
        ({"image": None}, "image: got 0 pictures, expected 1, of ['top'] in this order"),
        ({"image": "x"}, "image: got str, expected an array (1, K, C, H, W)"),
        ({"image": np.zeros((2, 1, 3, 24, 32), "u1")}, "image: got uint8 (2, 1, 3, 24, 32)"),
        ({"image": np.zeros((1, 1, 3, 24, 33), "u1")}, "images.top: got shape (24, 33, 3)"),
        ({"image": np.zeros((1, 1, 3, 24, 32), "f4")}, "images.top: got dtype float32, expected"),
        ({"image": np.zeros((1, 2, 3, 24, 32), "u1")}, "image: got 2 pictures, expected 1"),
        ({"image": np.zeros((1, 10**8, 3, 0, 0), "u1")}, "image: got 100000000 pictures"),
        ({"timestep": "now"}, "timestep: got str, expected integers (1, 1)"),
        ({"timestep": np.zeros((1, 1))}, "timestep: got float64 (1, 1), expected integers"),
        ({"timestep": np.zeros((2, 1), int)}, "timestep: got int64 (2, 1), expected integers"),
        ({"timestep": 2**31}, "timestep: got [2147483648], expected 0 to 2147483647"),
        ({"raw_lang": ["a", "b"]}, "raw_lang: got list, expected a list of 1 strings"),
        ({"raw_lang": [1]}, "raw_lang: got list, expected a list of 1 strings"),
    ],
)
def test_an_error_is_an_empty_list_and_a_warning(
    client: RawClient, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], message: str
) -> None:
    with caplog.at_level(logging.WARNING, ilstudio_module.__name__):
        assert client.ask(meta_obs(**fields)) == []
    (record,) = [each for each in caplog.records if each.name == ilstudio_module.__name__]
    assert message in record.getMessage()
    port = client.socket.getsockname()[1]
    assert record.getMessage().startswith(f"ilstudio 127.0.0.1:{port}: ")
    assert asked(client.actions(meta_obs(t=1))) == [1]  # the connection goes on


@pytest.mark.parametrize(
    ("message", "logged"),
    [
        (b"", "a pickle that is refused: it ends too early, expected benchmark.base.MetaObs"),
        (b"GET / HTTP/1.1\r\n\r\n", "the instruction b'G'|it holds|it goes on|it "),
        (b"cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", "it asks for posix.system"),
        (dumps([1, 2]), "message: got list, expected benchmark.base.MetaObs"),
    ],
)
def test_other_messages_are_refused(
    client: RawClient, caplog: pytest.LogCaptureFixture, message: bytes, logged: str
) -> None:
    with caplog.at_level(logging.WARNING, ilstudio_module.__name__):
        assert client.ask(message) == []
    assert any(part in caplog.text for part in logged.split("|"))
    assert asked(client.actions(meta_obs())) == [1]


def test_a_message_that_is_too_long_is_dropped(
    client: RawClient, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = IlstudioObservations(CONTRACT, ObservationKeys()).max_bytes
    assert client.ask(bytes(allowed + 1)) == []
    assert f"got {allowed + 1} bytes, expected at most {allowed}" in caplog.text
    assert asked(client.actions(meta_obs())) == [1]


def test_the_largest_batch_fits(client: RawClient) -> None:
    depth = np.zeros((MAX_ROWS, 1, 24, 32), np.float32)
    assert asked(client.actions(meta_obs(rows=MAX_ROWS, depth=depth))) == [1] * MAX_ROWS


def test_a_bug_of_the_gateway_is_an_error_too(
    client: RawClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ObservationMap, "read", lambda *_, **__: 1 / 0)
    assert client.ask(meta_obs()) == []
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert asked(client.actions(meta_obs())) == [1]


def test_the_two_sends_of_a_message_do_not_wait_for_each_other(client: RawClient) -> None:
    """Nagle's algorithm holds the second one back until the first is acknowledged: 40 ms."""
    spans_s = []
    for t in range(40):
        began_s = time.perf_counter()
        client.ask(meta_obs(t=t))
        spans_s.append(time.perf_counter() - began_s)
    # Of a new connection, Linux acknowledges the first segments at once anyway.
    assert min(spans_s[20:]) < 0.02


# The server's death, and the end


def test_a_server_that_dies_and_returns(caplog: pytest.LogCaptureFixture) -> None:
    with serving(ToyPolicy()) as first:
        address, port = first.address, first.port
        sessions = SessionOptions(timeout_s=1)
        stack = contextlib.ExitStack()
        gateway = stack.enter_context(ilstudio_gateway(address, CONTRACT, sessions=sessions))
        client = stack.enter_context(RawClient(gateway.port))
        client.actions(meta_obs(rows=2))
    with stack:
        assert client.ask(meta_obs(rows=2, t=1)) == []
        assert "is gone" in caplog.text
        with serving(ToyPolicy(), port=port):
            assert asked(client.actions(meta_obs(rows=2, t=2))) == [1, 1]


def test_a_server_with_another_policy_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with (
        serving(TwoCameras()) as server,
        ilstudio_gateway(server.address, CONTRACT) as gateway,
        RawClient(gateway.port) as client,
    ):
        assert client.ask(meta_obs()) == []
        assert "with cameras (top 24x32, wrist 24x32), expected cameras (top 24x32)" in caplog.text
        wait_until(lambda: not names(server))


def test_a_server_with_other_statistics_is_as_good(server: PolicyServer) -> None:
    before = dataclasses.replace(CONTRACT, normalizer_hash="other")
    with (
        ilstudio_gateway(server.address, before) as gateway,
        RawClient(gateway.port) as client,
    ):
        assert asked(client.actions(meta_obs())) == [1]


def test_stop_ends_the_connections_and_frees_the_address(server: PolicyServer) -> None:
    with ilstudio_gateway(server.address, CONTRACT) as gateway:
        client = RawClient(gateway.port)
        client.actions(meta_obs())
    with client, pytest.raises((EOFError, ConnectionError)):
        client.receive()
    gateway.stop()
    gateway.close()
    assert not any("ilstudio" in thread.name for thread in threading.enumerate())
    with socket.create_server(("127.0.0.1", gateway.port)):
        pass
    wait_until(lambda: not names(server))


def test_stop_does_not_wait_for_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_listener, "CLOSE_S", 0.2)
    gate = threading.Semaphore(0)
    policy = ToyPolicy(gate)
    with serving(policy) as server:
        with ilstudio_gateway(server.address, CONTRACT) as gateway:
            client = RawClient(gateway.port)
            client.send(dumps(meta_obs()))
            assert policy.entered.acquire(timeout=5)
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 2
        with client, pytest.raises((EOFError, ConnectionError)):
            client.receive()
        gate.release(100)
        wait_until(lambda: not any("ilstudio" in each.name for each in threading.enumerate()))


# Parts


@pytest.mark.parametrize("shape", [(3, 24, 32), (3, 1, 1), (3, 5, 7)])
def test_planes_become_pixels(shape: tuple[int, ...]) -> None:
    planes = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    planes.flags.writeable = False
    assert np.array_equal(interleave(planes), planes.transpose(1, 2, 0))


def test_the_most_pictures_of_a_row() -> None:
    reader = IlstudioObservations(CONTRACT, ObservationKeys({"top": ImageSource("image/0")}))
    image = np.zeros((1, MAX_PICTURES, 3, 24, 32), np.uint8)
    (obs,) = reader.read(memoryview(dumps(meta_obs(image=image))))
    assert obs.images["top"].shape == (24, 32, 3)
    with pytest.raises(Exception, match=f"got {MAX_PICTURES + 1} pictures"):
        more = np.zeros((1, MAX_PICTURES + 1, 3, 0, 0), np.uint8)
        reader.read(memoryview(dumps(meta_obs(image=more))))
