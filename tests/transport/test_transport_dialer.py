"""Addresses, and the errors of a client that gets no session."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import zmq
from contracts.channel import PATIENCE_S
from contracts.frames import CHUNK, OBSERVATION, chunk, observation
from transport_rig import make_listener, pumped

from transport.address import parse_address
from transport.dialer import PROVEN, Dialer
from transport.errors import (
    AddressInUse,
    PeerGone,
    ProtocolError,
    Refused,
    TransportError,
    TransportTimeout,
    TransportUnavailable,
)
from transport.handshake_messages import MAGIC, NO_EPOCH, PREFIX, PROTOCOL_VERSION, Opcode, Welcome
from transport.server.listener import Listener
from transport.zeromq.channel import PAYLOAD_OFFSET, ZmqChannel
from transport.zeromq.client_socket import LOCAL_SEND_BYTES, ClientSocket


def dial(listener: Listener) -> Dialer:
    return Dialer("127.0.0.1", listener.port, timeout_s=PATIENCE_S)


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:5000", "127.0.0.1", 5000),
        ("robot-3.lab.example:1", "robot-3.lab.example", 1),
        ("[::1]:65535", "::1", 65535),
        ("tcp://127.0.0.1:5000", "127.0.0.1", 5000),
        ("tcp://[fe80::1%eth0]:5000", "fe80::1%eth0", 5000),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        *("", "5000", ":5000", "host", "host:", "host:http", "::1:5000", "[::1]", "host:0"),
        *("host:65536", "host:-1", "http://host:80", "host:5000/", "[]:5000", "a/b:5"),
    ],
)
def test_invalid_address_is_an_error(text: str) -> None:
    with pytest.raises(TransportError, match=r"address.*got .*expected"):
        parse_address(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
@pytest.mark.parametrize("transport", ["auto", "zmq"])
def test_a_session_at_every_kind_of_host(host: str, transport: str) -> None:
    try:
        listener = make_listener(host=host)
    except TransportError as error:
        pytest.skip(f"no such address here: {error}")
    with listener, Dialer(host, listener.port, timeout_s=PATIENCE_S) as dialer:
        with pumped(listener):
            assert dialer.describe() == {"serves": "tests"}
            channel, welcome = dialer.open(OBSERVATION, client="c", transport=transport)
        with channel:
            assert welcome == Welcome(CHUNK, {"limit": 2})
            (session,) = listener.sessions.values()
            assert session.hello.client == "c"
            assert session.transport_reason == channel.transport_reason
            expected = ("shm", PROVEN) if transport == "auto" else ("zmq", "zmq was asked for")
            assert channel.transport == expected[0]
            assert channel.transport_reason.endswith(expected[1])


def test_a_taken_port_is_named() -> None:
    with (
        make_listener() as listener,
        pytest.raises(AddressInUse, match=rf"127\.0\.0\.1:{listener.port} is taken"),
    ):
        make_listener(port=listener.port)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"host": "198.51.100.7"}, "cannot listen at 198.51.100.7:0"),
        ({"host": "no such host"}, "'no such host' is not an address of this machine"),
        ({"port": 65536}, "port: got 65536"),
        ({"transports": ()}, "transports: got"),
        ({"transports": ("connection pigeon",)}, "transports: got"),
    ],
)
def test_listening_at_an_unusable_address_is_an_error(changes, text: str) -> None:
    with pytest.raises(TransportError, match=text):
        make_listener(**changes)


def test_connection_to_a_closed_port_times_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with (
            Dialer("127.0.0.1", port, timeout_s=0.05) as dialer,
            pytest.raises(TransportTimeout, match=rf"nothing answered at 127\.0\.0\.1:{port} with"),
        ):
            dialer.describe()


def test_connection_to_another_program_times_out() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        Dialer("127.0.0.1", other.getsockname()[1], timeout_s=0.3) as dialer,
        pytest.raises(TransportTimeout, match="nothing answered"),
    ):
        dialer.describe()


def test_a_host_that_does_not_resolve() -> None:
    with (
        Dialer("no such host", 5000) as dialer,
        pytest.raises(TransportError, match="cannot resolve 'no such host'"),
    ):
        dialer.describe()


def test_a_server_of_another_version_is_named_with_ours() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 0
        port = server.bind_to_random_port("tcp://127.0.0.1")
        with Dialer("127.0.0.1", port, timeout_s=PATIENCE_S) as dialer:
            # What a later version must still send: the prefix and REFUSED never change.
            link = dialer._take_socket()
            dialer._client_socket = link
            link.send_control(Opcode.DESCRIBE, NO_EPOCH, {})
            identity, *_ = server.recv_multipart()
            refused = PREFIX.pack(MAGIC, 9, Opcode.REFUSED, NO_EPOCH)
            server.send_multipart([identity, refused, b"{}"])
            ours = f"version 9, this client uses {PROTOCOL_VERSION}"
            with pytest.raises(ProtocolError, match=ours):
                dialer.describe()


def test_a_refusal_says_field_got_and_expected() -> None:
    def accept(hello):
        raise Refused("images.top", "uint8 (1, 1, 3)", "uint8 (480, 640, 3)")

    with make_listener(accept=accept) as listener, pumped(listener), dial(listener) as dialer:
        with pytest.raises(Refused, match=r"images\.top: got uint8") as caught:
            dialer.open(OBSERVATION, client="c")
        assert caught.value.expected == "uint8 (480, 640, 3)"
        assert not listener.sessions
        assert listener.statistics().refused == 1


def test_requested_transport_that_is_not_offered_is_an_error() -> None:
    with make_listener(transports=("shm",)) as listener, pumped(listener), dial(listener) as dialer:
        with pytest.raises(TransportUnavailable, match=r"'zmq' cannot be had.*shm"):
            dialer.open(OBSERVATION, client="c", transport="zmq")
        with pytest.raises(TransportError, match="'pigeon', expected one of"):
            dialer.open(OBSERVATION, client="c", transport="pigeon")


def test_sessions_are_bounded_and_given_back() -> None:
    with make_listener(max_sessions=2) as listener, pumped(listener), dial(listener) as dialer:
        first, _ = dialer.open(OBSERVATION, client="a", transport="shm")
        second, _ = dialer.open(OBSERVATION, client="b", transport="zmq")
        with pytest.raises(Refused, match="at most 2 at a time"):
            dialer.open(OBSERVATION, client="c")
        first.close()
        second.close()
        for _ in range(1000):
            try:
                third, _ = dialer.open(OBSERVATION, client="d")
                break
            except Refused:
                continue
        third.close()


def test_a_session_of_its_own_for_every_open() -> None:
    with make_listener() as listener:
        with dial(listener) as dialer, pumped(listener):
            channels = [
                dialer.open(OBSERVATION, client=str(n), transport=t)[0]
                for n, t in enumerate(("zmq", "shm", "zmq", "shm"))
            ]
        for number, channel in enumerate(channels):
            channel.send(observation(number), number)
        for session in listener.sessions.values():
            with session.channel.recv(PATIENCE_S) as message:
                assert str(message.request_id) == session.hello.client
                session.channel.send(chunk(message.request_id), message.request_id)
        for number, channel in enumerate(channels):
            with channel, channel.recv(PATIENCE_S) as message:
                assert message.request_id == number


def test_an_idle_client_keeps_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZMQ's own threads answer heartbeats; the client need not call anything."""
    monkeypatch.setattr("transport.zeromq.client_socket.HEARTBEAT_INTERVAL_MS", 50)
    monkeypatch.setattr("transport.zeromq.client_socket.HEARTBEAT_TIMEOUT_MS", 2000)
    with make_listener() as listener, Dialer("127.0.0.1", listener.port) as dialer:
        with pumped(listener):
            channel, _ = dialer.open(OBSERVATION, client="idle", transport="zmq")
        with channel:
            assert listener.wait(3.0) == []
            (session,) = listener.sessions.values()
            channel.send(observation(1), 1)
            session.channel.recv(PATIENCE_S).release()


