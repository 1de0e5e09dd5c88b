"""The GR00T gateway's end of ZMTP, with bytes of our own and with ZMQ's heartbeats."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
import zmq

from runtime.gateway.client_log import BURST
from runtime.gateway.config import GatewayCommand
from runtime.gateway.groot.gateway import GrootGateway
from runtime.gateway.groot.zmtp import GREETING, MAX_ENVELOPE_FRAMES, MAX_SMALL_BYTES
from runtime.wire_formats.npy_arrays import pack, unpack
from tests.gateway.groot_rig import GrootPeer, gateway, observation
from tests.runtime.serving import serving
from tests.runtime.toy_policy import ToyPolicy

SOCKET_TYPE = b"\x0bSocket-Type\0\0\0"
READY = b"\4\x19\5READY" + SOCKET_TYPE + b"\3REQ"
ROUTER_READY = b"\4\x1c\5READY" + SOCKET_TYPE + b"\6ROUTER"
PING = pack({"endpoint": "ping"})
REQUEST = b"\1\0" + bytes((0, len(PING))) + PING
MAX_CLIENTS = GatewayCommand("groot").max_clients
NOWHERE = "127.0.0.1:9"
"""A server that is not asked."""


@pytest.fixture(scope="module")
def served() -> Iterator[GrootGateway]:
    with gateway(NOWHERE) as made:
        yield made


@contextlib.contextmanager
def connection(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), 10) as made:
        yield made


def read(connected: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := connected.recv(count - len(data))):
        data += more
    return data


def read_frame(connected: socket.socket) -> tuple[int, bytes]:
    flags, size = read(connected, 2)
    return flags, read(connected, size)


def shake_hands(connected: socket.socket) -> None:
    connected.sendall(GREETING + READY)
    assert read(connected, 64) == GREETING
    assert read(connected, len(ROUTER_READY)) == ROUTER_READY


def rest(connected: socket.socket) -> bytes:
    """What comes until the end of the connection."""
    with contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: connected.recv(4096), b""))
    return b""


def test_a_request_may_come_in_single_bytes(served: GrootGateway) -> None:
    with connection(served.port) as connected:
        for byte in GREETING + READY + REQUEST:
            connected.sendall(bytes((byte,)))
        read(connected, 64), read_frame(connected)
        assert read_frame(connected) == (1, b"")
        flags, reply = read_frame(connected)
        assert flags == 0 and unpack(reply)["status"] == "ok"


@pytest.mark.parametrize(
    "greeting",
    [
        b"GET / HTTP/1.1\r\nHost: example\r\n\r\n".ljust(64),
        bytes(64),
        GREETING[:9] + b"\0" + GREETING[10:],
        GREETING[:10] + b"\1" + GREETING[11:],
        GREETING[:12] + b"CURVE".ljust(20, b"\0") + bytes(32),
        GREETING + REQUEST,
        GREETING + READY[:-3] + b"SUB",
        GREETING + READY[:-4] + b"\4REQ",
        GREETING + b"\4\6\5READY",
        GREETING + b"\4\x07\5READY\xff",
        GREETING + b"\4\x06\5ERROR",
        GREETING + b"\4\0",
        GREETING + b"\6" + (MAX_SMALL_BYTES + 1).to_bytes(8, "big"),
    ],
)
def test_a_peer_that_is_no_req_socket_is_disconnected(
    served: GrootGateway, greeting: bytes
) -> None:
    with connection(served.port) as connected:
        connected.sendall(greeting)
        assert rest(connected) in (b"", GREETING, GREETING + ROUTER_READY)
    with GrootPeer(served.port) as peer:
        assert peer.call("ping")["status"] == "ok"


@pytest.mark.parametrize(
    "frames",
    [
        b"\0\1x",
        b"\1\1x\0\1x",
        b"\1\0" * (MAX_ENVELOPE_FRAMES + 1),
        b"\x08\0",
        b"\3" + (MAX_SMALL_BYTES + 1).to_bytes(8, "big"),
        b"\6" + (2**63).to_bytes(8, "big"),
    ],
    ids=["no envelope", "no empty frame", "many frames", "flags", "long frame", "long command"],
)
def test_a_message_that_is_no_request_ends_the_connection(
    served: GrootGateway, frames: bytes
) -> None:
    with connection(served.port) as connected:
        shake_hands(connected)
        connected.sendall(frames)
        assert rest(connected) == b""


@pytest.mark.parametrize("sent", [b"", GREETING], ids=["nothing", "a greeting"])
def test_a_silent_peer_is_disconnected(
    served: GrootGateway, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.gateway.groot.zmtp.HANDSHAKE_S", 0.1)
    with connection(served.port) as connected:
        connected.sendall(sent)
        assert rest(connected).startswith(GREETING)


@pytest.mark.parametrize("size", [100, 2**63], ids=["short", "endless"])
def test_a_request_that_does_not_end_is_not_waited_for(
    served: GrootGateway, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connection(served.port) as connected:
        shake_hands(connected)
        monkeypatch.setattr("runtime.gateway.groot.zmtp.SLOW_S", 0.1)
        connected.sendall(b"\1\0\2" + size.to_bytes(8, "big") + bytes(50))
        assert rest(connected) == b""


def test_commands_between_frames_are_obeyed(served: GrootGateway) -> None:
    ping, pong = b"\4\x09\4PING\0\1ab", (4, b"\4PONGab")
    with connection(served.port) as connected:
        shake_hands(connected)
        connected.sendall(ping + REQUEST[:2] + ping + b"\4\6\5OTHER" + REQUEST[2:])
        assert read_frame(connected) == read_frame(connected) == pong
        assert read_frame(connected) == (1, b"")


def test_a_heartbeat_is_answered_while_the_policy_computes() -> None:
    gate = threading.Semaphore(1000)
    with (
        serving(ToyPolicy(gate), port=0) as server,
        gateway(f"127.0.0.1:{server.port}") as made,
        contextlib.ExitStack() as stack,
    ):
        peer = stack.enter_context(GrootPeer(made.port, heartbeat_ms=100))
        peer.act()
        while gate.acquire(blocking=False):
            pass
        stack.callback(gate.release, 100)
        monitor = peer.socket.get_monitor_socket(zmq.Event.DISCONNECTED)
        peer.send("get_action", {"observation": observation()})
        assert not monitor.poll(500)
        gate.release(100)
        assert peer.receive()[0]["action"][0, 0, 0] == 2
        peer.socket.disable_monitor()


def test_silent_peers_keep_no_client_out(
    served: GrootGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.gateway.groot.gateway.MORE_CONNECTIONS", 2 - MAX_CLIENTS)
    monkeypatch.setattr("runtime.gateway.groot.gateway.UNUSED_S", 0.0)
    with GrootPeer(served.port) as used, connection(served.port) as silent:
        assert used.call("ping")["status"] == "ok"
        shake_hands(silent)
        with GrootPeer(served.port) as peer:
            assert peer.call("ping")["status"] == "ok"
            assert rest(silent) == b""
            assert used.call("ping")["status"] == "ok"


@pytest.mark.parametrize("starts", [0, 1], ids=["connection", "computation"])
def test_a_client_for_which_there_is_no_thread_is_refused_alone(
    served: GrootGateway, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GrootPeer(served.port) as used:
        assert used.call("ping")["status"] == "ok"
        start, left = threading.Thread.start, iter(range(starts))

        def fail(thread: threading.Thread) -> None:
            if next(left, None) is None:
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patched, contextlib.ExitStack() as stack:
            patched.setattr(threading.Thread, "start", fail)
            connected = stack.enter_context(connection(served.port))
            connected.sendall(GREETING + READY)
            assert rest(connected) in (b"", GREETING + ROUTER_READY)
        assert used.call("ping")["status"] == "ok"
        with GrootPeer(served.port) as peer:
            assert peer.call("ping")["status"] == "ok"


def test_a_flood_of_bad_peers_does_not_fill_the_log(
    served: GrootGateway, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(BURST + 50):
        with connection(served.port) as connected:
            connected.sendall(bytes(64))
            rest(connected)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert 0 < len(warnings) < BURST + 25
