"""The websockets of openpi's gateway: large frames, fragments, and pings at any time."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame
from websockets.protocol import State
from websockets.sync.client import connect
from websockets.uri import parse_uri

from runtime.gateway.openpi import websocket_server
from runtime.gateway.openpi.gateway import OpenpiGateway
from runtime.gateway.openpi.payload_reader import LARGE_BYTES, PayloadProtocol
from runtime.wire_formats.msgpack_arrays import pack, unpack
from tests.gateway.openpi_serving import (
    StatelessPolicy,
    ask,
    connect_to,
    expected,
    gateway_to,
    sent,
)
from tests.runtime.serving import serving


@contextlib.contextmanager
def stateless() -> Iterator[OpenpiGateway]:
    with serving(StatelessPolicy()) as server, gateway_to(server) as gateway:
        yield gateway


@pytest.mark.parametrize("piece", [1000, LARGE_BYTES, 10**6])
@pytest.mark.parametrize("in_place", [True, False])
def test_payloads_are_those_that_were_sent(piece: int, in_place: bool) -> None:
    """Both where the bytes are written into the payload's memory and where they are given."""
    generator = np.random.default_rng(piece)
    sizes = (0, 125, LARGE_BYTES - 1, LARGE_BYTES, 200_000, 200_000, 3, 100_000)
    payloads = [generator.bytes(size) for size in sizes]
    client = ClientProtocol(parse_uri("ws://localhost/"), state=State.OPEN)
    for payload in payloads:
        client.send_binary(payload)
    stream = b"".join(client.data_to_send())
    server = PayloadProtocol(state=State.OPEN, max_size=200_000)
    events = []
    while stream:
        room = len(server.reader.missing) if in_place else 0
        part, stream = stream[: room or piece], stream[room or piece :]
        if room:
            server.reader.missing[: len(part)] = part
            server.reader.written(len(part))
        server.receive_data(b"" if room else part)
        events += server.events_received()
    assert [event.data for event in events if isinstance(event, Frame)] == payloads


def test_a_stream_that_ends_inside_a_large_payload_is_an_abnormal_end() -> None:
    client = ClientProtocol(parse_uri("ws://localhost/"), state=State.OPEN)
    client.send_binary(bytes(2 * LARGE_BYTES))
    server = PayloadProtocol(state=State.OPEN)
    server.receive_data(b"".join(client.data_to_send())[:-1])
    server.receive_eof()
    assert server.state is State.CLOSED and server.close_code == 1006


def test_an_observation_may_come_in_fragments() -> None:
    message = pack(sent(0.5, more=bytes(3 * LARGE_BYTES)))
    parts = [message[:10], message[10:100_000], b"", message[100_000:]]
    with stateless() as gateway, connect_to(gateway) as client:
        for timestep in range(2):
            client.send(iter(parts))
            reply = unpack(client.recv(5.0, decode=False))
            np.testing.assert_array_equal(reply["actions"], expected(0.5, timestep=timestep))


def test_pings_are_answered_while_a_request_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """openpi's client ends a connection whose pings are not answered for 20 s."""
    monkeypatch.setattr(websocket_server, "LOOK_EVERY_S", 0.02)
    policy = StatelessPolicy(gate := threading.Semaphore(0))
    with serving(policy) as server, gateway_to(server) as gateway, connect_to(gateway) as client:
        client.send(pack(sent()))
        assert policy.entered.acquire(timeout=5.0)
        answered = [client.ping() for _ in range(3)]
        assert all(one.wait(5.0) for one in answered)
        gate.release()
        np.testing.assert_array_equal(unpack(client.recv(5.0, decode=False))["actions"], expected())


def test_a_client_that_says_nothing_is_pinged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """So that a host that has vanished is noticed."""
    monkeypatch.setattr(websocket_server, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(websocket_server, "PING_EVERY_S", 0.05)
    caplog.set_level(logging.DEBUG, "websockets.client")
    with stateless() as gateway, connect_to(gateway) as client:
        with pytest.raises(TimeoutError):
            client.recv(0.5)
        assert any("PING" in one.getMessage() for one in caplog.records)
        assert isinstance(ask(client, sent()), dict)


def test_compression_is_not_accepted() -> None:
    with (
        stateless() as gateway,
        connect(f"ws://127.0.0.1:{gateway.port}", compression="deflate") as client,
    ):
        client.recv(5.0)
        assert not client.protocol.extensions
        assert isinstance(ask(client, sent()), dict)