def test_message_of_an_old_epoch_is_dropped_and_counted() -> None:
    """What an earlier session left under way does not reach a later one."""
    with make_listener() as listener, Dialer("127.0.0.1", listener.port) as dialer:
        with pumped(listener):
            old, _ = dialer.open(OBSERVATION, client="old", transport="zmq")
            new, _ = dialer.open(OBSERVATION, client="new", transport="zmq")
        assert isinstance(old, ZmqChannel) and isinstance(new, ZmqChannel)
        with old, new:
            old._epoch, fresh = new._epoch, old._epoch
            old.send(observation(1), 1)  # arrives at the new session over a foreign connection
            old._epoch = fresh
            new.send(observation(2), 2)
            sessions = {s.hello.client: s for s in listener.sessions.values()}
            with sessions["new"].channel.recv(PATIENCE_S) as message:
                assert message.request_id == 2
            frame = bytearray(PAYLOAD_OFFSET + OBSERVATION.nbytes)
            old._write_header(frame, Opcode.MESSAGE)
            new.deliver(memoryview(frame))
            assert new.statistics().dropped_epoch == 1
            while not listener.statistics().dropped_epoch:
                listener.wait(0.01)
            assert listener.statistics().dropped_epoch == 1


def test_closing_the_listener_ends_pending_handshakes() -> None:
    from transport.handshake_messages import Hello

    listener = make_listener()
    endpoint = f"127.0.0.1:{listener.port}"
    link = ClientSocket(f"tcp://{endpoint}", endpoint, ipv6=False)
    with pumped(listener):
        epoch, _ = link.request(
            Opcode.HELLO,
            NO_EPOCH,
            Hello("slow", OBSERVATION, ("zmq",)).to_body(),
            answer=Opcode.WELCOME,
            timeout_s=PATIENCE_S,
        )
    listener.close("maintenance")
    listener.close("again")
    with pytest.raises(PeerGone, match="maintenance"):
        link.request(
            Opcode.CONFIRM,
            epoch,
            {"transport": "zmq", "reason": ""},
            answer=Opcode.CONFIRM,
            timeout_s=PATIENCE_S,
        )
    link.close()


