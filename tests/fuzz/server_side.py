"""Targets that are a server: no input from a client may raise, accumulate memory or leak.

"An internal error" is a violation as well: a client must not be able to cause an error that the
server logs with a traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import zmq
from zmq import auth
from zmq.utils import z85

from policies.types import ActionChunk, MetaObs, PolicyContract
from runtime.server.admin_token import AdminToken
from runtime.server.admission import SessionLimits
from runtime.server.cost_model import InferenceCostModel
from runtime.server.loaded_model import LoadedModel
from runtime.server.policy_closer import PolicyCloser
from runtime.server.request_handler import RequestHandler
from runtime.server.scheduler import Scheduler
from runtime.server.segment_registrar import SegmentRegistrar
from runtime.server.session_manager import SessionManager
from runtime.server.state import ServerState
from tests.fuzz import samples
from tests.fuzz.channels import check
from tests.fuzz.feed import Feed, reached
from tests.fuzz.targets import Target
from transport.channel import Kind
from transport.errors import PeerGone, Refused, TransportError
from transport.handshake_messages import (
    NO_EPOCH,
    PROTOCOL_VERSION,
    Hello,
    Opcode,
    Peer,
    decode_body,
    decode_prefix,
)
from transport.server import listener as listening
from transport.server.event_loop import EventLoop
from transport.server.handshake import PENDING_TIMEOUT_S, Handshake
from transport.server.listener import MAX_CONTROL_QUEUE, Listener
from transport.server.listener_records import PendingSession
from transport.server.shm_acceptor import MAX_UNPROVEN, ShmAcceptor
from transport.shm.segment import ShmResources
from transport.shm.segment_offer import ACCEPTED, PROOF_BYTES
from transport.zeromq.curve import CurveAuthenticator, ServerKeys

MESSAGES = 4
MAX_SESSIONS = 2
IDENTITIES = (b"one", b"two", b"gone")


class _Contract(PolicyContract):
    """A contract with precomputed JSON, which would take half of the run time."""

    def to_json(self) -> str:
        return _CONTRACT_JSON


_CONTRACT_JSON = samples.CONTRACT.to_json()


class DescribedPolicy:
    """A policy that can be described but not run."""

    contract = _Contract(
        **{f.name: getattr(samples.CONTRACT, f.name) for f in dataclasses.fields(PolicyContract)}
    )
    info = samples.INFO

    def infer(self, obs: MetaObs) -> ActionChunk:
        raise NotImplementedError

    def reset(self) -> None: ...

    def fork(self) -> DescribedPolicy:
        return self

    def close(self) -> None: ...


class PolicyCallbacks:
    """The callbacks that a policy server passes to its handshake, without the server.

    Attributes:
        list_hellos: Returns the requests of all present sessions; set by the target.
    """

    def __init__(self) -> None:
        model, costs = LoadedModel.of(DescribedPolicy()), InferenceCostModel({1: 10_000_000})
        state = ServerState(model, costs, Scheduler(costs, model.sizes))
        request_handler = RequestHandler(state, lambda session: None)
        self.list_hellos: Callable[[], list[Hello]] = list
        self.session_manager = SessionManager(
            state,
            request_handler,
            SegmentRegistrar(),
            SessionLimits(rate_hz=1000.0),
            PolicyCloser(),
            hellos=self._hellos,
            timeout_s=0.0,
        )
        self.describe = model.describe
        self._token = object.__new__(AdminToken)
        self._token._secret = "0" * 64

    def _hellos(self) -> list[Hello]:
        return self.list_hellos()

    def run_admin_command(
        self, command: str, arguments: Mapping[str, Any], peer: Peer
    ) -> dict[str, Any]:
        if command != "load":
            raise Refused("command", repr(command)[:80], "load")
        if not self._token.matches(arguments.get("token")):
            raise Refused("operator", str(peer), "the user who runs the server")
        reached["admin commands"] += 1
        return {"state": "loading"}


class ServerSocket:
    """A server socket with scripted messages. Sending to the client ``gone`` fails."""

    authenticator = None
    host, port = "127.0.0.1", 1
    fd = monitor_fd = -1
    signalled = False

    def __init__(self, *_: object) -> None:
        self.inbox: deque[tuple[bytes, list[zmq.Frame]]] = deque()
        self.replies: list[tuple[bytes, int, bytes]] = []
        self.lost = 0

    @property
    def waiting(self) -> bool:
        return bool(self.inbox)

    def receive(self) -> tuple[bytes, list[zmq.Frame]] | None:
        return self.inbox.popleft() if self.inbox else None

    def send(self, identity: bytes, frames: Sequence[Any]) -> bool:
        if identity == IDENTITIES[2]:
            raise PeerGone("gone")
        _, number, epoch = decode_prefix(memoryview(frames[0])[:64])
        if number not in (Opcode.MESSAGE, Opcode.CREDIT):
            assert len(frames) == 1 + (number != Opcode.PING), "an empty reply"
            for body in frames[1:]:
                decode_body(body)
        self.replies.append((identity, number, epoch))
        return True

    def allow(self, identity: bytes, message_bytes: int) -> None: ...

    def wait(self, timeout_s: float) -> None: ...

    def observe(self) -> tuple[int, int]:
        lost, self.lost = self.lost, 0
        return lost, 0

    def close(self) -> None: ...


def descriptors() -> int:
    """Number of descriptors that this process has open."""
    return sum(1 for _ in os.scandir("/proc/self/fd"))


def _identity(feed: Feed) -> bytes:
    """The identity that sends the next message; most often the first."""
    said = feed.byte()
    return IDENTITIES[(said >= 208) + (said >= 232)]


def _body(feed: Feed, number: int, epoch_seen: bool) -> bytes:
    """Frame 1 of a message of this opcode."""
    kind = feed.byte()
    if kind & 7 == 7:
        return feed.take(feed.byte())
    bodies: dict[int, dict[str, Any]] = {
        Opcode.HELLO: samples.hello(80 if kind & 8 else None),
        Opcode.CONFIRM: {"transport": "shm" if kind & 8 and epoch_seen else "zmq", "reason": "so"},
        Opcode.ADMIN_COMMAND: {
            "command": "load",
            "arguments": {"token": "0" * 64 if kind & 8 else "1"},
        },
        Opcode.BYE: {"reason": "done"},
    }
    valid = bodies.get(number, {})
    if number == Opcode.HELLO and kind & 16:
        valid["transports"] = ["zmq"]
    if number == Opcode.HELLO and kind & 32:
        valid["schema"] = feed.json(feed.vary(decode_schema(valid["schema"])))
    return feed.json(feed.vary(valid)).encode()


def decode_schema(text: str) -> Any:
    """Decode a schema's JSON, so that it can be changed."""
    return decode_body(f'{{"it": {text}}}'.encode())["it"]


