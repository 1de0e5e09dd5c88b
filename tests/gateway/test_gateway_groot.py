"""The GR00T gateway, with REQ sockets for its clients."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from policies.errors import ContractMismatch
from policies.types import ActionChunk, CameraContract, MetaObs
from policies.yaml_config import InvalidConfig, load_config
from runtime.gateway.client_log import ClientLog
from runtime.gateway.config import GatewayCommand, SessionOptions
from runtime.gateway.groot.client import GrootRequests
from runtime.gateway.groot.gateway import GrootGateway, max_request_bytes
from runtime.gateway.groot.modalities import GrootModalities
from runtime.options.api_keys import ApiKeys
from runtime.options.observation_keys import ImageSource, ObservationKeys, StateSource
from runtime.server import PolicyServer
from runtime.wire_formats.bounded_msgpack import MAX_DEPTH, MAX_TEXT_BYTES, MalformedFrame
from runtime.wire_formats.npy_arrays import decode_array, pack, read_npy, unpack, write_npy
from tests.gateway.groot_rig import GrootPeer, gateway, observation, wait_for
from tests.gateway.openpi_serving import StatelessPolicy
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import CHUNK, CONTRACT, STATE_DIM, ToyPolicy
from tests.runtime.toy_policy import observation as own_observation


class Attentive(ToyPolicy):
    """Keeps the observations; element 0 of its actions is not a count."""

    def __init__(self, seen: list[MetaObs] | None = None) -> None:
        super().__init__()
        self.seen = [] if seen is None else seen

    def infer(self, obs: MetaObs) -> ActionChunk:
        state, images = obs.state.copy(), {k: v.copy() for k, v in obs.images.items()}
        self.seen.append(dataclasses.replace(obs, state=state, images=images))
        return super().infer(obs)

    def fork(self) -> Attentive:
        return Attentive(self.seen)


@pytest.fixture
def policy() -> Attentive:
    return Attentive()


@pytest.fixture
def server(policy: Attentive) -> Iterator[PolicyServer]:
    with serving(policy, port=0) as made:
        yield made


@pytest.fixture
def served(server: PolicyServer) -> Iterator[GrootGateway]:
    with gateway(f"{server.host}:{server.port}") as made:
        yield made


@pytest.fixture
def peer(served: GrootGateway) -> Iterator[GrootPeer]:
    with GrootPeer(served.port) as made:
        yield made


def names(server: PolicyServer) -> list[str]:
    """The sessions' names, of a server that may add or end one at the moment."""
    while True:
        with contextlib.suppress(RuntimeError):
            return [row["client"] for row in server.status()["sessions"]]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# Endpoints


def test_actions_are_those_of_our_own_client(peer: GrootPeer, server: PolicyServer) -> None:
    with connect(server) as client:
        for i in range(20):
            action, info = peer.act(i / 7, shade=i)
            expected = client.infer(own_observation(i / 7, shade=i)).actions
            assert info == {} and list(action) == ["action"]
            assert action["action"].dtype == np.float32
            assert action["action"].shape == (1, CHUNK, STATE_DIM)
            assert action["action"].tobytes() == expected.tobytes()


def test_the_instruction_and_the_count_of_steps_reach_the_policy(
    peer: GrootPeer, policy: Attentive
) -> None:
    before = len(policy.seen)
    peer.act(), peer.act()
    assert [(obs.raw_lang, obs.timestep) for obs in policy.seen[before:]] == [("go", 0), ("go", 1)]


def test_get_action_is_the_default_endpoint(peer: GrootPeer) -> None:
    action, _ = peer.call(None, {"observation": observation()})
    assert action["action"].shape == (1, CHUNK, STATE_DIM)


def test_reset_starts_an_episode_of_this_client_alone(served: GrootGateway) -> None:
    with GrootPeer(served.port) as one, GrootPeer(served.port) as other:
        asked = [peer.act()[0]["action"][0, 0, 0] for peer in (one, one, other, other, other)]
        assert asked == [1, 2, 1, 2, 3]
        assert one.call("reset", {"options": None}) == {}
        assert one.act()[0]["action"][0, 0, 0] == 1
        assert other.act()[0]["action"][0, 0, 0] == 4


