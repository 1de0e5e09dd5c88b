"""LeRobot's protocol: raw clients of the gateway, and a server in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from policies.errors import ContractMismatch
from policies.types import MetaObs
from policies.yaml_config import InvalidConfig
from runtime.gateway.config import GatewayCommand
from runtime.gateway.lerobot import gateway as lerobot_module
from runtime.gateway.lerobot import messages as lerobot_messages
from runtime.gateway.lerobot import peer
from runtime.gateway.lerobot.gateway import LerobotGateway
from runtime.gateway.lerobot.messages import read_instructions, read_observation, write_actions
from runtime.gateway.lerobot.protobuf_fields import MAX_FIELDS, read_fields, write_bytes
from runtime.gateway.restricted_pickle import MAX_INSTRUCTIONS
from runtime.options.observation_keys import ImageSource, ObservationKeys, StateSource
from runtime.server import PolicyServer
from tests.gateway.lerobot_client import LerobotClient
from tests.gateway.lerobot_gateway import gateway_of
from tests.gateway.lerobot_pickles import (
    BEGIN,
    END,
    HELPERS,
    MIDDLE,
    MOTORS,
    RemotePolicyConfig,
    TimedObservation,
    dumps,
    features,
    instructions,
    message,
    observation,
    read_actions,
    values,
)
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import CHUNK, CONTRACT, ToyPolicy

Status = grpc.StatusCode


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot_module, "WAIT_S", 0.2)
    monkeypatch.setattr(lerobot_module, "SWEEP_S", 0.05)


@pytest.fixture
def server() -> Iterator[PolicyServer]:
    with serving(ToyPolicy()) as server:
        yield server


@pytest.fixture
def gateway(server: PolicyServer) -> Iterator[LerobotGateway]:
    with gateway_of(server) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: LerobotGateway) -> Iterator[LerobotClient]:
    with LerobotClient(gateway.port) as client:
        yield client


def refused(code: Any, text: str, call: Callable[[], object]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    assert error.code() is code and text in error.details(), (error.code(), error.details())


def meta_obs(state: float, shade: int = 100) -> MetaObs:
    return MetaObs(
        {"top": np.full((24, 32, 3), shade, np.uint8)},
        (state + np.arange(14) / 64).astype(np.float32),
        t_capture_ns=1,
    )


# Calls


def test_actions_are_those_of_our_own_client(server: PolicyServer, client: LerobotClient) -> None:
    client.start()
    with connect(server) as ours:
        for i in range(5):
            client.send(observation(float(i), timestep=i, shade=i, task="stack"))
            got, expected = client.act(), ours.infer(meta_obs(float(i), i)).actions
            np.testing.assert_array_equal(np.stack([a.action for a in got]), expected)
            assert [a.timestep for a in got] == list(range(i, i + CHUNK))
            assert [a.timestamp for a in got] == pytest.approx(
                [1000.5 + k * 0.02 for k in range(CHUNK)]
            )


def test_actions_per_chunk_truncates(client: LerobotClient) -> None:
    client.start(actions_per_chunk=3)
    client.send(observation())
    assert len(client.act()) == 3


def test_ready_starts_an_episode_and_forgets_the_instructions(client: LerobotClient) -> None:
    client.start()
    for asked in (1, 2):
        client.send(observation())
        assert client.act()[0].action[0] == asked
    client.send(observation())
    client.ready()
    refused(Status.FAILED_PRECONDITION, "expected Ready", lambda: client.send(observation()))
    client.instruct(instructions())
    assert not client.act(), "an observation of the last episode"
    client.send(observation())
    assert client.act()[0].action[0] == 1


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_python_3(protocol: int) -> None:
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    sent = {"top": picture, "turned": picture.transpose(1, 0, 2), "a": np.float32(0.5), "task": "é"}
    if protocol == 2:  # which has no bytes
        sent = {"a": 0.5}
    read = read_observation(dumps(TimedObservation(1.5, 3, sent), protocol))
    assert (read.timestamp, read.timestep, list(read.values)) == (1.5, 3, list(sent))
    for key, value in sent.items():
        np.testing.assert_array_equal(read.values[key], value)


def test_a_reply_is_exact_at_its_limits() -> None:
    numbers = np.array([[np.nan, np.inf], [-0.0, np.float32(0.1)]], np.float32)
    read = read_actions(write_actions(numbers, 2**62, 1e9, 0.5))
    assert np.stack([a.action for a in read]).tobytes() == numbers.tobytes()
    assert [(a.timestep, a.timestamp) for a in read] == [(2**62, 1e9), (2**62 + 1, 1e9 + 0.5)]
    assert read_actions(write_actions(numbers[:0], 0, 0, 1)) == []


# Freshness


def test_newest_observation_wins(client: LerobotClient) -> None:
    client.start()
    for i in range(4):
        client.send(observation(timestep=i))
    (first, *_) = client.act()
    assert first.timestep == 3 and first.action[0] == 1, "older observations were inferred"
    assert client.act() == []


def test_get_actions_waits_for_an_observation(
    client: LerobotClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.start()
    started_s = time.monotonic()
    assert client.act() == []
    assert 0.19 < time.monotonic() - started_s < 2
    monkeypatch.setattr(lerobot_module, "WAIT_S", 10.0)
    pending = client.get_actions.future(b"", timeout=10)
    client.send(observation(timestep=7))
    assert pending.result()


def test_waiting_clients_hold_no_thread(
    gateway: LerobotGateway, client: LerobotClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads() -> list[str]:
        return sorted(t.name for t in threading.enumerate() if t.name.startswith("lerobot"))

    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(LerobotClient(gateway.port)) for _ in range(3)]
        for one in (client, *others):
            one.start()
        before = threads()
        monkeypatch.setattr(lerobot_module, "WAIT_S", 10.0)
        pending = [one.get_actions.future(b"", timeout=20) for one in others for _ in range(3)]
        client.send(observation())
        assert len(client.act()) == CHUNK
        assert threads() == before and len(before) == 4
        assert not any(call.done() for call in pending)


# Instructions


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"policy_type": "act"}, "policy_type: got 'act', expected 'toy'"),
        (
            {"lerobot_features": features(MOTORS[:6])},
            "observation.state: got 6 motors ['motor_0.pos', 'motor_1.pos'",
        ),
        (
            {"lerobot_features": features(cameras=())},
            "images.top: got cameras [], expected the policy's",
        ),
        (
            {"lerobot_features": features(hw=(480, 640))},
            "images.top: got shape (480, 640, 3), expected (24, 32, 3)",
        ),
        ({"lerobot_features": features(cameras=("top", "wrist"))}, "images.wrist: got a camera"),
        ({"lerobot_features": {}}, "images.top: got cameras []"),
        ({"lerobot_features": None}, "lerobot_features: got NoneType, expected a dict"),
        ({"lerobot_features": features(["a"] * 14)}, "names: got other values, expected different"),
        ({"actions_per_chunk": 0}, "actions_per_chunk: got 0, expected at least 1"),
    ],
)
def test_instructions_that_do_not_fit(
    client: LerobotClient, changes: dict[str, Any], text: str
) -> None:
    client.ready()
    refused(Status.FAILED_PRECONDITION, text, lambda: client.instruct(instructions(**changes)))
    client.instruct(instructions())


def test_calls_out_of_order(client: LerobotClient) -> None:
    refused(Status.FAILED_PRECONDITION, "got no Ready", lambda: client.instruct(instructions()))
    started_s = time.monotonic()
    refused(Status.FAILED_PRECONDITION, "expected Ready", client.act)
    assert time.monotonic() - started_s > 0.19, "its client asks again at once"
    refused(Status.FAILED_PRECONDITION, "expected Ready", lambda: client.send(observation()))


def test_motors_in_another_order_than_the_policys_are_refused() -> None:
    """LeRobot's client gives an action's numbers to its motors in their order."""
    names = tuple(name[:-4] for name in MOTORS)
    contract = dataclasses.replace(CONTRACT, state_names=names)
    sent = read_instructions(instructions(lerobot_features=features(MOTORS)))
    read = peer.observation_map(sent, contract, ObservationKeys()).read(values())
    np.testing.assert_array_equal(read.state, np.arange(14, dtype=np.float32) / 64)
    other = read_instructions(instructions(lerobot_features=features(reversed(MOTORS))))
    for named in ({"state_names": names}, {"action_names": names}):
        contract = dataclasses.replace(CONTRACT, **named)
        with pytest.raises(ContractMismatch, match=r"names: got .*motor_13.*, in this order"):
            peer.observation_map(other, contract, ObservationKeys())
    keys = ObservationKeys(state=tuple(StateSource(name) for name in MOTORS))
    with pytest.raises(ContractMismatch, match=r"names: got .*motor_13.*the order of the map"):
        peer.observation_map(other, CONTRACT, keys)


def test_a_robot_with_more_motors_than_actions_is_refused_with_a_map_too() -> None:
    sent = read_instructions(instructions(lerobot_features=features((*MOTORS, "lift.pos"))))
    keys = ObservationKeys(state=tuple(StateSource(name) for name in MOTORS))
    with pytest.raises(ContractMismatch, match=r"got 15 motors .*expected 14, as actions"):
        peer.observation_map(sent, CONTRACT, keys)


def test_the_users_map_and_the_clients_own() -> None:
    given = features(cameras=("front",))
    keys = ObservationKeys(
        {"top": ImageSource("front")}, tuple(StateSource(name) for name in MOTORS)
    )
    observed = {("front" if key == "top" else key): value for key, value in values().items()}
    sent = read_instructions(instructions(lerobot_features=given))
    read = peer.observation_map(sent, CONTRACT, keys).read(observed)
    np.testing.assert_array_equal(read.state, np.arange(14, dtype=np.float32) / 64)
    renamed = {"observation.images.front": "observation.images.top"}
    sent = read_instructions(instructions(lerobot_features=given, rename_map=renamed))
    read = peer.observation_map(sent, CONTRACT, ObservationKeys()).read(observed)
    assert read.images["top"].shape == (24, 32, 3)


def test_the_first_action_is_where_the_policy_says() -> None:
    contract = dataclasses.replace(CONTRACT, first_action_offset=2)

    class Later(ToyPolicy):
        def __init__(self) -> None:
            super().__init__()
            self.contract = contract

        def infer(self, obs: MetaObs) -> Any:
            return dataclasses.replace(super().infer(obs), first_action_offset=2)

        def fork(self) -> Later:
            return Later()

    with (
        serving(Later()) as server,
        gateway_of(server, contract=contract) as gateway,
        LerobotClient(gateway.port) as client,
    ):
        client.start()
        client.send(observation(timestep=5))
        first = client.act()[0]
        assert first.timestep == 7 and first.timestamp == pytest.approx(1000.54)


# Observations that do not fit


def changed(**changes: Any) -> bytes:
    return dumps(TimedObservation(1.0, 0, {**values(), **changes}))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (dumps(TimedObservation(1.0, 0, {"task": ""})), "images.top: got keys ['task']"),
        (
            changed(top=np.zeros((48, 64, 3), np.uint8)),
            "images.top: got shape (48, 64, 3), expected (24, 32, 3)",
        ),
        (changed(top=np.zeros((24, 32, 3))), "images.top: got dtype float64"),
        (changed(task=3), "task: got float, expected text"),
        (changed(**{MOTORS[3]: "x"}), "state (motor_3.pos): got 'x', expected numbers"),
        (changed(**{MOTORS[3]: [0.5]}), "motor_3.pos: got list, expected a number, an array"),
        (changed(**{MOTORS[3]: float("nan")}), "state: got NaN"),
        (changed(**{MOTORS[3]: np.zeros(2, np.float32)}), "3.pos): got 2 numbers, expected 1"),
        (dumps(TimedObservation(1.0, -1, {})), "timestep: got -1"),
        (dumps(TimedObservation(1.0, True, {})), "timestep: got bool"),
        (dumps(TimedObservation("1", 0, {})), "timestamp: got str"),
        (dumps(TimedObservation(1.0, 0, [])), "observation: got list"),
        (dumps([1]), "observation: got list, expected TimedObservation"),
        (instructions(), "observation: got RemotePolicyConfig, expected TimedObservation"),
        (dumps({"a": changed}.keys.__name__), "observation: got str"),
        (b"", "it ends too early"),
    ],
)
def test_observations_that_do_not_fit(client: LerobotClient, content: bytes, text: str) -> None:
    client.start()
    client.send(content)
    refused(Status.INVALID_ARGUMENT, text, client.act)
    client.send(observation())
    assert len(client.act()) == CHUNK


def test_an_error_of_the_policy_is_the_calls(client: LerobotClient) -> None:
    client.start()
    client.send(changed(**{MOTORS[0]: 666.0}))
    refused(Status.INTERNAL, "a bug in the policy", client.act)


# Streams


def test_parts_are_joined(client: LerobotClient) -> None:
    client.start()
    whole = observation(timestep=4)
    parts = [whole[:100], whole[100:200], whole[200:300], whole[300:]]
    states = [BEGIN, MIDDLE, MIDDLE, END]
    client.send_parts(message(part, state) for part, state in zip(parts, states, strict=True))
    assert client.act()[0].timestep == 4


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([], "got the end of the stream"),
        ([message(b"a", BEGIN)], "got the end of the stream, expected a part with END"),
        ([message(b"a", MIDDLE)], "transfer_state: got 2, expected one of (1, 3)"),
        ([message(b"a", BEGIN)] * 2, "transfer_state: got 1, expected one of (2, 3)"),
        ([message(b"a", 7)], "transfer_state: got 7"),
        ([b"\x12\x01a"], "transfer_state: got 0"),
        ([message(b"a")], "transfer_state: got bytes"),
        ([b"\x08"], "got a number without an end in 0 bytes, expected one within 10"),
        ([b"\x0b"], "got wire type 3"),
        ([b"\x08\x03\x10\x01"], "field 2: got a number"),
        ([b"\x08\x03" * 2_000_000], f"got 3999872 bytes after {MAX_FIELDS} fields"),
        ([b"\x08\x03\x12\xff\xff\xff\xff\x0f"], "field 2: got 0 bytes, expected 4294967295"),
        ([message(bytes(300_000), BEGIN)], "expected the policy's cameras"),
        (
            [message(bytes(200_000), BEGIN), message(bytes(200_000), MIDDLE)],
            "got more than 264448 bytes",
        ),
    ],
)
def test_streams_that_are_refused(client: LerobotClient, parts: list[bytes], text: str) -> None:
    client.start()
    refused(Status.INVALID_ARGUMENT, text, lambda: client.send_parts(parts))
    client.send(observation())
    assert len(client.act()) == CHUNK


def test_an_endless_stream_is_cut(client: LerobotClient) -> None:
    client.start()

    def endless() -> Iterator[bytes]:
        yield message(b"", BEGIN)
        while True:
            yield message(bytes(10_000), MIDDLE)

    refused(Status.INVALID_ARGUMENT, "got more than", lambda: client.send_parts(endless()))


def test_parts_without_data_are_not_endless(
    client: LerobotClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_messages, "MAX_PARTS", 20)
    client.start()
    parts = [message(b"", BEGIN), *[message(b"", MIDDLE)] * 18, message(observation(), END)]
    client.send_parts(parts)
    assert len(client.act()) == CHUNK
    parts.insert(1, message(b"", MIDDLE))
    text = "got 21 parts, expected at most 20"
    refused(Status.INVALID_ARGUMENT, text, lambda: client.send_parts(parts))


def test_a_stream_that_stalls_is_given_up(
    client: LerobotClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_module, "RECEIVE_S", 0.2)
    client.start()
    over = threading.Event()

    def stalling() -> Iterator[bytes]:
        yield message(b"a", BEGIN)
        over.wait(10)

    second = threading.Timer(0.1, lambda: refused(Status.RESOURCE_EXHAUSTED, "a second", send))

    def send() -> None:
        client.send(observation())

    second.start()
    refused(Status.ABORTED, "got no END within 0.2 s", lambda: client.send_parts(stalling()))
    over.set()
    second.join()
    send()
    assert len(client.act()) == CHUNK


def test_a_message_too_large_is_refused_by_size(client: LerobotClient) -> None:
    client.ready()
    refused(Status.RESOURCE_EXHAUSTED, "larger than max", lambda: client.instruct(bytes(5 * 2**20)))
    refused(
        Status.INVALID_ARGUMENT, "instructions: got 30", lambda: client.instruct(bytes(300_000))
    )


def test_a_slow_message_of_any_call_is_given_up(
    gateway: LerobotGateway, client: LerobotClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_module, "RECEIVE_S", 0.2)
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(10)
        yield from ()

    with LerobotClient(gateway.port) as slow:
        service = "/transport.AsyncInference/"
        ready, instruct, act = (
            slow.channel.stream_unary(service + name)
            for name in ("Ready", "SendPolicyInstructions", "GetActions")
        )
        text = "FAILED_PRECONDITION"
        assert text in f"{instruct.future(nothing(), timeout=5).exception()}"
        assert text in f"{act.future(nothing(), timeout=5).exception()}"
        assert ready(nothing(), timeout=5) == b""
        pending = instruct.future(nothing(), timeout=5)
        client.start()
        client.send(observation())
        assert len(client.act()) == CHUNK
        refused(Status.ABORTED, "instructions: got no message within 0.2 s", pending.result)
        over.set()


def test_a_small_message_that_becomes_large_is_refused(gateway: LerobotGateway) -> None:
    with LerobotClient(gateway.port) as client:
        client.start()
        observe = client.channel.stream_unary("/transport.AsyncInference/SendObservations")
        bomb = iter([bytes(60 * 2**20)])
        call = observe.future(bomb, timeout=10, compression=grpc.Compression.Gzip)
        refused(Status.RESOURCE_EXHAUSTED, "larger than max", call.result)
        client.send(observation())
        assert len(client.act()) == CHUNK


def test_connections_without_a_session_are_few(
    server: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_module, "SPARE_CONNECTIONS", 3)
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(gateway_of(server, max_clients=1))
        client = stack.enter_context(LerobotClient(gateway.port))
        client.start()
        address = ("127.0.0.1", gateway.port)
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(50)]
        wait_until(lambda: sum(map(is_open, silent)) == 4)  # and the client's
        client.send(observation())
        assert len(client.act()) == CHUNK


def test_silent_connections_are_closed(
    server: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_module, "RECEIVE_S", 0.3)
    with gateway_of(server) as gateway, LerobotClient(gateway.port) as client:
        client.start()
        with socket.create_connection(("127.0.0.1", gateway.port)) as silent:
            wait_until(lambda: not is_open(silent))
        client.send(observation())
        assert len(client.act()) == CHUNK


def test_a_connection_without_calls_is_closed(
    server: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_module, "IDLE_S", 0.3)
    monkeypatch.setattr(lerobot_module, "WAIT_S", 30.0)
    with gateway_of(server) as gateway, LerobotClient(gateway.port) as client:
        client.start()
        pending = client.get_actions.future(b"", timeout=20)
        with LerobotClient(gateway.port) as idle:
            idle.start()
            assert len(gateway._peers) == 2
            wait_until(lambda: len(gateway._peers) == 1)
        client.send(observation())
        assert pending.result()


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(4096))
    except BlockingIOError:
        return True
    except OSError:
        return False


# Hostile pickles


def tuples(depth: int, name: bytes = b"") -> bytes:
    """A tuple of 2**depth Nones, in which every level is one tuple twice."""
    return b"N" + b"2\x86".replace(b"2", b"q\x00h\x00") * depth + name


def called(module: str, name: str, arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + arguments + b"R"


FEATURE_TYPES = "lerobot.configs.types"
NUMPY_DTYPE = called("numpy", "dtype", b"X\x02\0\0\0u1\x85")
HOSTILE = {
    "os.system": (pickle.dumps(os.system), "it asks for posix.system"),
    "a call of it": (b"cos\nsystem\nX\x04\0\0\0true\x85R.", "it asks for os.system"),
    "INST": (b"(X\x04\0\0\0trueios\nsystem\n.", "the instruction b'i'"),
    "OBJ": (b"(cos\nsystem\nX\x04\0\0\0trueo.", "it asks for os.system"),
    "OBJ of a dict": (b"(ccollections\nOrderedDict\no.", "the instruction b'o'"),
    "NEWOBJ_EX": (b"ccollections\nOrderedDict\n)}\x92.", r"the instruction b'\x92'"),
    "NEWOBJ of a function": (b"ccollections\nOrderedDict\n)\x81.", "makes a AllowedFunction"),
    "a call of a class": (f"c{HELPERS}\nTimedObservation\n)R.".encode(), "calls a RecordClass"),
    "a persistent id": (b"Pabc\n.", "the instruction b'P'"),
    "an extension": (b"\x82\x01.", r"the instruction b'\x82'"),
    "getattr": (b"cbuiltins\ngetattr\n.", "it asks for builtins.getattr"),
    "a dotted name": (
        f"c{HELPERS}\nTimedObservation.__init__\n.".encode(),
        "TimedObservation.__init__",
    ),
    "another name of LeRobot": (f"c{HELPERS}\nget_logger\n.".encode(), "helpers.get_logger"),
    "a call of data": (b"X\x01\0\0\0a)R.", "it calls a str"),
    "a change of a function": (b"cnumpy\ndtype\n}b.", "it changes a AllowedFunction"),
    "a change of a list": (b"]}b.", "it changes a list"),
    "an object dtype": (called("numpy", "dtype", b"X\x02\0\0\0O8\x85") + b".", "the dtype 'O8'"),
    "a tuple for a key": (b"}" + tuples(60) + b"Ns.", "a tuple for a key"),
    "a tuple for a key of an ordered dict": (
        called("collections", "OrderedDict", b"]" + tuples(60) + b"N\x86a\x85") + b".",
        "it is damaged",
    ),
    "a key of a member": (
        b"}" + called(FEATURE_TYPES, "FeatureType", tuples(60) + b"\x85") + b"Ns.",
        "a tuple for a key",
    ),
    "a tuple for a dtype": (
        called("numpy", "dtype", tuples(60) + b"\x85") + b".",
        "it has the dtype",
    ),
    "a tuple for axes": (
        called(
            "numpy.core.numeric",
            "_frombuffer",
            b"(C\x01a"
            + NUMPY_DTYPE
            + b"K\x01\x85X\x01\0\0\0K"
            + tuples(60)
            + tuples(60)
            + b"\x86t",
        )
        + b".",
        "axes are no permutation",
    ),
    "a gigabyte of bytes": (b"B" + struct.pack("<I", 2**30) + b"a.", "ends too early"),
    "an exabyte of text": (b"\x8d" + struct.pack("<Q", 2**60) + b"a.", "ends too early"),
    "a frame of an exabyte": (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.", "NoneType"),
    "a gigabyte of array": (
        called(
            "numpy.core.numeric",
            "_frombuffer",
            b"(C\x01a" + NUMPY_DTYPE + b"J\0\0\0\x40\x85X\x01\0\0\0Ct",
        )
        + b".",
        "in 1 bytes",
    ),
    "a large memo": (b"Nr\xff\xff\xff\xff0" * 3 + b"N.", "NoneType"),
    "an empty memo": (b"h\x07.", "no memo 7"),
    "deep lists": (b"]" * 5000 + b"a" * 4999 + b".", "or 32 levels"),
    "many instructions": (
        b"N0" * 100_000 + b".",
        f"more than {MAX_INSTRUCTIONS} instructions",
    ),
    "many values": (b"N" * 100_000 + b".", f"more than {MAX_INSTRUCTIONS} instructions"),
    "a long number": (b"\x8a\xff" + bytes(255) + b".", "a number of 2040 bits"),
    "a longer number": (b"\x8b" + struct.pack("<I", 2**30) + b".", r"the instruction b'\x8b'"),
    "a number in digits": (b"I" + b"9" * 1000 + b"\n.", "the instruction b'I'"),
    "an empty stack": (b".", "goes on after its end"),
    "no mark": (b"t.", "no mark"),
    "below a mark": (b"N(\x85.", "more values than it has"),
    "text that is none": (b"X\x01\0\0\0\xff.", "it is damaged"),
    "bytes after its end": (b"N..", "goes on after its end"),
    "one picture, many arrays": (
        b"B"
        + struct.pack("<I", 60_000)
        + bytes(60_000)
        + b"q\x01"
        + called("numpy", "dtype", b"X\x02\0\0\0b1\x85")
        + b"q\x02"
        + called(
            "numpy.core.numeric",
            "_frombuffer",
            b"(h\x01h\x02J\x60\xea\0\0\x85X\x01\0\0\0Ct",
        )
        * 10
        + b".",
        "many arrays of the same bytes",
    ),
    "an array without content": (
        called("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\nK\0\x85C\x01b\x87")
        + b".",
        "without content",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(name: str) -> None:
    content, text = HOSTILE[name]
    started_s = time.monotonic()
    for read in (read_observation, read_instructions):
        with pytest.raises(ContractMismatch) as caught:
            read(content)
        assert text in f"{caught.value}" and len(f"{caught.value}") < 400
    assert time.monotonic() - started_s < 1


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def test_harm_within_valid_messages(
    client: LerobotClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    client.ready()
    harmful = instructions(lerobot_features={"observation.state": Harm()})
    refused(Status.FAILED_PRECONDITION, "asks for posix.mkdir", lambda: client.instruct(harmful))
    client.instruct(instructions())
    client.send(changed(extra=Harm()))
    refused(Status.INVALID_ARGUMENT, "asks for posix.mkdir", client.act)
    assert not list(tmp_path.iterdir())


def test_values_that_contain_each_other() -> None:
    loop: list[Any] = []
    loop.append(loop)
    bomb: list[Any] = []
    for _ in range(200):
        bomb = [bomb] * 20
    for value in (loop, bomb):
        with pytest.raises(ContractMismatch, match="over 20000 values, or 32 levels"):
            read_observation(changed(extra=value))
        for part in ("names", "shape"):
            entry = {"names": [], "shape": (), part: value}
            with pytest.raises(ContractMismatch, match="over 20000 values, or 32 levels"):
                read_instructions(
                    instructions(
                        lerobot_features={"observation.state": entry, "observation.images.a": entry}
                    )
                )
    with pytest.raises(ContractMismatch, match="300 entries, expected at most 256"):
        read_observation(dumps(TimedObservation(1.0, 0, dict.fromkeys(map(str, range(300)), 0.0))))


def test_features_as_lerobots_own_class() -> None:
    shape = b"J\x18\0\0\0J\x20\0\0\0J\x03\0\0\0\x87"
    kind = called(FEATURE_TYPES, "FeatureType", b"X\x06\0\0\0VISUAL\x85")
    made = f"c{FEATURE_TYPES}\nPolicyFeature\n".encode() + b")\x81}(X\x04\0\0\0type" + kind
    made += b"X\x05\0\0\0shape" + shape + b"ub"
    config = dumps(RemotePolicyConfig("toy", "x", {"observation.images.top": 77}, 5))
    read = read_instructions(config.replace(b"KM", made))
    assert read.cameras == {"top": (24, 32, 3)}


# Clients and servers that come and go


def test_two_clients_have_a_session_each(server: PolicyServer, gateway: LerobotGateway) -> None:
    with LerobotClient(gateway.port) as one, LerobotClient(gateway.port) as two:
        one.start()
        two.start(actions_per_chunk=2)
        one.send(observation(1.0))
        assert one.act()[1].action[1] == pytest.approx(1 + 1 / 64 + 1 + 0.1)
        two.send(observation(2.0))
        assert two.act()[0].action[0] == 1, "the clients share an episode"
        one.send(observation())
        two.send(observation())
        assert (one.act()[0].action[0], len(two.act())) == (2, 2)


def wait_until(condition: Callable[[], bool]) -> None:
    limit_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < limit_s
        time.sleep(0.01)


def test_a_dead_clients_session_ends(gateway: LerobotGateway) -> None:
    with LerobotClient(gateway.port) as other:
        other.start()
        client = LerobotClient(gateway.port)
        client.start()
        client.send(observation())
        client.act()
        pending = client.get_actions.future(b"")
        assert len(gateway._peers) == 2
        time.sleep(0.05)
        client.close()
        assert pending.cancelled() or pending.exception()
        wait_until(lambda: len(gateway._peers) == 1)
        other.send(observation())
        assert len(other.act()) == CHUNK


def test_a_sweep_without_a_descriptor_is_no_end(
    gateway: LerobotGateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listdir(_: str) -> list[str]:
        raise OSError(errno.EMFILE, "Too many open files")

    with LerobotClient(gateway.port) as client:
        client.start()
        with monkeypatch.context() as patch:
            patch.setattr(lerobot_module.os, "listdir", listdir)
            wait_until(lambda: "not looked for: [Errno 24]" in caplog.text)
        client.send(observation())
        assert len(client.act()) == CHUNK
    wait_until(lambda: not gateway._peers)


def test_a_client_that_dies_during_inference() -> None:
    gate = threading.Semaphore(0)
    policy = ToyPolicy(gate)
    with serving(policy) as server, gateway_of(server) as gateway:
        try:
            with LerobotClient(gateway.port) as client:
                client.start()
                client.send(observation())
                pending = client.get_actions.future(b"")
                assert policy.entered.acquire(timeout=5)
            assert pending.code() is Status.CANCELLED
            wait_until(lambda: not gateway._peers)
        finally:
            gate.release(1000)
        with LerobotClient(gateway.port) as client:
            client.start()
            client.send(observation())
            assert client.act()[0].action[0] == 1


def test_a_silent_client_stays(client: LerobotClient, gateway: LerobotGateway) -> None:
    client.start()
    time.sleep(0.3)
    client.send(observation())
    assert len(gateway._peers) == 1 and len(client.act()) == CHUNK


BUSY = """
import sys, threading
from tests.gateway.lerobot_client import LerobotClient
from tests.gateway.lerobot_pickles import observation