# The handshake alone, with shared memory on offer


class _NamedAcceptor:
    """An acceptor of which a handshake uses only the name."""

    name = "metronome-" + "2" * 32


class _HandshakeRun:
    """A handshake and the sessions that it started."""

    def __init__(self, callbacks: PolicyCallbacks) -> None:
        self.server_socket, self.counts = ServerSocket(), Counter[str]()
        self.running: list[ShmResources | None] = []
        self.handshake = Handshake(
            self.server_socket,  # type: ignore[arg-type]
            _NamedAcceptor(),  # type: ignore[arg-type]
            describe=callbacks.describe,
            accept=callbacks.session_manager.accept,
            admin_handler=callbacks.run_admin_command,
            transports=("shm", "zmq"),
            max_sessions=MAX_SESSIONS,
            running=lambda: len(self.running),
            start=self._start,
            counts=self.counts,
        )
        callbacks.list_hellos = lambda: self.handshake.pending

    def _start(self, pending: PendingSession, transport: str, reason: str) -> None:
        reached[f"sessions over {transport}"] += 1
        assert transport in pending.transports and len(reason) <= 1024
        self.running.append(pending.offer.take() if transport == "shm" else None)  # type: ignore[union-attr]

    def epochs(self) -> list[bytes]:
        return [*self.handshake._pending, samples.OTHER_EPOCH, NO_EPOCH]

    def handle(self, feed: Feed) -> None:
        epochs = self.epochs()
        epoch = epochs[feed.byte() % len(epochs)]
        identity = _identity(feed)
        said = feed.byte()
        seen = epoch in self.handshake._pending
        usual = Opcode.CONFIRM if seen else Opcode.HELLO
        number = (usual, usual, usual, 1, 3, 6, 7, 11)[said & 7] if said < 240 else feed.byte()
        version = PROTOCOL_VERSION if said < 250 else feed.byte()
        before = len(self.server_socket.replies)
        self.handshake.handle(
            identity, version, number, epoch, _body(feed, number, seen), Peer("here")
        )
        assert self.counts["failures"] == 0, "an internal error was caused"
        answered = len(self.server_socket.replies) - before
        if identity != IDENTITIES[2]:
            assert answered == 1 or (number == Opcode.BYE and answered == 0), answered

    def send_proof(self, feed: Feed) -> None:
        """Send a proof to the acceptor."""
        epochs = self.epochs()
        epoch = epochs[feed.byte() % len(epochs)]
        pending = self.handshake._pending.get(epoch)
        true = b"" if pending is None or pending.offer is None else b"".join(pending.offer._nonces)
        proof = feed.bytes_near(true)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if feed.byte() == 255:
            theirs.close()
        refusal = self.handshake.accept_proof(epoch, proof, ours)
        if refusal is None:
            reached["proven"] += 1
            assert true and proof == true
            for fd in socket.recv_fds(theirs, 8, 2)[1]:
                os.close(fd)
        else:
            ours.close()
        theirs.close()

    def close(self) -> None:
        self.handshake.close("over")
        for parts in self.running:
            if parts is not None:
                parts.close()
        self.server_socket.close()
        assert not self.handshake._pending