@pytest.mark.parametrize("data", [{"options": None}, {"options": {}}, {}, None])
def test_reset_before_the_first_observation_is_no_error(peer: GrootPeer, data: Any) -> None:
    assert peer.call("reset", data) == {}


def test_ping(peer: GrootPeer) -> None:
    assert peer.call("ping") == {"status": "ok", "message": "Server is running"}


def test_the_modality_configuration_is_the_contract(peer: GrootPeer) -> None:
    found = peer.call("get_modality_config")
    assert all(value["__ModalityConfig_class__"] is True for value in found.values())
    assert {name: value["as_json"] for name, value in found.items()} == {
        "video": {"delta_indices": [0], "modality_keys": ["top"]},
        "state": {"delta_indices": [0], "modality_keys": ["state"]},
        "action": {"delta_indices": list(range(CHUNK)), "modality_keys": ["action"]},
        "language": {
            "delta_indices": [0],
            "modality_keys": ["annotation.human.task_description"],
        },
    }


def test_a_policy_without_cameras_has_no_empty_modality() -> None:
    """GR00T's own class refuses one."""
    blind = dataclasses.replace(CONTRACT, cameras=(), first_action_offset=2)
    found = GrootModalities(blind, ObservationKeys()).config()
    assert "video" not in found
    assert found["action"]["as_json"]["delta_indices"] == list(range(2, 2 + CHUNK))


@pytest.mark.parametrize("endpoint", ["kill", "", "get_action ", 7])
def test_an_unknown_endpoint_is_refused(peer: GrootPeer, endpoint: Any) -> None:
    assert peer.call(endpoint) == {
        "error": f"endpoint: got {endpoint!r}, "
        "expected one of get_action, get_modality_config, ping, reset"
    }
    assert peer.call("ping")["status"] == "ok"


# Dialects and names


def test_a_flat_observation_is_the_same(peer: GrootPeer, policy: Attentive) -> None:
    nested = observation(3)
    flat = {
        "video.top": nested["video"]["top"],
        "state.state": nested["state"]["state"],
        "annotation.human.action.task_description": ["go"],
    }
    first, _ = peer.call("get_action", {"observation": nested})
    peer.call("reset", {})
    second, _ = peer.call("get_action", {"observation": flat})
    assert list(second) == ["action.action"]
    assert first["action"].tobytes() == second["action.action"].tobytes()
    assert [obs.raw_lang for obs in policy.seen[-2:]] == ["go", "go"]


PICTURE_1_5 = np.zeros((1, 24, 32, 3), np.uint8)


@pytest.fixture
def stateless() -> Iterator[PolicyServer]:
    with serving(StatelessPolicy(), port=0) as made:
        yield made


def test_version_1_5_gets_a_bare_map(stateless: PolicyServer) -> None:
    """Its data is the observation; without an axis for the batch, neither has the action one."""
    state = np.full((1, STATE_DIM), 2.0)
    with gateway(f"127.0.0.1:{stateless.port}") as made, GrootPeer(made.port) as peer:
        one = peer.call("get_action", {"video.top": PICTURE_1_5, "state.state": state})
        batch = peer.call(
            "get_action", {"video.top": PICTURE_1_5[None], "state.state": state[None]}
        )
    assert one["action.action"].shape == (CHUNK, STATE_DIM) and one["action.action"][1, 2] == 3
    assert batch["action.action"].shape == (1, CHUNK, STATE_DIM)


