"""A client's one ZMQ socket: the control plane, and the data plane where that is ZMQ."""

from __future__ import annotations

import contextlib
import math
import os
import select
import time
from collections.abc import Callable, Mapping
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from transport.errors import (
    PeerGone,
    ProtocolError,
    Refused,
    TransportError,
    TransportTimeout,
    WouldBlock,
)
from transport.handshake_messages import (
    NO_EPOCH,
    PROTOCOL_VERSION,
    Opcode,
    decode_body,
    decode_prefix,
    encode,
    string,
)
from transport.schema import MAX_MESSAGE_BYTES
from transport.zeromq import zmtp_greeting
from transport.zeromq.curve import ClientKeys

HEARTBEAT_MS = 1000
SILENCE_MS = 5000
"""A peer whose network is silent for this long is gone; it need not call anything to stay."""
LINGER_MS = 200
"""How long a goodbye may take to leave."""
COPY_BELOW = 65536
"""Bytes up to which a copy is cheaper than having ZMQ report that it is done with the original."""
HEADER_ROOM = 128
"""What a message has before its payload, at most."""
QUEUE = 16
"""Messages that ZMQ may queue per peer and direction. A session that keeps to its slots never has
more than half of them there; from one that does not, ZMQ stops reading at this many, and TCP makes
it wait."""
DESCRIPTORS = 12
"""As many as a link may need: its socket and monitor, the connection, ZMQ's own threads."""
# Asked per message; an enum costs more.
_EVENTS, _POLLIN, _DONTWAIT = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.DONTWAIT)
_FAILURES = (
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


_MECHANISM_MISMATCH = int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)


def configure(socket: zmq.Socket[bytes]) -> None:
    """What both ends of every connection set, before they bind or connect."""
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
    socket.set(zmq.HEARTBEAT_TTL, SILENCE_MS)
    socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES + HEADER_ROOM)
    socket.set(zmq.LINGER, LINGER_MS)
    socket.set(zmq.SNDHWM, QUEUE)
    socket.set(zmq.RCVHWM, QUEUE)