@contextlib.contextmanager
def handshake() -> Iterator[Target]:
    """Control messages, proofs and the clock, in any order, from clients of which one is gone."""
    callbacks = PolicyCallbacks()

    def target(data: bytes) -> None:
        feed, before = Feed(data), descriptors()
        run = _HandshakeRun(callbacks)
        try:
            for _ in range(MESSAGES):
                what = feed.byte()
                if what < 160:
                    run.handle(feed)
                elif what < 230:
                    run.send_proof(feed)
                else:
                    run.handshake.expire(time.monotonic() + (what - 230) / 25 * PENDING_TIMEOUT_S)
                assert len(run.handshake._pending) + len(run.running) <= MAX_SESSIONS
                if not feed.left:
                    break
        finally:
            run.close()
        assert descriptors() == before, "a descriptor was leaked"

    yield target


# A whole listener


@contextlib.contextmanager
def listener() -> Iterator[Target]:
    """Messages of any number of frames at a listener with sessions over ZMQ."""
    callbacks = PolicyCallbacks()

    def target(data: bytes) -> None:
        before = descriptors()
        with Listener(
            "",
            0,
            describe=callbacks.describe,
            accept=callbacks.session_manager.accept,
            admin_handler=callbacks.run_admin_command,
            transports=("zmq",),
            max_sessions=MAX_SESSIONS,
            spin_us=0,
        ) as served:
            callbacks.list_hellos = lambda: served.hellos
            _serve(Feed(data), served)
        assert descriptors() == before, "a descriptor was leaked"

    eventfds = [os.eventfd(0), os.eventfd(0)]  # never readable
    try:
        with (
            mock.patch.object(listening, "ServerSocket", ServerSocket),
            mock.patch.multiple(ServerSocket, fd=eventfds[0], monitor_fd=eventfds[1]),
        ):
            yield target
    finally:
        for eventfd in eventfds:
            os.close(eventfd)