def test_a_part_of_one_number_has_no_axis_in_version_1_5(stateless: PolicyServer) -> None:
    keys = ObservationKeys(state=(StateSource("arm", stop=13), StateSource("hand", stop=1)))
    parts = {"state.arm": np.zeros((1, 13)), "state.hand": np.full((1, 1), 5.0)}
    with gateway(f"127.0.0.1:{stateless.port}", keys=keys) as made, GrootPeer(made.port) as peer:
        found = peer.call("get_action", {"video.top": PICTURE_1_5, **parts})
    assert found["action.arm"].shape == (CHUNK, 13)
    assert found["action.hand"].tolist() == [5 + i for i in range(CHUNK)]


def test_version_1_5_is_refused_a_policy_with_an_episode_state(peer: GrootPeer) -> None:
    """It cannot say that an episode begins."""
    state = np.zeros((1, STATE_DIM))
    found = peer.call("get_action", {"video.top": PICTURE_1_5, "state.state": state})
    assert found["error"].startswith("policy: got one that keeps a state between observations")


INSTRUCTION = "annotation.human.task_description"


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ({}, ""),
        ({"language": {}}, ""),
        ({"language": {"task": [["a"]]}}, "a"),
        ({"language": {"task": [["a"]], "other": "b", INSTRUCTION: [["c"]]}}, "c"),
        ({"task": ["a"]}, "a"),
        ({"task": ["a"], "annotation.human.coarse_action": ["b"]}, "b"),
        ({"annotation.human.validity": "a", INSTRUCTION: ["b"]}, "b"),
    ],
)
def test_the_instruction_is_found_by_its_key(language: dict[str, Any], expected: str) -> None:
    given = {key: value for key, value in observation().items() if key != "language"}
    found = GrootModalities(CONTRACT, ObservationKeys()).read({**given, **language}, 0)
    assert found.raw_lang == expected


SPLIT = ObservationKeys(
    {"top": ImageSource("video.front")},
    (StateSource("state.arm", stop=10), StateSource("state/hand", stop=3), StateSource("z", 0, 1)),
)


def test_configured_names_are_told_taken_and_split(server: PolicyServer) -> None:
    arm, hand = np.arange(10, dtype=np.float32), np.array([50, 60, 70], np.float32)
    picture = np.zeros((1, 1, 24, 32, 3), np.uint8)
    parts = {"hand": hand[None, None], "z": np.full((1, 1, 1), 9.0), "arm": arm[None, None]}
    with (
        gateway(f"{server.host}:{server.port}", keys=SPLIT) as made,
        GrootPeer(made.port) as peer,
    ):
        config = peer.call("get_modality_config")
        assert config["video"]["as_json"]["modality_keys"] == ["front"]
        for modality in ("state", "action"):
            assert config[modality]["as_json"]["modality_keys"] == ["arm", "hand", "z"]
        nested, _ = peer.call(
            "get_action", {"observation": {"video": {"front": picture}, "state": parts}}
        )
        flat = {f"state.{name}": part for name, part in parts.items()}
        flat, _ = peer.call("get_action", {"observation": {"video.front": picture, **flat}})
    assert {name: part.shape for name, part in nested.items()} == {
        "arm": (1, CHUNK, 10),
        "hand": (1, CHUNK, 3),
        "z": (1, CHUNK, 1),
    }
    assert nested["hand"][0, 2].tolist() == [52, 62, 72] and nested["z"][0, 0, 0] == 9
    assert list(flat) == ["action.arm", "action.hand", "action.z"]


@pytest.mark.parametrize(
    "state",
    [
        (StateSource("state", 0, 7), StateSource("state", 7, 14)),
        (StateSource("arm"), StateSource("hand", stop=4)),
        (StateSource("arm", stop=14),),
    ],
    ids=["one key twice", "a size unknown", "one key"],
)
def test_actions_that_have_no_parts_are_whole(state: tuple[StateSource, ...]) -> None:
    found = GrootModalities(CONTRACT, ObservationKeys(state=state)).config()
    assert found["action"]["as_json"]["modality_keys"] == ["action"]


