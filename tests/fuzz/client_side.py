"""Targets that are a client whose server sends arbitrary answers."""

from __future__ import annotations

import contextlib
import os
import socket
import types
from collections import deque
from collections.abc import Iterator
from typing import Any
from unittest import mock

import zmq

from policies.errors import PolicyError
from policies.types import PolicyContract
from runtime.protocol import messages
from tests.fuzz import samples
from tests.fuzz.channels import check
from tests.fuzz.feed import Feed, reached
from tests.fuzz.parsers import check_contract
from tests.fuzz.server_side import descriptors
from tests.fuzz.targets import Target
from transport.dialer import Dialer
from transport.errors import ProtocolError, TransportError, TransportUnavailable
from transport.handshake_messages import NO_EPOCH, Opcode, ShmOffer, decode_body
from transport.shm import client_handshake as client_handshake_module
from transport.shm.client_handshake import client_handshake
from transport.shm.segment import create_all
from transport.shm.segment_layout import SegmentLayout
from transport.shm.segment_offer import ACCEPTED
from transport.zeromq.client_socket import ClientSocket

MESSAGES = 3


class NoMoreAnswers(Exception):
    """The scripted server has no more answers; a real client would wait."""


class _Scripted:
    """A ZMQ socket that has received scripted answers, and drops what is sent."""

    def __init__(self, answers: list[list[bytes]]) -> None:
        self._frames: deque[zmq.Frame] = deque()
        for parts in answers:
            for place, part in enumerate(parts):
                frame = zmq.Frame(part)
                frame.more = place < len(parts) - 1
                self._frames.append(frame)

    def get(self, option: int) -> int:
        return int(zmq.POLLIN) if self._frames else 0

    def recv(self, flags: int, copy: bool) -> zmq.Frame:
        if not self._frames:
            raise zmq.Again
        return self._frames.popleft()

    def send_multipart(self, frames: list[bytes], flags: int) -> None: ...

    def send(self, frame: Any, flags: int, copy: bool) -> None: ...

    def disable_monitor(self) -> None: ...


class _Sleep:
    """A poll that raises instead of waiting."""

    def poll(self, timeout_ms: int) -> list[Any]:
        if timeout_ms:
            raise NoMoreAnswers
        return []


class _ScriptedClientSocket(ClientSocket):
    """A client socket over a scripted ZMQ socket."""

    def __init__(self, answers: list[list[bytes]]) -> None:
        self.address, self._encrypted, self._refusal = "somewhere", False, None
        self._socket: Any = _Scripted(answers)
        self._monitor: Any = _Scripted([])
        self._context: Any = types.SimpleNamespace(destroy=lambda linger: None)
        self._deliver, self._epoch, self._gone_reason = None, NO_EPOCH, None
        self._connected, self._rejected, self._closed = True, False, False
        self._monitor_poll: Any = _Sleep()
        self._sockets_poll: Any = _Sleep()


def dialer(data: bytes) -> None:
    """Answers to DESCRIBE, HELLO and CONFIRM, then the session's messages."""
    feed = Feed(data)
    quick = feed.byte() & 1
    answers = [] if quick else [_answer(feed, Opcode.DESCRIPTION)]
    for opcode in (Opcode.WELCOME, Opcode.CONFIRM):
        answers += [_answer(feed, opcode) for _ in range(1 + (feed.byte() == 255))]
    answers += [_message(feed, place) for place in range(MESSAGES) if feed.left or not place]
    client_socket = _ScriptedClientSocket(answers)
    client = Dialer("somewhere", 1)
    client._client_socket = client_socket
    contract: PolicyContract = samples.CONTRACT
    try:
        if not quick:
            contract, _ = messages.read_description(client.describe())
            check_contract(contract)
            reached["described"] += 1
        channel, welcome = client.open(samples.OBSERVATION, client="fuzz", transport="zmq")
    except (TransportError, PolicyError, NoMoreAnswers):
        client.close()
        return
    reached["opened"] += 1
    with contextlib.suppress(TransportError):
        while (message := channel.poll()) is not None:
            with message:
                check(message, welcome.schema)
    channel.close()
    client.close()
    assert client_socket._closed


