"""Deaths, stops and shutdowns of real processes. ``nothing_left`` checks /dev/shm after each."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from contracts.frames import OBSERVATION, observation
from transport_peers import PATIENCE_S, Peer, client, server
from transport_rig import make_listener

from transport.dialer import Dialer
from transport.errors import TransportTimeout
from transport.handshake_messages import NO_EPOCH, Hello, Opcode
from transport.shm.segment import FOLDER
from transport.zeromq.client_socket import ClientSocket

pytestmark = pytest.mark.long
TRANSPORTS = ("shm", "zmq")


@contextmanager
def session_of_each(serving: Peer) -> Iterator[list[Peer]]:
    """A client over shared memory and one over ZMQ, each answered once."""
    with client(serving.port, "shm") as local, client(serving.port, "zmq") as remote:
        for dialing, transport in zip((local, remote), TRANSPORTS, strict=True):
            assert dialing.expect("open")["transport"] == transport
            assert dialing.ask() == {"event": "answer", "whole": True}
        seen = {serving.expect("session")["transport"] for _ in TRANSPORTS}
        assert seen == set(TRANSPORTS)
        yield [local, remote]


def test_closed_client_is_reported_as_closed() -> None:
    with server() as serving, session_of_each(serving) as clients:
        for dialing in clients:
            dialing.send_line("quit")
            dialing.expect("closed")
            assert "the client quit" in serving.expect("ended")["reason"]


@pytest.mark.parametrize("doomed", [0, 1], ids=TRANSPORTS)
def test_killed_client_is_detected_and_the_other_continues(doomed: int) -> None:
    with server() as serving, session_of_each(serving) as clients:
        clients[doomed].kill()
        assert "gone" in serving.expect("ended")["reason"]
        assert clients[1 - doomed].ask() == {"event": "answer", "whole": True}


def test_killed_server_is_detected() -> None:
    with server() as serving, session_of_each(serving) as clients:
        serving.kill()
        for dialing in clients:
            said = dialing.ask()
            assert (said["event"], said["type"]) == ("failed", "PeerGone")


def test_all_killed() -> None:
    with server() as serving, session_of_each(serving) as clients:
        for process in (serving, *clients):
            process.signal(signal.SIGKILL)
        for process in (serving, *clients):
            process.kill()


def test_server_shutdown_is_reported_to_clients() -> None:
    with server() as serving, session_of_each(serving) as clients:
        serving.signal(signal.SIGTERM)
        assert serving.process.wait(20) == 0
        for dialing in clients:
            said = dialing.ask()
            assert said["type"] == "PeerGone"
            assert "the server is shutting down (SIGTERM)" in said["text"]


def test_stopped_clients_do_not_affect_others_and_can_continue() -> None:
    with server() as serving, session_of_each(serving) as clients, client(serving.port) as other:
        other.expect("open")
        for dialing in clients:
            dialing.send_line("send")
            dialing.expect("sent")
            dialing.signal(signal.SIGSTOP)
        for _ in range(20):
            assert other.ask() == {"event": "answer", "whole": True}
        for dialing in clients:
            dialing.signal(signal.SIGCONT)
            dialing.send_line("quit")
            dialing.expect("closed")


def welcomed(port: int) -> tuple[ClientSocket, list[str]]:
    """A client that stops inside the handshake: the names it was offered exist."""
    link = ClientSocket(f"tcp://127.0.0.1:{port}", f"127.0.0.1:{port}", ipv6=False)
    hello = Hello("stops", OBSERVATION, ("shm", "zmq"))
    _, body = link.request(
        Opcode.HELLO, NO_EPOCH, hello.to_body(), answer=Opcode.WELCOME, timeout_s=20.0
    )
    return link, [name.lstrip("/") for name in body["shm"]["names"]]


def test_a_server_killed_inside_the_handshake_leaves_names_for_the_next_to_remove() -> None:
    with server() as serving:
        link, names = welcomed(serving.port)
        assert all((FOLDER / name).exists() for name in names)
        serving.kill()
        link.close()
    assert all((FOLDER / name).exists() for name in names)
    with make_listener():
        assert not any((FOLDER / name).exists() for name in names)


def test_a_starting_server_leaves_the_names_of_living_ones_alone() -> None:
    with server() as serving:
        link, names = welcomed(serving.port)
        with make_listener():
            assert all((FOLDER / name).exists() for name in names)
        link.close()


def test_unaccepted_offer_is_withdrawn() -> None:
    with server() as serving:
        link, names = welcomed(serving.port)
        with Dialer("127.0.0.1", serving.port, timeout_s=20.0) as dialer:
            while any((FOLDER / name).exists() for name in names):
                dialer.describe()
        link.close()


def test_server_without_free_descriptors_survives_and_recovers() -> None:
    """It goes from shared memory to ZMQ to silence, and back when clients leave."""
    limited = ["sh", "-c", 'ulimit -n $0 && exec "$@"', "44"]
    transports = []
    with server(prefix=limited) as serving, ExitStack() as clients:
        with Dialer("127.0.0.1", serving.port, timeout_s=0.5) as dialer, suppress(TransportTimeout):
            while True:
                channel, _ = dialer.open(OBSERVATION, client="one of many")
                clients.enter_context(channel)
                transports.append(channel.transport)
                if channel.transport == "shm":
                    assert "zmq" not in transports
                    channel.send(observation(1), 1)
                    channel.recv(PATIENCE_S).release()
        assert {"shm", "zmq"} == set(transports)
        clients.close()
        with Dialer("127.0.0.1", serving.port, timeout_s=PATIENCE_S) as dialer:
            for _ in range(100):
                channel, _ = dialer.open(OBSERVATION, client="one later")
                channel.close()
                if channel.transport == "shm":
                    break
        assert channel.transport == "shm"