def test_the_example_configuration_fits_its_arm() -> None:
    keys = load_config(ObservationKeys, "groot_so101", kind="gateway")
    cameras = tuple(CameraContract(name, (24, 32), (24, 32)) for name in ("front", "wrist"))
    arm = dataclasses.replace(CONTRACT, cameras=cameras, state_dim=6, action_dim=6)
    found = GrootModalities(arm, keys).config()
    assert found["video"]["as_json"]["modality_keys"] == ["front", "wrist"]
    assert found["action"]["as_json"]["modality_keys"] == ["single_arm", "gripper"]


def test_a_configuration_for_another_policy_is_refused() -> None:
    keys = ObservationKeys({"left": ImageSource("video.left")})
    with pytest.raises(InvalidConfig, match=r"cameras: got 'left', expected .*\['top'\]"):
        GrootGateway(GatewayCommand("groot", port=0), keys, None, CONTRACT)


# Refusals


PICTURE, STATE = (1, 1, 24, 32, 3), (1, 1, STATE_DIM)


@pytest.mark.parametrize(
    ("changes", "field", "got", "expected"),
    [
        ({"video": {}}, "images.top", "'state/state'", "'video/top'"),
        ({"video": {"top": np.zeros((2, 1, 24, 32, 3), np.uint8)}}, "video.top", "(2, 1,", "one"),
        ({"video": {"top": np.zeros((1, 3, 24, 32, 3), np.uint8)}}, "video.top", "(1, 3,", "one"),
        ({"video": {"top": np.zeros((1, 1, 48, 64, 3), np.uint8)}}, "images.top", "48", "24"),
        ({"video": {"top": np.zeros((24, 3), np.uint8)}}, "video.top", "(24, 3)", "(1, 1, H,"),
        ({"video": {"top": np.zeros((1, *PICTURE), np.uint8)}}, "video.top", "(1, 1, 1", "one"),
        ({"video": {"top": np.zeros(PICTURE, np.float32)}}, "images.top", "float32", "uint8"),
        ({"video": {"top": [[1]]}}, "video.top", "list", "an array"),
        ({"video": [1]}, "video", "list", "a map"),
        ({"state": {"state": np.zeros((1, 1, 7), np.float32)}}, "state", "7 numbers", "14"),
        ({"state": {"state": np.zeros((2, 1, 14), np.float32)}}, "state.state", "(2, 1,", "one"),
        ({"state": {"arm": np.zeros(STATE, np.float32)}}, "state", "state/arm", "state/state"),
        ({"state": {"state": np.full(STATE, np.nan)}}, "state", "NaN", "finite"),
        ({"state": {"state": np.full(STATE, 1e300)}}, "state", "infinity", "finite"),
        ({"language": {"task": [["a"], ["b"]]}}, "language.task", "'b'", "one of each"),
        ({"language": {"task": 5}}, "language.task", "5", "text"),
    ],
)
def test_an_observation_that_does_not_fit_is_refused(
    peer: GrootPeer, changes: dict[str, Any], field: str, got: str, expected: str
) -> None:
    found = peer.call("get_action", {"observation": {**observation(), **changes}})
    error = found["error"]
    assert error.startswith(field) and got in error.partition("expected")[0], error
    assert expected in error.partition("expected")[2], error
    assert peer.act()[0]["action"].shape == (1, CHUNK, STATE_DIM)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ([1, 2], "frame: got list, expected a map"),
        ({1: 2}, "frame: got a key 1, expected text"),
        ({b"endpoint": "ping"}, "frame: got the bytes key b'endpoint', expected a text key"),
        ({"endpoint": "get_action"}, "data: got NoneType, expected a map"),
        ({"data": {"observation": 7}}, "observation: got int, expected a map"),
        (
            {"data": {"observation": {}, "seed": 7}},
            "data: got key 'seed', expected observation and options",
        ),
        ({"data": {"observation": {}, "options": {"steps": 4}}}, "options: got {'steps': 4}, exp"),
        ({"endpoint": "reset", "data": {"options": {"seed": 1}}}, "options: got {'seed': 1}, exp"),
        ({"endpoint": "reset", "data": {"seed": 1}}, "data: got key 'seed', expected options"),
        ({"endpoint": "reset", "data": [1]}, "data: got list, expected a map"),
    ],
)
def test_a_request_of_another_form_is_refused(peer: GrootPeer, request_: Any, error: str) -> None:
    peer.send_raw(msgpack.packb(request_))
    assert peer.receive()["error"].startswith(error)
    assert peer.call("ping")["status"] == "ok"