@pytest.mark.parametrize(
    ("host", "granted", "set_"),
    [
        ("127.0.0.1", LOCAL_SEND_BYTES, True),
        ("127.0.0.1", 212_992, False),
        ("192.0.2.1", 2**22, False),
    ],
)
def test_only_a_connection_within_the_host_has_a_short_send_queue(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str, granted: int, set_: bool
) -> None:
    """Over a network it would limit how much is on the wire."""
    most = tmp_path / "wmem_max"
    most.write_text(f"{granted}\n")
    monkeypatch.setattr("transport.zeromq.client_socket._MOST_SEND_BYTES", most)
    link = ClientSocket(f"tcp://{host}:9", host, ipv6=False)
    try:
        assert (link._socket.get(zmq.SNDBUF) == LOCAL_SEND_BYTES) == set_
    finally:
        link.close()


def test_a_client_over_zmq_needs_no_compiler() -> None:
    code = (
        "import sys, transport.dialer; sys.exit('numba' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_proof_of_another_user_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one who could map the segments: the credentials of the socket decide."""
    with make_listener() as listener, pumped(listener), dial(listener) as dialer:
        monkeypatch.setattr("transport.server.shm_acceptor.os.geteuid", lambda: 12345)
        channel, _ = dialer.open(OBSERVATION, client="c")
        with channel:
            assert channel.transport_reason == "server: another user"
            assert channel.transport == "zmq"
