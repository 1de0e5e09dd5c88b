"""Invalid input at the port: the server continues, counts it, and answers with a reason."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import zmq
from contracts.channel import PATIENCE_S
from contracts.frames import CHUNK, OBSERVATION, chunk, observation
from transport_rig import make_listener, pumped

from transport.dialer import Dialer
from transport.errors import Refused
from transport.handshake_messages import (
    MAGIC,
    MAX_CONTROL_BYTES,
    NO_EPOCH,
    PREFIX,
    PROTOCOL_VERSION,
    Hello,
    Opcode,
    Welcome,
    encode,
)
from transport.schema import MAX_MESSAGE_BYTES
from transport.server.listener import Listener, ListenerStatistics


@pytest.fixture
def listener() -> Iterator[Listener]:
    with make_listener() as listener:
        yield listener


@pytest.fixture
def peer(listener: Listener) -> Iterator[zmq.Socket]:
    """A ZMQ client that may send anything."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        peer.rcvtimeo = int(PATIENCE_S * 1000)
        peer.connect(f"tcp://127.0.0.1:{listener.port}")
        yield peer


def wait_for(listener: Listener, reached: Callable[[ListenerStatistics], bool]) -> None:
    """Run the listener until its counts are so; it must still serve then."""
    for _ in range(200):
        if reached(listener.statistics()):
            break
        listener.wait(0.1)
    assert reached(listener.statistics()), listener.statistics()
    with pumped(listener), Dialer("127.0.0.1", listener.port, timeout_s=PATIENCE_S) as dialer:
        assert dialer.describe() == {"serves": "tests"}


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\nHost: robot\r\n\r\n",
        bytes(range(256)) * 64,
        b"\xff" * 4096,
        b"\x00" * 4096,
        b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + bytes(48) + b"\x04\xff\xff\xff\xff\xff",
    ],
    ids=["http", "bytes", "ones", "zeros", "half a ZMTP greeting"],
)
def test_noise_on_the_port(listener: Listener, noise: bytes) -> None:
    with socket.create_connection(("127.0.0.1", listener.port), PATIENCE_S) as connection:
        with suppress(OSError):  # it may have been cut off in the middle
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
        while True:
            listener.wait(0.01)
            connection.settimeout(0.01)
            try:
                if not connection.recv(4096):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    wait_for(listener, lambda counts: counts.running == 0)


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"x"],
        [b"\0" * 64],
        [MAGIC],
        [MAGIC + b"\0" * 8],
        [b"x"] * 50,
        [PREFIX.pack(MAGIC, PROTOCOL_VERSION, Opcode.HELLO, NO_EPOCH), b"{}", b"{}"],
        [PREFIX.pack(MAGIC, PROTOCOL_VERSION, 999, NO_EPOCH), b"{}"],
        [PREFIX.pack(MAGIC, PROTOCOL_VERSION, Opcode.WELCOME, NO_EPOCH), b"{}"],
        [b"x" * 2**20, b"y" * 2**20],
    ],
    ids=lambda frames: f"{len(frames)} frames of {len(frames[0])}",
)
def test_junk_frames_are_counted(listener: Listener, peer: zmq.Socket, frames) -> None:
    peer.send_multipart(frames)
    wait_for(listener, lambda counts: counts.malformed == 1)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "client"),
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"[" * 100_000, "JSON"),
        (b"\xff\xfe", "JSON"),
        (b'{"client": 5}', "client"),
        (b'{"client": "c", "transports": "shm"}', "transports"),
        (b'{"client": "c", "transports": [["shm"]]}', "transports"),
        (b'{"client": "c", "transports": ["shm"], "schema": 1}', "schema"),
        (b'{"client": "c", "transports": ["shm"], "schema": "{}"}', "schema"),
        (b'{"client": "c", "transports": ["shm"], "schema": "[]", "attributes": []}', "attributes"),
        (json.dumps({"client": "c" * 1000}).encode(), "client"),
        (b" " * (MAX_CONTROL_BYTES + 1), "at most"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_bad_hello_is_refused(listener: Listener, peer: zmq.Socket, body, complaint) -> None:
    peer.send_multipart([PREFIX.pack(MAGIC, PROTOCOL_VERSION, Opcode.HELLO, NO_EPOCH), body])
    wait_for(listener, lambda counts: counts.malformed == 1)
    head, text = peer.recv_multipart()
    assert PREFIX.unpack(head)[2] == Opcode.REFUSED
    assert complaint in json.loads(text)["got"]


@pytest.mark.parametrize(
    "schema",
    [
        [["image", "object", [1]]],
        [["image", "uint8", [0]]],
        [["image", "uint8", [2**62, 2**62]]],
        [["image", "uint8", [2**31]]],
        [["image", "uint8", [1]], ["image", "uint8", [1]]],
        [["", "uint8", [1]]],
    ],
    ids=str,
)
def test_a_schema_out_of_bounds_is_refused_by_name(listener, peer, schema) -> None:
    hello = {"client": "c", "transports": ["zmq"], "schema": json.dumps(schema), "attributes": {}}
    peer.send_multipart(encode(Opcode.HELLO, NO_EPOCH, hello))
    wait_for(listener, lambda counts: counts.refused == 1)
    refusal = json.loads(peer.recv_multipart()[1])
    assert refusal.keys() == {"field", "got", "expected"}
    assert listener.statistics().opened == 0


def test_refusal_of_another_protocol_version_names_both(
    listener: Listener, peer: zmq.Socket
) -> None:
    peer.send_multipart([PREFIX.pack(MAGIC, 7, Opcode.HELLO, NO_EPOCH), b"{}"])
    wait_for(listener, lambda counts: counts.version_mismatches == 1)
    head, text = peer.recv_multipart()
    assert PREFIX.unpack(head)[1] == PROTOCOL_VERSION
    assert json.loads(text) == {
        "field": "protocol version",
        "got": "7",
        "expected": str(PROTOCOL_VERSION),
    }


def test_too_long_message_ends_only_its_sender(listener, peer) -> None:
    peer.send(bytes(MAX_MESSAGE_BYTES + 1))
    wait_for(listener, lambda counts: counts.running == 0)
    assert listener.statistics().malformed == 0


def test_messages_without_a_session_are_counted(listener: Listener, peer: zmq.Socket) -> None:
    for opcode in (Opcode.MESSAGE, Opcode.CREDIT):
        peer.send_multipart([PREFIX.pack(MAGIC, PROTOCOL_VERSION, opcode, b"e" * 16), b"old"])
    wait_for(listener, lambda counts: counts.dropped_epoch == 2)


def test_confirmation_without_session_is_answered(listener: Listener, peer: zmq.Socket) -> None:
    peer.send_multipart(encode(Opcode.CONFIRM, b"e" * 16, {"transport": "zmq", "reason": ""}))
    with pumped(listener):
        head, text = peer.recv_multipart()
    assert PREFIX.unpack(head)[2] == Opcode.BYE
    assert json.loads(text)["reason"] == "the handshake took too long"


def test_unproven_shared_memory_is_refused(listener, peer) -> None:
    hello = Hello("liar", OBSERVATION, ("shm", "zmq"))
    peer.send_multipart(encode(Opcode.HELLO, NO_EPOCH, hello.to_body()))
    with pumped(listener):
        epoch = PREFIX.unpack(peer.recv_multipart()[0])[3]
        peer.send_multipart(encode(Opcode.CONFIRM, epoch, {"transport": "shm", "reason": ""}))
        head, _ = peer.recv_multipart()
    assert PREFIX.unpack(head)[2] == Opcode.REFUSED
    assert listener.statistics().opened == 0


def test_wrong_proof_is_rejected(listener: Listener, peer: zmq.Socket) -> None:
    hello = Hello("guesses", OBSERVATION, ("shm", "zmq"))
    peer.send_multipart(encode(Opcode.HELLO, NO_EPOCH, hello.to_body()))
    with pumped(listener):
        head, text = peer.recv_multipart()
        socket_name = json.loads(text)["shm"]["socket"]
        for proof in (b"x", PREFIX.unpack(head)[3] + bytes(32), bytes(48), bytes(4096)):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
                link.settimeout(PATIENCE_S)
                link.connect(f"\0{socket_name}")
                link.send(proof)
                assert link.recv(256) in (b"not a proof", b"not the segments on offer")
                assert link.recv(256) == b""


def test_session_rejects_another_connection(listener: Listener, peer: zmq.Socket) -> None:
    """Whoever learns an epoch still cannot speak for, or end, the session."""
    with Dialer("127.0.0.1", listener.port, timeout_s=PATIENCE_S) as dialer:
        with pumped(listener):
            channel, _ = dialer.open(OBSERVATION, client="owner", transport="zmq")
        with channel:
            peer.send_multipart(encode(Opcode.BYE, channel._epoch, {"reason": "mischief"}))
            wait_for(listener, lambda counts: counts.running == 1)
            (session,) = listener.sessions.values()
            channel.send(observation(1), 1)
            with session.channel.recv(PATIENCE_S) as message:
                session.channel.send(chunk(1), message.request_id)
            channel.recv(PATIENCE_S).release()


def test_error_in_accept_affects_one_client_only() -> None:
    def accept(hello: Hello) -> Welcome:
        if hello.client == "unlucky":
            raise KeyError("a bug")
        return Welcome(CHUNK)

    with make_listener(accept=accept) as listener, pumped(listener):
        with Dialer("127.0.0.1", listener.port, timeout_s=PATIENCE_S) as dialer:
            with pytest.raises(Refused, match="an internal error"):
                dialer.open(OBSERVATION, client="unlucky")
            channel, _ = dialer.open(OBSERVATION, client="lucky")
            channel.close()
        assert listener.statistics().failures == 1
