"""kill -9 of openpi's client, of its gateway and of the server, in mid-request, many times."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from runtime.server import PolicyServer
from runtime.server.server_process import ServerProcess
from runtime.wire_formats.msgpack_arrays import pack, unpack
from tests.gateway.openpi_serving import (
    SlowStatelessPolicy,
    ask,
    connect_to,
    expected,
    gateway_to,
    sent,
)
from tests.runtime.serving import serving
from transport.child_process import ChildProcess

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

DEATHS = 20
IN_REQUEST_S = 0.05
BACK_WITHIN_S = 2.0
DYING_CLIENT = """
import os, signal, sys, time
from websockets.sync.client import connect
with connect(sys.argv[1], compression=None) as client:
    client.recv()
    client.send(bytes.fromhex(sys.stdin.read()))
    time.sleep(float(sys.argv[2]))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def gateway_process(server: str, port: int = 0) -> ChildProcess:
    return ChildProcess(
        "runtime.gateway",
        ["openpi", "--server", server, "--port", str(port), "--timeout_s", "5"],
        name="the gateway",
        events_flag="--ready_fd",
    )


@contextlib.contextmanager
def client_of(address: str) -> Iterator[ClientConnection]:
    with connect(f"ws://{address}", compression=None, close_timeout=1.0) as client:
        assert unpack(client.recv(5.0, decode=False))["server"] == "metronome"
        yield client


def wait_for_sessions(server: PolicyServer, count: int) -> None:
    deadline_s = time.monotonic() + 5.0
    while True:
        with contextlib.suppress(RuntimeError):  # its own thread changes what is read here
            if len(server.status()["sessions"]) == count:
                return
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_clients_are_killed_and_nobody_else_notices() -> None:
    with serving(SlowStatelessPolicy()) as server, gateway_to(server) as gateway:
        url = f"ws://127.0.0.1:{gateway.port}"
        with connect_to(gateway) as other:
            for number in range(DEATHS):
                dying = subprocess.run(
                    [sys.executable, "-c", DYING_CLIENT, url, str(IN_REQUEST_S)],
                    input=pack(sent()).hex(),
                    text=True,
                    check=False,
                    timeout=20.0,
                )
                assert dying.returncode == -9
                reply = ask(other, sent(1.0))
                assert isinstance(reply, dict)
                np.testing.assert_array_equal(reply["actions"], expected(1.0, timestep=number))
            wait_for_sessions(server, 1)
        wait_for_sessions(server, 0)


def test_the_gateway_is_killed_and_the_server_keeps_nothing_of_it() -> None:
    with serving(SlowStatelessPolicy()) as server:
        address, port = f"127.0.0.1:{server.port}", 0
        for _ in range(DEATHS):
            began_s = time.monotonic()
            gateway = gateway_process(address, port)
            try:
                at = gateway.wait_ready(30.0)["address"]
                assert time.monotonic() - began_s < BACK_WITHIN_S
                port = int(at.rpartition(":")[2])
                with client_of(at) as client:
                    assert isinstance(ask(client, sent()), dict)
                    client.send(pack(sent()))
                    time.sleep(IN_REQUEST_S)
                    gateway.kill()
                    with pytest.raises(ConnectionClosed):
                        client.recv(5.0)
            finally:
                gateway.close(1.0)
            wait_for_sessions(server, 0)


def test_the_server_is_killed_and_the_clients_go_on_when_it_is_back() -> None:
    flags = ["-m", "python:tests.gateway.openpi_serving:SlowStatelessPolicy"]
    server = ServerProcess(flags)
    gateway = gateway_process(server.address)
    try:
        flags += ["--port", server.address.rpartition(":")[2]]
        with client_of(gateway.wait_ready(30.0)["address"]) as client:
            for timestep in range(DEATHS):
                reply = ask(client, sent())
                assert isinstance(reply, dict)
                np.testing.assert_array_equal(reply["actions"], expected(timestep=timestep))
                client.send(pack(sent()))
                time.sleep(IN_REQUEST_S)
                server.kill()
                error = client.recv(5.0)
                assert isinstance(error, str) and "server" in error
                server.close(1.0)
                server = ServerProcess(flags)
    finally:
        gateway.close(1.0)
        server.close(1.0)
