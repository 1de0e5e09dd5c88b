"""A server of GR00T as our policy: what it is sent, and everything that it may answer instead."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.errors import ContractMismatch, InferenceError, PolicyError, UpstreamLost
from runtime.upstream import upstream_policy
from tests.upstream.fake_servers import KEY, FakeGroot, FakeOpenpi, groot_toy, modalities
from tests.upstream.foreign_model import toy
from tests.upstream.toy_upstream import GROOT_TOY, SIZE, load, observations


@pytest.fixture(autouse=True)
def short_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_policy, "FIRST_ANSWER_S", 0.0)


def test_the_servers_actions_are_the_policys(tmp_path: Path) -> None:
    with FakeGroot() as server:
        policy = load("groot", server.port, tmp_path, GROOT_TOY)
        for obs in observations(20):
            actions = policy.infer(obs).actions
            assert actions.tobytes() == toy(obs.images["top"], obs.state).tobytes()
        policy.close()
        policy.close()
    sent = server.requests[-1]["data"]["observation"]
    assert sent["video"]["front"].shape == (1, 1, *SIZE, 3)
    assert {key: value.shape for key, value in sent["state"].items()} == {
        "left": (1, 1, 7),
        "right": (1, 1, 7),
    }
    assert sent["language"] == {"task": [["pass the cube"]]}  # the only key that the server names


def test_an_episode_begins_with_a_reset_before_its_first_observation(tmp_path: Path) -> None:
    with FakeGroot() as server:
        policy = load("groot", server.port, tmp_path, GROOT_TOY)
        first, second, third = observations(3)
        for obs in (first, second):
            policy.infer(obs)
        policy.reset()
        policy.reset()
        policy.infer(third)
        policy.close()
    asked = [request["endpoint"] for request in server.requests]
    begun = ["get_modality_config", "get_action"]
    assert asked == [*begun, "reset", "get_action", "get_action", "reset", "get_action"]


def spoiled(action: Any) -> Callable[[dict[str, Any]], Any]:
    def answer(request: dict[str, Any]) -> Any:
        return action if request["endpoint"] == "get_action" else groot_toy(request)

    return answer


def parts(left: Any, right: Any = None) -> Any:
    return [{"left": left, "right": np.zeros((1, 10, 7)) if right is None else right}, {}]


SPOILED: list[tuple[Any, type[Exception], str]] = [
    ({"error": "list index out of range"}, InferenceError, "failed: list index out of range$"),
    (b"ERROR", InferenceError, "an answer that is not GR00T's"),
    (b"\xdf\xff\xff\xff\xff", InferenceError, "an answer that is not GR00T's"),
    ([1, 2], InferenceError, "action: got int, expected a map"),
    ([{"left": np.zeros((1, 10, 7))}, {}], InferenceError, "expected 'right'"),
    (parts("no"), InferenceError, r"action\.left: got str, expected an array of numbers"),
    (parts(np.zeros((2, 10, 7))), InferenceError, r"got shape \(2, 10, 7\), expected \(T, D\)"),
    (parts(np.zeros((1, 9, 7))), InferenceError, r"right\): got shape \(10, 7\), expected \(9, 7"),
    (parts(np.zeros((1, 9, 7)), np.zeros((1, 9, 7))), InferenceError,
     r"shape \(9, 14\), expected at least n_action_steps = 10 rows of 14"),
    (parts(np.zeros((1, 10, 6))), InferenceError, r"left\): got shape \(10, 6\), expected \(10, 7"),
    (parts(np.full((1, 10, 7), np.inf)), InferenceError, "NaN or infinity"),
    (None, UpstreamLost, r"no answer within 0\.1 s"),
    (bytes(17 * 2**20), UpstreamLost, "the connection ended"),
]  # fmt: skip


@pytest.mark.parametrize(("action", "kind", "message"), SPOILED)
def test_a_bad_answer_is_an_error_of_its_request(
    tmp_path: Path, action: Any, kind: type[Exception], message: str
) -> None:
    with FakeGroot() as server:
        policy = load("groot", server.port, tmp_path, GROOT_TOY)
        (obs,) = observations(1)
        policy.infer(obs)
        server.answer = spoiled(action)
        policy._server.timeout_s = 0.1 if "within" in message else 5.0
        with pytest.raises(PolicyError, match=message) as caught:
            policy.infer(obs)
        assert type(caught.value) is kind
        server.answer, policy._server.timeout_s = groot_toy, 5.0
        assert np.array_equal(policy.infer(obs).actions, toy(obs.images["top"], obs.state))
        policy.close()


@pytest.mark.parametrize("action", [action for action, *_ in SPOILED[:11]])
def test_the_start_is_refused_for_the_same_reasons(tmp_path: Path, action: Any) -> None:
    with FakeGroot(spoiled(action)) as server, pytest.raises(InferenceError):
        load("groot", server.port, tmp_path, GROOT_TOY)


def test_a_server_that_ended_is_connected_again_when_it_is_back(tmp_path: Path) -> None:
    (obs,) = observations(1)
    with FakeGroot() as server:
        policy = load("groot", server.port, tmp_path, GROOT_TOY)
    with pytest.raises(UpstreamLost, match=r"nobody listens there|the connection ended"):
        policy.infer(obs)
    with FakeGroot(port=server.port):
        assert np.array_equal(policy.infer(obs).actions, toy(obs.images["top"], obs.state))
        policy.close()


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UpstreamLost, match=f"groot://127.0.0.1:{port}: nobody listens there"):
        load("groot", port, tmp_path, GROOT_TOY)


def test_a_server_of_another_protocol(tmp_path: Path) -> None:
    with FakeOpenpi() as server, pytest.raises(UpstreamLost, match=r"expected|not one of GR00T"):
        load("groot", server.port, tmp_path, GROOT_TOY, timeout_s=0.3)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (modalities(video=["wrist"]), r"video: got keys \['front'\], expected \['wrist'\]"),
        (modalities(state=["left"]), r"state: got keys \['left', 'right'\], expected"),
        (modalities(video_ticks=[-1, 0]), r"video\.delta_indices: got \[-1, 0\], expected \[0\]"),
        (modalities(action=["left"]), r"actions: got \['right'\], expected some of \['left'\]"),
        (modalities(action_ticks=[0, 1]), "n_action_steps: got 10, expected at most 2"),
        (modalities(action_ticks=list(range(1, 11))), "first_action_offset: got 0, expected 1"),
        (modalities(language=["a", "b"]), r"prompt: got '', expected one of \['a', 'b'\]"),
    ],
)
def test_modalities_that_are_not_the_contracts(tmp_path: Path, says: Any, message: str) -> None:
    with FakeGroot(lambda _: says) as server, pytest.raises(ContractMismatch, match=message):
        load("groot", server.port, tmp_path, GROOT_TOY)


@pytest.mark.parametrize(
    "says",
    [7, {"video": 3}, {"video": {"as_json": {"modality_keys": 1}}},
     {"video": {"as_json": {"modality_keys": [1]}}},
     {"action": {"as_json": {"modality_keys": [], "delta_indices": ["now"]}}}],
)  # fmt: skip
def test_modalities_of_another_form(tmp_path: Path, says: Any) -> None:
    with FakeGroot(lambda _: says) as server, pytest.raises(InferenceError, match="expected"):
        load("groot", server.port, tmp_path, GROOT_TOY)


def test_the_key_is_shown_and_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text(KEY, encoding="utf-8")
    with FakeGroot(token=KEY) as server:
        load("groot", server.port, tmp_path, GROOT_TOY, api_key=str(path)).close()
        with pytest.raises(InferenceError, match=r"Unauthorized: .* \(--api_key\)"):
            load("groot", server.port, tmp_path, GROOT_TOY)
