"""What ZMQ holds of a connection is bounded; a session that keeps within its slots is not cut."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import zmq
from contracts.channel import PATIENCE_S
from contracts.frames import OBSERVATION, observation
from transport_rig import make_listener, pumped

from transport.base_channel import SLOTS
from transport.dialer import Dialer
from transport.schema import ArraySpec, Schema
from transport.zeromq import connection_monitor
from transport.zeromq.connection_monitor import CONTROL_BYTES, Connection

FRAME = b"\3" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20)
"""A frame of ZMTP of 1 MiB, after which more follow."""
MOST_FRAMES = 1000
LARGE = Schema((ArraySpec("large", "uint8", (CONTROL_BYTES // 2,)),))


@pytest.fixture(scope="module", autouse=True)
def _sent_without_copy() -> None:
    """Starts the thread of pyzmq's that all messages which are not copied share, until exit."""
    zmq.Frame(bytearray(1), copy=False)


def zmtp_connection(port: int) -> socket.socket:
    """A connection after ZMTP's handshake."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.settimeout(PATIENCE_S)
    connection.sendall(b"\xff" + bytes(8) + b"\x7f\3\1" + b"NULL".ljust(20, b"\0") + bytes(32))
    ready = b"\5READY\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
    connection.sendall(bytes((4, len(ready))) + ready)
    return connection


def frames_until_cut(port: int) -> int:
    """Send frames of one message until the server hangs up; how many there were."""
    with zmtp_connection(port) as connection:
        for number in range(MOST_FRAMES):
            try:
                connection.sendall(FRAME)
            except (ConnectionError, BrokenPipeError):
                return number
    return MOST_FRAMES


def test_a_message_whose_frames_never_end_is_cut_and_others_are_served() -> None:
    """Also while the serving thread is busy: it does nothing meanwhile."""
    with make_listener() as listener:
        with pumped(listener), Dialer("127.0.0.1", listener.port, timeout_s=PATIENCE_S) as dialer:
            channel, _ = dialer.open(OBSERVATION, client="c", transport="zmq")
        with channel:
            sent = frames_until_cut(listener.port)
            assert CONTROL_BYTES >> 20 <= sent < MOST_FRAMES // 2, sent
            channel.send(observation(1), 1)
            (session,) = listener.sessions.values()
            while not session.channel.unread:
                listener.wait(0.1)
            with session.channel.recv(PATIENCE_S) as message:
                assert message.request_id == 1


def test_a_session_may_fill_its_slots_while_the_server_is_busy() -> None:
    array = np.ones(LARGE.specs["large"].shape, np.uint8)
    with make_listener() as listener:
        with pumped(listener), Dialer("127.0.0.1", listener.port, timeout_s=PATIENCE_S) as dialer:
            channel, _ = dialer.open(LARGE, client="c", transport="zmq")
        with channel:
            (session,) = listener.sessions.values()
            for number in range(SLOTS):
                channel.send({"large": array}, number)
            time.sleep(5 * connection_monitor.CHECK_EVERY_S)
            for number in range(SLOTS):
                with session.channel.recv(PATIENCE_S) as message:
                    assert message.request_id == number


@pytest.fixture(params=["127.0.0.1", "::1"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's socket, and the server's connection to it."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    try:
        server = socket.create_server((request.param, 0), family=family)
    except OSError as error:
        pytest.skip(f"no {request.param}: {error}")
    with server, socket.create_connection(server.getsockname()[:2]) as sender:
        accepted, _ = server.accept()
        with accepted:
            yield sender, accepted


def watched(accepted: socket.socket) -> Connection:
    return Connection(accepted.fileno(), accepted.getsockname()[1])


def pass_on(sender: socket.socket, accepted: socket.socket, left: int) -> None:
    """Send ``left`` bytes and read them."""
    thread = threading.Thread(target=sender.sendall, args=(bytes(left),))
    thread.start()
    while left:
        left -= len(accepted.recv(left))
    thread.join()


@pytest.mark.parametrize(("handed_on", "cut"), [(0, True), (CONTROL_BYTES, False)])
def test_only_what_was_not_handed_on_counts(
    pair: tuple[socket.socket, socket.socket], handed_on: int, cut: bool
) -> None:
    sender, accepted = pair
    connection = watched(accepted)
    pass_on(sender, accepted, CONTROL_BYTES + 2**16)
    connection.handed_on = handed_on
    connection.check()
    assert closed(sender) == cut


@pytest.mark.parametrize("asked_first", [False, True])
def test_what_is_handed_on_while_the_kernel_is_asked_is_not_held(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, asked_first: bool
) -> None:
    """A thread may lose the processor for seconds between two lines."""
    sender, accepted = pair
    connection, ask = watched(accepted), Connection._bytes_received

    def interrupted(each: Connection) -> int:
        before = ask(each)
        pass_on(sender, accepted, CONTROL_BYTES + 2**16)
        each.handed_on = ask(each)
        return before if asked_first else each.handed_on

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "_bytes_received", interrupted)
        connection.check()
    connection.check()
    assert not closed(sender)


def test_a_reused_descriptor_is_left_alone(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, accepted = pair
    pass_on(sender, accepted, CONTROL_BYTES + 2**16)
    with socket.create_server(("127.0.0.1", 0)) as server:
        former = socket.create_connection(server.getsockname())
        number, _ = server.accept()
    with former, number:
        connection = watched(number)
        os.dup2(accepted.fileno(), number.fileno())
        assert not connection.open
        connection.check()
        assert not closed(sender)


def closed(connection: socket.socket) -> bool:
    """Whether the other side has hung up."""
    try:
        return connection.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False


def test_counts_of_a_closed_connection_are_an_error() -> None:
    with socket.socket() as unconnected, pytest.raises(OSError, match="no longer"):
        Connection(unconnected.fileno(), 1)


def test_a_descriptor_of_another_port_is_not_watched(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """ZMQ may have closed its own before its report was read, and a policy opened this one."""
    sender, _ = pair
    port = sender.getpeername()[1]
    with pytest.raises(OSError, match="no longer a client's"):
        Connection(sender.fileno(), port)