def act():
    while True:
        client.act()

client = LerobotClient(int(sys.argv[1]))
client.start()
threading.Thread(target=act, daemon=True).start()
for i in range(10**9):
    client.send(observation(timestep=i))
    if i == 10:
        print(flush=True)
"""


def test_a_busy_client_is_killed(gateway: LerobotGateway) -> None:
    """Its last reply may be written before its end is noticed: no call breaks off."""
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, str(gateway.port)], cwd=root, stdout=subprocess.PIPE
    ) as busy:
        assert busy.stdout is not None and busy.stdout.readline()
        assert len(gateway._peers) == 1
        busy.kill()
    wait_until(lambda: not gateway._peers)
    wait_until(lambda: not any("lerobot ipv4" in t.name for t in threading.enumerate()))


def test_too_many_clients(server: PolicyServer) -> None:
    with gateway_of(server, max_clients=1) as gateway, LerobotClient(gateway.port) as client:
        client.start()
        with LerobotClient(gateway.port) as another:
            refused(Status.RESOURCE_EXHAUSTED, "clients: got 2, expected at most 1", another.ready)
        client.ready()


def test_the_server_dies_and_returns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.ExitStack() as stack:
        first = contextlib.ExitStack()
        server = first.enter_context(serving(ToyPolicy()))
        gateway = stack.enter_context(gateway_of(server))
        client = stack.enter_context(LerobotClient(gateway.port))
        client.start()
        client.send(observation())
        assert client.act()
        monkeypatch.setattr("runtime.gateway.gateway_session.RECONNECT_S", 0.3)
        first.close()
        for _ in range(2):
            client.send(observation())
            refused(Status.ABORTED, "", client.act)
        stack.enter_context(serving(ToyPolicy(), port=server.port))
        monkeypatch.setattr("runtime.gateway.gateway_session.RECONNECT_S", 5.0)
        client.send(observation())
        assert client.act()[0].action[0] == 1
    lines = [each.getMessage() for each in caplog.records if each.name == lerobot_module.__name__]
    lost, back = (line for line in lines if "ipv4" in line and "stopped" not in line)
    assert "ABORTED: " in lost
    assert "requests succeed again (after 1 more errors like the last one)" in back


def test_a_call_after_its_sessions_end(gateway: LerobotGateway, client: LerobotClient) -> None:
    client.start()
    (peer,) = gateway._peers.values()
    gateway._loop.call_soon_threadsafe(peer.end)
    wait_until(lambda: peer.ended)
    refused(Status.ABORTED, "session: got a call after its end", client.ready)


def test_a_bug_of_the_gateway_is_the_calls_and_is_logged(
    client: LerobotClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.start()
    client.send(observation())
    with monkeypatch.context() as patch:
        patch.setattr(peer, "read_observation", lambda _: 1 / 0)
        refused(Status.UNKNOWN, "the gateway failed: ZeroDivisionError", client.act)
    assert "Traceback" in caplog.text
    client.send(observation())
    assert len(client.act()) == CHUNK


def test_an_observation_is_as_old_as_its_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    captured_ns: list[int] = []
    slow_read = peer.read_observation

    def read(content: bytes) -> lerobot_messages.TimedObservation:
        time.sleep(0.3)
        return slow_read(content)

    class Noting(ToyPolicy):
        def infer(self, obs: MetaObs) -> Any:
            captured_ns.append(obs.t_capture_ns)
            return super().infer(obs)

        def fork(self) -> Noting:
            return self

    monkeypatch.setattr(peer, "read_observation", read)
    with (
        serving(Noting()) as server,
        gateway_of(server) as gateway,
        LerobotClient(gateway.port) as client,
    ):
        client.start()
        began_ns = time.monotonic_ns()
        client.send(observation())
        arrived_ns = time.monotonic_ns()
        client.act()
    assert began_ns < captured_ns[-1] < arrived_ns


def test_no_server_at_ready(server: PolicyServer, gateway: LerobotGateway) -> None:
    command = gateway._command
    gone = dataclasses.replace(
        command, server="127.0.0.1:9", sessions=dataclasses.replace(command.sessions, timeout_s=0.2)
    )
    gateway._command = gone
    with LerobotClient(gateway.port) as client:
        refused(Status.ABORTED, "127.0.0.1:9", client.ready)
        assert not gateway._peers
        gateway._command = command
        client.start()


# The gateway


def test_stop_ends_waiting_calls_and_frees_the_address(
    server: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_module, "WAIT_S", 30.0)
    with gateway_of(server) as gateway, LerobotClient(gateway.port) as client:
        client.start()
        pending = client.get_actions.future(b"")
        time.sleep(0.05)
        gateway.stop()
        error: Any = pending.exception(timeout=5)
        assert error.code() in (Status.UNAVAILABLE, Status.CANCELLED)
    gateway.stop()
    gateway.close()
    command = dataclasses.replace(gateway._command, port=gateway.port)
    again = LerobotGateway(command, ObservationKeys(), None, CONTRACT)
    assert again.port == gateway.port
    again.close()


def test_an_address_in_use(server: PolicyServer, gateway: LerobotGateway) -> None:
    command = dataclasses.replace(gateway._command, port=gateway.port)
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{gateway.port}"):
        LerobotGateway(command, ObservationKeys(), None, CONTRACT)


def test_a_map_and_keys_are_checked_at_start() -> None:
    command = GatewayCommand("lerobot", port=0)
    with pytest.raises(InvalidConfig, match="got 'wrist', expected cameras"):
        LerobotGateway(command, ObservationKeys({"wrist": ImageSource("x")}), None, CONTRACT)
    keys: Any = object()
    with pytest.raises(InvalidConfig, match="api_keys"):
        LerobotGateway(command, ObservationKeys(), keys, CONTRACT)


def test_protobuf_fields() -> None:
    assert read_fields(write_bytes(2, b"x" * 300)) == {2: b"x" * 300}
    assert read_fields(b"\x0d1234\x1112345678\x10\xac\x02") == {2: 300}
    assert read_fields(message(b"ab", 3)) == {1: 3, 2: b"ab"} and write_bytes(1, b"") == b""