def test_an_error_of_the_policy_is_told(peer: GrootPeer) -> None:
    assert "a bug in the policy" in peer.act(666)["error"]
    assert "error" not in peer.act(1)


def test_a_session_that_is_not_admitted_shows_at_the_reset(server: PolicyServer) -> None:
    robot = SessionOptions("robot", rate_hz=1000.0, deadline_ms=0.001)
    address = f"{server.host}:{server.port}"
    with connect(server) as client:
        client.infer(own_observation())  # now the server knows how long one takes
    with gateway(address, sessions=robot) as made, GrootPeer(made.port) as peer:
        assert peer.call("reset")["error"].startswith("deadline_ms: got its own 0.001")


def test_another_policy_behind_the_gateway_is_refused(server: PolicyServer) -> None:
    other = dataclasses.replace(CONTRACT, chunk_size=5, n_action_steps=5)
    address = f"{server.host}:{server.port}"
    with gateway(address, contract=other) as made, GrootPeer(made.port) as peer:
        for reply in (peer.call("reset"), peer.act()):
            assert reply["error"] == (
                "policy: got another one than before, with chunk_size 10, n_action_steps 10, "
                "expected chunk_size 5, n_action_steps 5"
            )
    assert wait_for(lambda: not names(server))


def test_another_normalizer_is_no_other_policy(server: PolicyServer) -> None:
    """The actions are in physical units."""
    trained_again = dataclasses.replace(CONTRACT, normalizer_hash="0" * 64)
    with (
        gateway(f"{server.host}:{server.port}", contract=trained_again) as made,
        GrootPeer(made.port) as peer,
    ):
        assert "error" not in peer.act()


def test_an_error_that_is_no_text_is_told(server: PolicyServer) -> None:
    command = GatewayCommand("groot", server=f"{server.host}:{server.port}")
    modalities = GrootModalities(CONTRACT, ObservationKeys())
    log = ClientLog(logging.getLogger(__name__))
    requests = GrootRequests(command, "groot", None, modalities, threading.Semaphore(), log=log)
    assert msgpack.unpackb(requests.refuse("a\udcff")) == {"error": "a?"}


# Keys


@pytest.fixture
def api_keys(tmp_path: Path) -> ApiKeys:
    path = tmp_path / "keys"
    path.write_text("k" * 20 + "\n" + "é" * 20)
    path.chmod(0o600)
    return ApiKeys(path)


@pytest.mark.parametrize("token", [None, "", "k" * 19, "k" * 21, "\ud800"])
def test_a_wrong_token_is_refused_on_every_endpoint(
    server: PolicyServer, api_keys: ApiKeys, token: str | None
) -> None:
    address = f"{server.host}:{server.port}"
    with gateway(address, api_keys=api_keys, max_clients=1) as made:
        for endpoint in ("ping", "reset", "get_modality_config", "get_action", "kill"):
            # One place: who is refused does not keep it.
            with GrootPeer(made.port) as peer:
                request = {"endpoint": endpoint, "api_token": token, "data": {}}
                peer.send_raw(msgpack.packb(request, unicode_errors="surrogatepass"))
                assert set(peer.receive()) == {"error"}
        assert names(server) == []
        with GrootPeer(made.port, "é" * 20) as peer:
            assert peer.call("ping")["status"] == "ok"
            assert peer.act()[0]["action"].shape == (1, CHUNK, STATE_DIM)


# Many clients


