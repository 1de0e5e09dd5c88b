"""A server of openpi as our policy: what it is sent, and everything that it may answer instead."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.errors import InferenceError, ObservationError, PolicyError, UpstreamLost
from runtime.upstream import upstream_policy
from runtime.wire_formats.msgpack_arrays import pack
from tests.upstream.fake_servers import KEY, FakeOpenpi, openpi_toy
from tests.upstream.foreign_model import toy
from tests.upstream.toy_upstream import SIZE, TOY, load, observations


@pytest.fixture(autouse=True)
def short_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_policy, "FIRST_ANSWER_S", 0.0)


def test_the_servers_actions_are_the_policys(tmp_path: Path) -> None:
    with FakeOpenpi() as server:
        policy = load("openpi", server.port, tmp_path, TOY)
        for obs in observations(20):
            chunk = policy.infer(obs)
            assert chunk.actions.tobytes() == toy(obs.images["top"], obs.state).tobytes()
            assert (chunk.obs_timestep, chunk.t_capture_ns) == (obs.timestep, obs.t_capture_ns)
        assert policy.fork() is policy
        policy.close()
        policy.close()
        sent = server.observations[-1]
    assert server.connections == 1
    assert sent["images"]["cam_high"].shape == (3, *SIZE)
    assert sent["prompt"] == "pass the cube"
    assert sent.keys() == {"images", "state", "prompt"}
    assert "prompt" not in server.observations[0]  # the start has no instruction


def test_keys_are_flat_unless_the_contract_says_nested(tmp_path: Path) -> None:
    cameras = {"top": {"key": "observation/image", "size": list(SIZE)}}
    state = [{"key": "observation/joints", "start": 0, "stop": 7}, {"key": "observation/other"}]
    answers = lambda _: pack({"actions": np.zeros((10, 14), np.float32)})  # noqa: E731
    with FakeOpenpi(answers) as server:
        changed = {"cameras": cameras, "state": state, "nested": False}
        policy = load("openpi", server.port, tmp_path, TOY, **changed)
        (obs,) = observations(1)
        policy.infer(obs)
        policy.close()
    sent = server.observations[-1]
    assert np.array_equal(sent["observation/image"], obs.images["top"])
    assert np.array_equal(sent["observation/joints"], obs.state[:7])
    assert np.array_equal(sent["observation/other"], obs.state[7:])


def test_a_camera_of_another_size_is_resized_only_if_the_contract_says_so(tmp_path: Path) -> None:
    camera = {"key": "images/cam_high", "layout": "chw", "size": [12, 16]}
    with FakeOpenpi() as server:
        resized = {"top": {**camera, "source_hw": list(SIZE), "resize": "area"}}
        policy = load("openpi", server.port, tmp_path, TOY, cameras=resized)
        (obs,) = observations(1)
        policy.infer(obs)
        policy.close()
        assert server.observations[-1]["images"]["cam_high"].shape == (3, 12, 16)
        policy = load("openpi", server.port, tmp_path, TOY, cameras={"top": camera})
        with pytest.raises(PolicyError, match=r"images\.top: got shape \(24, 32, 3\), expected"):
            policy.infer(obs)
        policy.close()


def test_a_slice_of_longer_actions(tmp_path: Path) -> None:
    rows = np.arange(12 * 32, dtype=np.float64).reshape(12, 32)
    with FakeOpenpi(lambda _: pack({"actions": rows})) as server:
        actions = [{"key": "actions", "start": 2, "stop": 16}]
        policy = load("openpi", server.port, tmp_path, TOY, actions=actions)
        got = policy.infer(observations(1)[0]).actions
        policy.close()
    assert got.dtype == np.float32  # the first chunk_size rows of more
    assert np.array_equal(got, rows[:10, 2:16].astype(np.float32))


SPOILED: list[tuple[Any, type[Exception], str]] = [
    (lambda _: "Traceback\n  line 3\nValueError: no such key\n", InferenceError,
     "the server failed: ValueError: no such key$"),
    (lambda _: b"\xc1garbage", InferenceError, "a frame that is not openpi's"),
    (lambda _: b"\xdf\xff\xff\xff\xff", InferenceError, "a frame that is not openpi's"),
    (lambda _: pack({"action": 1}), InferenceError, r"got keys \['action'\], expected 'actions'"),
    (lambda _: pack({"actions": [1.0]}), InferenceError, "got list, expected an array of numbers"),
    (lambda _: pack({"actions": np.zeros(14)}), InferenceError, r"got shape \(14,\), expected"),
    (lambda _: pack({"actions": np.zeros((9, 14))}), InferenceError,
     r"shape \(9, 14\), expected at least n_action_steps = 10 rows of 14"),
    (lambda _: pack({"actions": np.zeros((10, 13))}), InferenceError, r"\(10, 13\), expected"),
    (lambda _: pack({"actions": np.zeros((10, 15))}), InferenceError, r"\(10, 15\), expected"),
    (lambda _: pack({"actions": np.full((10, 14), np.nan)}), InferenceError, "NaN or infinity"),
    (lambda _: pack({"actions": np.full((10, 14), 1e300)}), InferenceError, "NaN or infinity"),
    (lambda _: None, UpstreamLost, r"no answer within 0\.1 s"),
    (lambda _: bytes(17 * 2**20), UpstreamLost, "the connection ended: .*too big"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "message"), SPOILED)
def test_a_bad_answer_is_an_error_of_its_request(
    tmp_path: Path, spoil: Callable[[Any], Any], kind: type[Exception], message: str
) -> None:
    with FakeOpenpi() as server:
        policy = load("openpi", server.port, tmp_path, TOY, timeout_s=5.0)
        (obs,) = observations(1)
        server.answer = spoil
        if kind is UpstreamLost:
            policy._server.timeout_s = 0.1 if "within" in message else 5.0
        with pytest.raises(PolicyError, match=message) as caught:
            policy.infer(obs)
        assert type(caught.value) is kind
        policy._server.timeout_s = 5.0
        server.answer = openpi_toy
        assert np.array_equal(policy.infer(obs).actions, toy(obs.images["top"], obs.state))
        policy.close()


@pytest.mark.parametrize("spoil", [spoil for spoil, *_ in SPOILED[:11]])
def test_the_start_is_refused_for_the_same_reasons(
    tmp_path: Path, spoil: Callable[[Any], Any]
) -> None:
    with FakeOpenpi(spoil) as server, pytest.raises(InferenceError, match=r"openpi://|actions"):
        load("openpi", server.port, tmp_path, TOY)


def test_a_late_answer_is_not_the_next_requests(tmp_path: Path) -> None:
    late, answered = threading.Event(), threading.Event()

    def answer(observation: dict[str, Any]) -> bytes:
        if not late.is_set():
            late.set()
            answered.wait(5)
        return openpi_toy(observation)

    with FakeOpenpi() as server:
        policy = load("openpi", server.port, tmp_path, TOY)
        first, second = observations(2)
        server.answer, policy._server.timeout_s = answer, 0.1
        with pytest.raises(UpstreamLost, match="no answer within"):
            policy.infer(first)
        answered.set()
        policy._server.timeout_s = 5.0
        got = policy.infer(second).actions
        policy.close()
    assert np.array_equal(got, toy(second.images["top"], second.state))


def test_a_server_that_ended_is_connected_again_when_it_is_back(tmp_path: Path) -> None:
    (obs,) = observations(1)
    with FakeOpenpi() as server:
        policy = load("openpi", server.port, tmp_path, TOY)
    with pytest.raises(UpstreamLost, match=r"nobody listens there|the connection ended"):
        policy.infer(obs)
    with FakeOpenpi(port=server.port):
        assert np.array_equal(policy.infer(obs).actions, toy(obs.images["top"], obs.state))
        policy.close()


def test_an_observation_with_nan_is_not_sent(tmp_path: Path) -> None:
    with FakeOpenpi() as server:
        policy = load("openpi", server.port, tmp_path, TOY)
        (obs,) = observations(1)
        obs.state[3] = np.nan
        asked = len(server.observations)
        with pytest.raises(ObservationError, match="state"):
            policy.infer(obs)
        assert len(server.observations) == asked
        policy.close()


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UpstreamLost, match=f"openpi://127.0.0.1:{port}: nobody listens there"):
        load("openpi", port, tmp_path, TOY)


@pytest.mark.parametrize(
    ("hello", "kind", "message"),
    [
        (None, UpstreamLost, "a websocket that says nothing within"),
        ("hello", InferenceError, "got the text 'hello', expected openpi's metadata"),
        (b"\x01", InferenceError, "a frame that is not openpi's"),
    ],
)
def test_another_websocket_server(
    tmp_path: Path, hello: Any, kind: type[Exception], message: str
) -> None:
    with FakeOpenpi(hello=hello) as server, pytest.raises(kind, match=message):
        load("openpi", server.port, tmp_path, TOY, timeout_s=0.2)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"no\r\n"])
def test_a_server_of_another_protocol(tmp_path: Path, says: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            with listener.accept()[0] as client:
                client.sendall(says)
                client.settimeout(5)
                while says and client.recv(4096):
                    client.close()
                    return
                time.sleep(0 if says else 0.4)

        thread = threading.Thread(target=speak)
        thread.start()
        expected = "got no websocket|got HTTP status 200|nobody listens"
        with pytest.raises(PolicyError, match=expected):
            load("openpi", listener.getsockname()[1], tmp_path, TOY, timeout_s=0.2)
        thread.join()


def test_the_key_is_shown_and_another_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    with FakeOpenpi(api_key=KEY) as server:
        for text in (KEY, KEY[::-1]):
            path.write_text(text, encoding="utf-8")
            if text == KEY:
                load("openpi", server.port, tmp_path, TOY, api_key=str(path)).close()
                continue
            with pytest.raises(InferenceError, match=r"status 401, expected a key .*\(--api_key\)"):
                load("openpi", server.port, tmp_path, TOY, api_key=str(path))
        path.chmod(0o644)
        with pytest.raises(PolicyError, match=r"--api_key: .*got mode 0644"):
            load("openpi", server.port, tmp_path, TOY, api_key=str(path))