def _serve(feed: Feed, served: Listener) -> None:
    server_socket: Any = served._server_socket
    for _ in range(MESSAGES):
        for _ in range(1 + feed.byte() // 200):
            server_socket.inbox.append(_multipart(feed, served))
        server_socket.lost = feed.byte() == 255
        served._next_poll_s = 0.0  # it polls once a millisecond, and this loop is faster
        for session in served.wait(0.0):
            schema = session.hello.schema
            with contextlib.suppress(TransportError):
                while (message := session.channel.poll()) is not None:
                    with message:
                        check(message, schema)
                        if feed.byte() & 1:
                            session.channel.send_body(Kind.SUPERSEDED, message.request_id, b"1")
        statistics = served.statistics()
        assert statistics.failures == 0, "an internal error was caused"
        assert statistics.running + len(served._handshake._pending) <= MAX_SESSIONS
        assert len(served._control) <= MAX_CONTROL_QUEUE
        del server_socket.replies[:-32]
        if not feed.left:
            break
    reached["sessions"] += served.statistics().opened


def _multipart(feed: Feed, served: Listener) -> tuple[bytes, list[zmq.Frame]]:
    """The next message of a client."""
    identity = _identity(feed)
    said = feed.byte()
    known = [*served._handshake._pending, *served._session_table._connections, samples.OTHER_EPOCH]
    epoch = known[feed.byte() % len(known)]
    if said & 3 != 3 and epoch in served._session_table._connections:
        channel = served._session_table._connections[epoch].channel
        schema = channel.recv_schema
        data = samples.message(
            sequence=channel._window.cursor,
            released=channel._peer_tail,
            received=channel._head,
            kind=(1, 1, 4, 2)[feed.byte() & 3],
            payload=samples.payload(schema),
            opcode=Opcode.CREDIT if said & 16 else Opcode.MESSAGE,
            epoch=epoch,
        )
        parts = [feed.bytes_near(data) if said & 8 else data]
    else:
        usual = Opcode.CONFIRM if epoch in served._handshake._pending else Opcode.HELLO
        number = (usual, usual, usual, 7, 9, 10, 1, 11)[said >> 5]
        prefix = samples.control(Opcode(number), None, epoch)
        if said & 8:
            prefix = feed.bytes_near(prefix)
        parts = [prefix, _body(feed, number, epoch_seen=False)]
    if said & 4:
        count = feed.byte() & 3
        parts = (parts * 2)[:count]
        # As ``ServerSocket.receive``: no frames if there were too many.
        parts = [] if count > 2 else parts
    return identity, [zmq.Frame(part) for part in parts]


# The acceptor of shared-memory clients


@contextlib.contextmanager
def shm_acceptor() -> Iterator[Target]:
    """Datagrams at the AF_UNIX socket, from clients that may hang up."""
    event_loop = EventLoop()
    accepted: list[socket.socket] = []
    proof = bytes(range(PROOF_BYTES))

    def admit(epoch: bytes, nonces: bytes, link: socket.socket) -> str | None:
        assert len(epoch) + len(nonces) == PROOF_BYTES
        if epoch + nonces != proof:
            return "not the segments on offer"
        reached["accepted"] += 1
        link.send(ACCEPTED)
        accepted.append(link)
        return None

    acceptor = ShmAcceptor(event_loop, admit)

    def target(data: bytes) -> None:
        feed, before = Feed(data), descriptors()
        clients: list[socket.socket] = []
        for _ in range(4):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            clients.append(client)
            client.connect(f"\0{acceptor.name}")
            said = feed.byte()
            with contextlib.suppress(OSError):
                if said < 200:
                    client.send(feed.bytes_near(proof))
                elif said < 220:
                    client.send(feed.take(feed.byte()))
                    client.send(proof)
                elif said < 240:
                    client.close()
            event_loop.run_once(0.0)
            if said & 1:
                event_loop.run_once(0.0)
            assert len(acceptor._unproven) <= MAX_UNPROVEN
            if not feed.left:
                break
        acceptor.expire(time.monotonic() + 3600.0)
        assert not acceptor._unproven
        for one in (*clients, *accepted):
            one.close()
        accepted.clear()
        assert descriptors() == before, "a descriptor was leaked"

    try:
        yield target
    finally:
        acceptor.close()
        event_loop.close()


# Authentication of keys


@contextlib.contextmanager
def authenticator() -> Iterator[Target]:
    """ZMQ's authentication requests for a key."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder, "allowed")
        listed.mkdir()
        auth.create_certificates(listed, "robot")
        Path(listed, "robot.key_secret").unlink()
        Path(listed, "broken.key").write_text("no key")
        key = auth.load_certificate(listed / "robot.key")[0]
        checker = object.__new__(CurveAuthenticator)
        checker._keys, checker._quiet_until_s = ServerKeys(b"", b"", listed), 0.0
        raw = z85.decode(key)

        def target(data: bytes) -> None:
            feed = Feed(data)
            valid = [b"1.0", b"1", b"metronome", b"127.0.0.1", b"", b"CURVE", raw]
            for _ in range(feed.byte() & 3):
                place = feed.byte() % 8
                if place == 7:
                    valid.insert(feed.byte() % 8, feed.take(feed.byte() & 31))
                elif place < len(valid):
                    valid[place] = feed.bytes_near(valid[place])
            del valid[7 + (feed.byte() & 1) - (feed.byte() % 9) :]
            reply = checker._reply(valid)
            assert len(reply) == 6 and all(type(frame) is bytes for frame in reply)
            assert reply[2] in (b"200", b"400") and reply[1] == [*valid, b"", b""][1]
            if reply[2] == b"200":
                reached["admitted"] += 1
                assert valid[6] == raw and reply[4] == b"robot"

        yield target