def test_a_slow_request_delays_no_other_client() -> None:
    gate = threading.Semaphore(1000)
    with (
        serving(ToyPolicy(gate), port=0) as server,
        gateway(f"127.0.0.1:{server.port}") as made,
        contextlib.ExitStack() as stack,
    ):
        while gate.acquire(blocking=False):
            pass
        stack.callback(gate.release, 100)
        slow = [stack.enter_context(GrootPeer(made.port)) for _ in range(7)]
        free = stack.enter_context(GrootPeer(made.port))
        for peer in slow:
            peer.send("get_action", {"observation": observation(1)})
        start_s = time.monotonic()
        assert free.call("ping")["status"] == "ok"
        assert "video" in free.call("get_modality_config")
        assert time.monotonic() - start_s < 1
        gate.release(100)
        actions = [peer.receive()[0]["action"] for peer in slow]
        assert [action[0, 0, 1] for action in actions] == [pytest.approx(1.1)] * 7
        assert len(set(names(server))) == 7
        assert all(name.startswith("groot 127.0.0.1:") for name in names(server))


def test_replies_of_many_clients_are_not_mixed_up(served: GrootGateway) -> None:
    wrong: list[object] = []

    def ask(number: int) -> None:
        with GrootPeer(served.port) as peer:
            for step in range(15):
                value = number * 100 + step
                action = peer.act(value, shade=0)[0]["action"]
                if action[0, 0, 1] != value or action[0, 0, 0] != step + 1:
                    wrong.append((number, step, action[0, 0, :2]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_there_are_at_most_max_clients(server: PolicyServer) -> None:
    with (
        gateway(f"{server.host}:{server.port}", max_clients=2) as made,
        GrootPeer(made.port) as one,
        GrootPeer(made.port) as two,
        GrootPeer(made.port) as three,
    ):
        assert one.call("ping")["status"] == two.call("ping")["status"] == "ok"
        assert three.call("ping") == {"error": "clients: got 3, expected at most 2"}
        two.close()
        assert wait_for(lambda: "status" in three.call("ping"))


def test_a_second_request_before_the_reply_is_answered_after_it(served: GrootGateway) -> None:
    packed = pack({"data": {"observation": observation()}})
    with GrootPeer(served.port, kind=zmq.DEALER) as peer:
        for number in (b"1", b"2"):
            peer.socket.send_multipart([number, b"", packed])
        for number in (b"1", b"2"):
            found, empty, reply = peer.socket.recv_multipart()
            assert (found, empty) == (number, b"")
            assert msgpack.unpackb(reply, object_hook=decode_array)[0]["action"][0, 0, 0] == int(
                number
            )


def test_a_connection_that_has_no_room_waits(
    server: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.gateway.groot.gateway.MORE_CONNECTIONS", 0)
    with (
        gateway(f"{server.host}:{server.port}", max_clients=1) as made,
        GrootPeer(made.port) as one,
    ):
        assert one.call("ping")["status"] == "ok"
        with GrootPeer(made.port) as waits:
            waits.send("ping")
            assert not waits.socket.poll(300)
            one.close()
            assert waits.receive()["status"] == "ok"


# Deaths


def test_a_session_ends_with_its_connection(served: GrootGateway, server: PolicyServer) -> None:
    before = threading.active_count()
    with GrootPeer(served.port) as stays:
        stays.act()
        for _ in range(3):
            with GrootPeer(served.port) as leaves:
                leaves.act()
                assert len(names(server)) == 2
            assert wait_for(lambda: len(names(server)) == 1)
        assert stays.act()[0]["action"][0, 0, 0] == 2
        assert wait_for(lambda: threading.active_count() <= before + 2)


def test_a_client_that_leaves_during_its_request_is_forgotten() -> None:
    gate = threading.Semaphore(1000)
    policy = ToyPolicy(gate)
    with (
        serving(policy, port=0) as server,
        gateway(f"127.0.0.1:{server.port}") as made,
        GrootPeer(made.port) as stays,
    ):
        stays.act()
        while gate.acquire(blocking=False) or policy.entered.acquire(blocking=False):
            pass
        with GrootPeer(made.port) as leaves:
            leaves.send("get_action", {"observation": observation()})
            assert policy.entered.acquire(timeout=10)
        gate.release(100)
        assert wait_for(lambda: len(names(server)) == 1)
        assert stays.act()[0]["action"][0, 0, 0] == 2


def test_a_server_that_dies_is_an_error_and_its_successor_is_used() -> None:
    with contextlib.ExitStack() as stack:
        with serving(ToyPolicy(), port=0) as first:
            made = stack.enter_context(gateway(f"127.0.0.1:{first.port}", timeout_s=2.0))
            peer = stack.enter_context(GrootPeer(made.port))
            assert peer.act(1)[0]["action"][0, 0, 0] == 1
        assert "gone" in peer.act(2)["error"]
        assert peer.call("ping")["status"] == "ok"
        assert "error" in peer.act(3)
        with serving(ToyPolicy(), port=first.port):
            assert wait_for(lambda: "error" not in peer.act(4))
            assert peer.act(5)[0]["action"][0, 1, 1] == pytest.approx(6.1)
            peer.close()


def test_a_client_between_two_requests_outlives_its_gateway(server: PolicyServer) -> None:
    address = f"{server.host}:{server.port}"
    with contextlib.ExitStack() as stack:
        with gateway(address) as first:
            peer = stack.enter_context(GrootPeer(first.port))
            assert [peer.act()[0]["action"][0, 0, 0] for _ in range(2)] == [1, 2]
        with gateway(address, port=first.port):
            assert peer.act()[0]["action"][0, 0, 0] == 1


# Start and stop


def test_a_taken_address_is_an_oserror(served: GrootGateway) -> None:
    command = GatewayCommand("groot", port=served.port)
    with pytest.raises(OSError, match=str(served.port)):
        GrootGateway(command, ObservationKeys(), None, CONTRACT)


def test_close_ends_sessions_and_frees_address_and_descriptors(server: PolicyServer) -> None:
    before = descriptors()
    for _ in range(3):
        with gateway(f"{server.host}:{server.port}") as made, GrootPeer(made.port) as peer:
            peer.act()
            made.stop()
            made.stop()
        made.close()
        made.stop()
        assert wait_for(lambda: not names(server))
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", made.port))
    assert wait_for(lambda: descriptors() <= before)


def test_close_does_not_wait_for_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.gateway.client_listener.CLOSE_S", 0.1)
    gate = threading.Semaphore(1000)
    policy = ToyPolicy(gate)
    with serving(policy, port=0) as server, contextlib.ExitStack() as stack:
        while gate.acquire(blocking=False) or policy.entered.acquire(blocking=False):
            pass
        stack.callback(gate.release, 100)
        with gateway(f"127.0.0.1:{server.port}") as made:
            peer = stack.enter_context(GrootPeer(made.port))
            peer.send("get_action", {"observation": observation()})
            assert policy.entered.acquire(timeout=10)
            start_s = time.monotonic()
        assert time.monotonic() - start_s < 2
        gate.release(100)
        assert wait_for(lambda: not names(server))


# Hostile messages


def header(text: str, version: bytes = b"\1\0", size: int | None = None) -> bytes:
    data = text.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(data) if size is None else size) + data


def npy(descr: str = "'<f4'", shape: str = "(2,)", data: bytes = bytes(8)) -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n") + data


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "expected a .npy"),
        (b"\x93NUMPY\4\0" + bytes(99), "expected a .npy"),
        (header("", size=65535) + bytes(9), "header of 65535 bytes, expected at most"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(99), "header of 4294967295 bytes"),
        (npy("'|O'"), "dtype '|O'"),
        (npy("'<U1'"), "dtype '<U1'"),
        (npy("'>f4'"), "dtype '>f4'"),
        (npy("'|V8'"), "dtype '|V8'"),
        (npy("[('a', '<f4')]"), "header"),
        (npy("__import__('os')"), "header"),
        (npy(shape="(-2,)"), "header"),
        (npy(shape="(" * 400), "header"),
        (npy(shape="(" + "1, " * 9 + "1)"), "header"),
        (npy(shape="(" + "1" * 99 + "x)"), "header"),
        (npy(shape="(999999999999, 999999999999)"), "got 8 bytes, expected 3999"),
        (npy(shape="(0, 999999999999, 999999999999)", data=b""), "expected a smaller one"),
        (npy(shape="(3,)"), "got 8 bytes, expected 12"),
        (npy(shape="(1,)"), "got 8 bytes, expected 4"),
        (npy()[:40], "header"),
    ],
)
def test_a_hostile_npy_is_refused(data: bytes, error: str) -> None:
    with pytest.raises(MalformedFrame, match="as_npy: got") as caught:
        read_npy(data)
    assert error in str(caught.value)