def _answer(feed: Feed, opcode: Opcode) -> list[bytes]:
    """One control message of a server."""
    kind = feed.byte()
    body: dict[str, Any] = {}
    if opcode == Opcode.DESCRIPTION:
        body = samples.description()
        if kind & 4:
            body["contract"] = feed.json(feed.vary(decode_body(body["contract"].encode())))
    elif opcode == Opcode.WELCOME:
        body = samples.welcome()
        if kind & 4:
            schema = decode_body(f'{{"it": {body["schema"]}}}'.encode())["it"]
            body["schema"] = feed.json(feed.vary(schema))
        if kind & 8:
            body["shm"] = samples.offer()
    else:
        body = {"transport": "zmq", "reason": ""}
    if kind >= 224:
        opcode = (Opcode.REFUSED, Opcode.BYE, Opcode.PING, Opcode.MESSAGE)[kind & 3]
        body = {"field": "a", "got": "b", "expected": "c", "reason": "d"}
    text = feed.take(feed.byte()) if kind & 3 == 3 else feed.json(feed.vary(body)).encode()
    head = samples.control(opcode, None, samples.EPOCH)
    if kind & 16:
        head = feed.bytes_near(head)
    return [head, text][: 1 + (not kind & 32 or kind >= 128)]


def _message(feed: Feed, sequence: int) -> list[bytes]:
    """One message of the session."""
    kind = feed.byte()
    if kind >= 240:
        body = feed.json(feed.vary({"reason": "over"})).encode()
        return [samples.control(Opcode.BYE, None, samples.EPOCH), body]
    number = (1, 1, 2, 3)[kind & 3]
    text = b""
    if number == 1:
        said = feed.take(feed.byte() & 63)
        text = samples.payload(samples.REPLY)
        at = samples.REPLY.offsets["numbers"]
        text = text[:at] + bytes((1,)) + (said + bytes(64))[:63] + text[at + 64 :]
    elif number == 2:
        text = feed.json(feed.vary({"kind": "InferenceError", "args": ["late"]})).encode()
    data = samples.message(sequence, number=sequence, kind=number, payload=text)
    return [feed.bytes_near(data) if kind & 16 else data] * (1 + (kind & 224 == 224))


# The client's half of a shared-memory session


class _Prompted(socket.socket):
    """A client's socket whose server answers as soon as it connects.

    The server's end stays open until this one is closed: hanging up with a proof unread would reset
    the connection, and the answer would never be read.
    """

    def __init__(self, listening: socket.socket, answer: list[Any], *kind: int) -> None:
        super().__init__(*kind)
        self._listening, self._answer = listening, answer
        self._server: socket.socket | None = None

    def connect(self, address: Any) -> None:
        super().connect(address)
        self._server, _ = self._listening.accept()
        said, fds = self._answer
        socket.send_fds(self._server, [said], fds)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        super().close()


@contextlib.contextmanager
def client_handshake_target() -> Iterator[Target]:
    """An offer of shared memory, the content of its segments, and the answer to the proof."""
    mine = theirs = samples.SMALL
    layout = SegmentLayout.of(mine)
    created = create_all([layout.nbytes, layout.nbytes])
    written = [segment.map(writable=True) for segment in created]
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind("")
    listening.listen(8)
    address = listening.getsockname()
    name = address[1:].decode()
    eventfd = os.eventfd(0)
    answer: list[Any] = [ACCEPTED, [eventfd, eventfd]]
    identity = layout.identity(b"n" * 16)
    shim = types.SimpleNamespace(
        socket=lambda *kind: _Prompted(listening, answer, *kind),
        AF_UNIX=socket.AF_UNIX,
        SOCK_SEQPACKET=socket.SOCK_SEQPACKET,
        MSG_CMSG_CLOEXEC=socket.MSG_CMSG_CLOEXEC,
        recv_fds=socket.recv_fds,
    )
    valid = {
        "names": [segment.name for segment in created],
        "sizes": [layout.nbytes, layout.nbytes],
        "socket": name,
    }

    def target(data: bytes) -> None:
        feed, before = Feed(data), descriptors()
        for mapping in written:
            said = identity if feed.byte() < 192 else feed.bytes_near(identity)
            mapping.bytes[: len(identity)] = bytearray((said + identity)[: len(identity)])
        try:
            body = decode_body(feed.json(feed.vary(valid)).encode())
            read = ShmOffer.from_body(body)
        except ProtocolError:
            return
        kind = feed.byte()
        fds = [eventfd] * (2 if kind < 192 else kind & 3)
        said = feed.bytes_near(ACCEPTED) if kind & 1 else ACCEPTED
        answer[:] = said, fds
        with contextlib.suppress(TransportUnavailable):
            resources = client_handshake(read, samples.EPOCH, mine, theirs, timeout_s=0.05)
            assert said == ACCEPTED and len(fds) >= 2  # the kernel drops what is too many
            resources.close()
            reached["mapped"] += 1
        assert descriptors() == before, "a descriptor was leaked"

    try:
        with mock.patch.object(client_handshake_module, "socket", shim):
            yield target
    finally:
        listening.close()
        os.close(eventfd)
        for mapping in written:
            mapping.close()
        for segment in created:
            segment.close()
