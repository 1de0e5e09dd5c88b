"""Clients of the ILStudio gateway that are slow, silent, die, or are too many."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from policies.types import ActionChunk, MetaObs
from runtime.gateway.client_log import BURST
from runtime.gateway.ilstudio import gateway as ilstudio_module
from runtime.gateway.ilstudio.gateway import IlstudioGateway
from runtime.gateway.ilstudio.observations import IlstudioObservations
from runtime.server import PolicyServer
from tests.gateway.gateways import ilstudio_gateway
from tests.gateway.ilstudio_messages import (
    LENGTH,
    RawClient,
    asked,
    dumps,
    meta_obs,
    names,
    wait_until,
)
from tests.runtime.serving import serving
from tests.runtime.toy_policy import CONTRACT, ToyPolicy


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


def test_a_slow_message_ends_its_connection_alone(
    gateway: IlstudioGateway,
    client: RawClient,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ilstudio_module, "SLOW_S", 0.3)
    with RawClient(gateway.port) as slow, RawClient(gateway.port) as idle:
        slow.socket.sendall(LENGTH.pack(100_000) + b"x")
        began_s = time.monotonic()
        assert asked(client.actions(meta_obs())) == [1]
        with pytest.raises((EOFError, ConnectionError)):
            while True:  # it goes on, a byte at a time
                slow.socket.sendall(b"x")
                slow.socket.settimeout(0.02)
                with contextlib.suppress(TimeoutError):
                    slow.receive()
        assert 0.2 < time.monotonic() - began_s < 3
        assert asked(idle.actions(meta_obs())) == [1]  # who asks for nothing is not slow
    assert "a message took it over 0.3 s" in caplog.text


def test_a_length_alone_takes_no_memory(gateway: IlstudioGateway, client: RawClient) -> None:
    def resident_kb() -> int:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * 4

    client.actions(meta_obs())
    before_kb = resident_kb()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            greedy = stack.enter_context(RawClient(gateway.port))
            greedy.socket.sendall(struct.pack(">I", 2**32 - 1))
            other = stack.enter_context(RawClient(gateway.port))
            other.socket.sendall(LENGTH.pack(1_000_000) + b"x")
        wait_until(lambda: len([c for c in gateway._listener.clients if c.is_alive()]) == 41)
        assert client.actions(meta_obs(t=1)).shape
        assert resident_kb() - before_kb < 15_000


def test_a_client_that_dies_leaves_nothing(
    server: PolicyServer, gateway: IlstudioGateway, client: RawClient
) -> None:
    client.actions(meta_obs())
    for cut in (b"", b"\0", LENGTH.pack(100) + b"x", LENGTH.pack(100) + dumps(meta_obs())[:99]):
        dying = RawClient(gateway.port)
        dying.actions(meta_obs(rows=2))
        dying.socket.sendall(cut)
        reset = struct.pack("ii", 1, 0)  # ends with a reset, not in order
        dying.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        dying.socket.close()
    wait_until(lambda: len(names(server)) == 1)
    assert asked(client.actions(meta_obs(t=1))) == [2]


def test_clients_beyond_the_limit_are_refused(
    server: PolicyServer, caplog: pytest.LogCaptureFixture
) -> None:
    with ilstudio_gateway(server.address, CONTRACT, max_clients=1) as gateway:
        with RawClient(gateway.port) as first:
            first.actions(meta_obs())
            second = RawClient(gateway.port)
            with second, pytest.raises((EOFError, ConnectionError)):
                second.ask(meta_obs())
        assert "refused, 1 clients are connected" in caplog.text
        wait_until(lambda: not any(each.is_alive() for each in gateway._listener.clients))
        with RawClient(gateway.port) as third:
            assert asked(third.actions(meta_obs())) == [1]


def test_a_silent_client_is_closed_until_it_gets_actions(
    gateway: IlstudioGateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ilstudio_module, "FIRST_S", 0.2)
    with contextlib.ExitStack() as stack:
        good, bad, silent = (stack.enter_context(RawClient(gateway.port)) for _ in range(3))
        assert asked(good.actions(meta_obs())) == [1]
        assert bad.ask(b"") == []
        for each in (bad, silent):
            with pytest.raises((EOFError, ConnectionError)):
                each.receive()
        assert asked(good.actions(meta_obs(t=1))) == [2]
    assert caplog.text.count("it asked for nothing within 0.2 s") == 2


def test_a_refused_message_leaves_no_memory(gateway: IlstudioGateway, client: RawClient) -> None:
    client.actions(meta_obs())
    (connection,) = gateway._listener.clients
    assert len(connection._messages._buffer) > 1000
    assert client.ask(bytes(500_000)) == []
    wait_until(lambda: len(connection._messages._buffer) == 0)
    assert asked(client.actions(meta_obs(t=1))) == [2]


def test_no_client_can_fill_the_log(server: PolicyServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, ilstudio_module.__name__)
    with (
        ilstudio_gateway(server.address, CONTRACT, max_clients=1) as gateway,
        RawClient(gateway.port) as client,
    ):
        for number in range(4 * BURST):
            assert client.ask(b"X\x04\0\0\0%04d." % number) == []
            with RawClient(gateway.port) as other, pytest.raises((EOFError, ConnectionError)):
                other.receive()
        assert asked(client.actions(meta_obs())) == [1]
    lines = [each for each in caplog.records if each.name == ilstudio_module.__name__]
    warnings = [each for each in lines if each.levelno == logging.WARNING]
    assert BURST <= len(warnings) < 1.5 * BURST and len(lines) < 2 * BURST


def test_a_client_without_a_thread_is_refused(
    gateway: IlstudioGateway,
    client: RawClient,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client.actions(meta_obs())

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(ilstudio_module._Client, "start", start)
        with RawClient(gateway.port) as other, pytest.raises((EOFError, ConnectionError)):
            other.receive()
    assert "refused: can't start new thread" in caplog.text
    with RawClient(gateway.port) as other:
        assert asked(other.actions(meta_obs())) == [1]


def test_an_observation_is_as_old_as_its_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    captured_ns: list[int] = []
    read_at_once = IlstudioObservations.read

    def read(reader: IlstudioObservations, message: memoryview) -> list[MetaObs]:
        time.sleep(0.3)
        return read_at_once(reader, message)

    class Noting(ToyPolicy):
        def infer(self, obs: MetaObs) -> ActionChunk:
            captured_ns.append(obs.t_capture_ns)
            return super().infer(obs)

        def fork(self) -> Noting:
            return self

    monkeypatch.setattr(IlstudioObservations, "read", read)
    with (
        serving(Noting()) as server,
        ilstudio_gateway(server.address, CONTRACT) as gateway,
        RawClient(gateway.port) as client,
    ):
        began_ns = time.monotonic_ns()
        client.actions(meta_obs())
    assert began_ns < captured_ns[-1] < began_ns + 250_000_000