def test_a_pickled_npy_is_not_unpickled(peer: GrootPeer, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.mkdir, (tmp_path / "evil",))

    file = io.BytesIO()
    np.save(file, np.array([Evil()], object), allow_pickle=True)
    wrong = {"__ndarray_class__": True, "as_npy": file.getvalue()}
    found = peer.call("get_action", {"observation": {**observation(), "state": {"state": wrong}}})
    assert "dtype '|O'" in found["error"] and not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "array",
    [
        np.float32(3),
        np.arange(3.0),
        np.zeros((0, 3), np.int16),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(256, dtype=np.uint8).reshape((1,) * 7 + (256,)),
        np.array([True, False]),
    ],
)
def test_arrays_are_read_as_numpy_wrote_them(array: np.ndarray) -> None:
    array = np.asarray(array)
    found = unpack(pack({"x": array}))["x"]
    assert found.dtype == array.dtype and found.shape == array.shape
    assert (found == array).all()
    assert read_npy(write_npy(array)).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "frame: got an end after 0 bytes"),
        (b"\x81\xa1a" * 100_000, f"a/a/a/a/a/a/a/a: got more than {MAX_DEPTH} levels"),
        (b"\xdf\xff\xff\xff\xff" + bytes(60_000), "frame: got 8589934590 values"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff" + bytes(99), "a: got an end after 107 bytes"),
        (b"\x81\xa1a\xdb\x00\x01\x00\x01" + bytes(65537), f"expected at most {MAX_TEXT_BYTES}"),
        (b"\x81\xa1a\xc7\x01\x05\x00", "a: got type 0xc7"),
        (b"\x80\xc0", "frame: got 1 bytes after the map"),
        (b"\x81\xa1a\xa1\xff", "a: got text that is not UTF-8"),
    ],
)
def test_hostile_messagepack_is_refused(data: bytes, error: str, peer: GrootPeer) -> None:
    with pytest.raises(MalformedFrame) as caught:
        unpack(data)
    assert error in str(caught.value)
    peer.send_raw(data)
    assert peer.receive()["error"] == str(caught.value)
    assert peer.call("ping")["status"] == "ok"


@pytest.mark.parametrize("more", [1, 3_000_000])
def test_a_request_that_is_too_long_is_answered(served: GrootGateway, more: int) -> None:
    most = max_request_bytes(CONTRACT)
    with GrootPeer(served.port) as good, GrootPeer(served.port) as bad:
        good.act()
        bad.send_raw(bytes(most + more))
        error = f"request: got {most + more} bytes, expected at most {most}"
        assert bad.receive() == {"error": error}
        assert bad.act()[0]["action"][0, 0, 0] == 1
        assert good.act()[0]["action"][0, 0, 0] == 2


def test_noise_on_the_port_is_survived(peer: GrootPeer, served: GrootGateway) -> None:
    for noise in (b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\xff" * 200):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(noise)
    assert peer.call("ping")["status"] == "ok"


def test_unreadable_modalities_name_the_key() -> None:
    with pytest.raises(ContractMismatch, match=r"video\.top"):
        GrootModalities(CONTRACT, ObservationKeys()).read({"video.top": 3}, 0)