def has_input(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message can be received at once. Cheaper than the exception that says it cannot."""
    return bool(int(socket.get(_EVENTS)) & _POLLIN)


def alarm(socket: zmq.Socket[bytes]) -> select.poll:
    """A poll of ``socket``'s descriptor, for one that is seldom spoken to: a third of the cost of
    ``has_input``, which need only be asked, until it says no, when this is readable.

    Holds only for a socket that nothing is sent on: sending takes in the descriptor's signal.
    """
    # Whoever has never looked is not signalled either.
    has_input(socket)
    poll = select.poll()
    poll.register(int(socket.get(zmq.FD)), select.POLLIN)
    return poll


class ClientSocket:
    """A DEALER connected to ``endpoint``, with its own context.

    Attributes:
        address: As a person would write it, for messages.
    """

    def __init__(
        self, endpoint: str, address: str, *, ipv6: bool, curve: ClientKeys | None = None
    ) -> None:
        self.address, self._encrypted = address, curve is not None
        self._endpoint = endpoint
        self._refusal: Refused | None = None
        _require_descriptors(address)
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._deliver: Callable[[memoryview], None] | None = None
        self._epoch = NO_EPOCH
        self._gone: str | None = None
        self._connected = self._rejected = self._shut = False
        try:
            configure(self._socket)
            self._socket.set(zmq.IPV6, int(ipv6))
            if curve is not None:
                curve.apply(self._socket)
            self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(
                zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED | _FAILURES
            )
            self._socket.connect(endpoint)
            self._alarm = alarm(self._monitor)
            self._sleep = select.poll()
            for socket in (self._monitor, self._socket):
                self._sleep.register(int(socket.get(zmq.FD)), select.POLLIN)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise TransportError(f"cannot dial {address}: {error}") from error

    def request(
        self,
        opcode: Opcode,
        epoch: bytes,
        body: Mapping[str, Any],
        *,
        answer: Opcode,
        timeout_s: float,
    ) -> tuple[bytes, dict[str, Any]]:
        """Ask, and wait for ``answer``; its epoch and body.

        Raises:
            Refused: As the server says.
            ProtocolError: The server speaks another version, or nonsense.
            PeerGone: The server said goodbye instead.
            TransportTimeout: No answer came.
        """
        deadline = time.monotonic() + timeout_s
        self.tell(opcode, epoch, body)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TransportTimeout(self._silence(timeout_s))
            if not has_input(self._socket):
                self._sleep.poll(math.ceil(left * 1000))
                self._watch()
                if self._refusal is not None:
                    raise self._refusal
            frames = self._receive()
            if frames is None:
                continue
            version, number, came_epoch = decode_prefix(frames[0].buffer)
            if version != PROTOCOL_VERSION:
                raise ProtocolError(
                    f"{self.address} speaks protocol version {version}, "
                    f"this client speaks {PROTOCOL_VERSION}: install the same release on both"
                )
            if number == Opcode.BYE:
                raise PeerGone(farewell(frames))
            if number == Opcode.REFUSED:
                refusal = decode_body(_second(frames))
                raise Refused(*(string(refusal, name) for name in ("field", "got", "expected")))
            if number == answer and epoch in (NO_EPOCH, came_epoch):
                return came_epoch, decode_body(_second(frames))

    def tell(self, opcode: Opcode, epoch: bytes, body: Mapping[str, Any]) -> None:
        """Send without waiting for an answer."""
        try:
            self._socket.send_multipart(encode(opcode, epoch, body), zmq.DONTWAIT)
        except zmq.Again as error:
            raise WouldBlock(f"nothing has taken what was sent to {self.address}") from error

    def carry(self, epoch: bytes, deliver: Callable[[memoryview], None]) -> None:
        """From now on be the ``Carrier`` of the session ``epoch``."""
        self._epoch, self._deliver = epoch, deliver

    # --- Carrier

    def send(self, frame: Any) -> bool:
        try:
            self._socket.send(frame, _DONTWAIT, copy=len(frame) < COPY_BELOW)
        except zmq.Again:
            return False
        return True

    def pump(self, timeout_s: float) -> str | None:
        # Asked right before sleeping: what was sent meanwhile may have taken in the descriptor's
        # signal, and would then leave it silent with a message there.
        if timeout_s > 0 and self._gone is None and not has_input(self._socket):
            self._sleep.poll(math.ceil(timeout_s * 1000))
            if self._dispatch():
                return self._gone  # whoever waited has it; the rest when they look again
        while has_input(self._socket):
            self._dispatch()
        if self._alarm.poll(0):
            self._watch()
            if self._gone is not None:
                # The connection broke after its last messages were handed over; those are in time.
                while has_input(self._socket):
                    self._dispatch()
        return self._gone

    def close(self, reason: str = "") -> None:
        """Say goodbye, where there is a session, and let go of everything. Idempotent."""
        if self._shut:
            return
        self._shut = True
        if self._deliver is not None and self._gone is None:
            with contextlib.suppress(TransportError):
                self.tell(Opcode.BYE, self._epoch, {"reason": reason})
        self._socket.disable_monitor()
        self._context.destroy(linger=LINGER_MS if self._connected and self._gone is None else 0)

    # --- inside

    def _receive(self) -> list[zmq.Frame] | None:
        """All frames of one message, whatever their number; None when nothing was there."""
        frames: list[zmq.Frame] = []
        try:
            while not frames or frames[-1].more:
                frames.append(self._socket.recv(_DONTWAIT, copy=False))
        except zmq.Again:
            return None
        return frames

    def _dispatch(self) -> bool:
        """Hand on the next message; whether there was one."""
        frames = self._receive()
        if frames is None:
            return False
        head = frames[0].buffer
        try:
            _, number, epoch = decode_prefix(head)
        except ProtocolError:
            number, epoch = 0, NO_EPOCH
        if number == Opcode.BYE and epoch == self._epoch:
            self._gone = self._gone or farewell(frames)
        elif number != Opcode.PING and self._deliver is not None:
            # What is of more frames than a message has is let in as none, to be counted.
            self._deliver(head if len(frames) == 1 else head[:0])
        return True

    def _watch(self) -> None:
        """Read what the monitor saw happen to the connection."""
        while has_input(self._monitor):
            said = recv_monitor_message(self._monitor, zmq.DONTWAIT)
            event = said["event"]
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._connected = True
            elif event == zmq.Event.DISCONNECTED:
                if self._connected and self._gone is None:
                    self._gone = f"the connection to {self.address} broke"
            else:
                self._rejected = True
                self._refusal = self._refusal or self._key_refused(event, said["value"])

    def _key_refused(self, event: int, value: int) -> Refused | None:
        """What a failed handshake says about keys."""
        wants = f"keys that the server at {self.address} lets in"
        if event == zmq.Event.HANDSHAKE_FAILED_AUTH:
            return Refused("key", "a key that is not on its list", wants)
        if value == _MECHANISM_MISMATCH:
            if self._encrypted:
                return Refused("key", "keys", f"none: the server at {self.address} has none itself")
            return Refused("key", "none (--server_key, --client_key)", wants)
        if event != zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
            return None
        # It hung up before its greeting was read.
        if not self._encrypted and zmtp_greeting.mechanism(self._endpoint) == "CURVE":
            return Refused("key", "none (--server_key, --client_key)", wants)
        if self._encrypted:
            either = "another server's key, one not on its list, or keys where it has none itself"
            return Refused("key", either, wants)
        return None

    def _silence(self, timeout_s: float) -> str:
        self._watch()
        what = f"nothing answered at {self.address} within {timeout_s:g} s"
        if self._connected:
            return f"{what}: connected, but the server is silent"
        if self._rejected:
            return f"{what}: something listens there that is not a policy server"
        return what


def _require_descriptors(address: str) -> None:
    """ZMQ ends the whole process where it gets no descriptor for its threads: look before.

    Raises:
        TransportError: There are not enough left.
    """
    taken: list[int] = []
    try:
        for _ in range(DESCRIPTORS):
            taken.append(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError as error:
        raise TransportError(
            f"cannot dial {address}: {error.strerror}: got {len(taken)} descriptors, "
            f"expected {DESCRIPTORS}; close some, or raise the limit (ulimit -n)"
        ) from error
    finally:
        for fd in taken:
            os.close(fd)


def _second(frames: list[zmq.Frame]) -> bytes:
    return frames[1].bytes if len(frames) > 1 else b""


def farewell(frames: list[zmq.Frame]) -> str:
    """What a BYE says, for ``PeerGone``."""
    with contextlib.suppress(ProtocolError):
        reason = decode_body(_second(frames)).get("reason")
        if isinstance(reason, str) and reason:
            return f"the peer closed: {reason}"
    return "the peer closed"
