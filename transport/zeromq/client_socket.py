"""A client's ZMQ socket: for control messages, and for the session if it runs over ZMQ."""

from __future__ import annotations

import contextlib
import math
import os
import select
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import zmq
from zmq.utils.monitor import recv_monitor_message

from transport.address import is_loopback
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
    text_field,
)
from transport.schema import MAX_MESSAGE_BYTES
from transport.zeromq import zmtp_greeting
from transport.zeromq.curve import ClientKeys

HEARTBEAT_INTERVAL_MS = 1000
HEARTBEAT_TIMEOUT_MS = 5000
"""After this time without network traffic the peer is gone. ZMQ's own threads send heartbeats."""
LINGER_MS = 200
"""How long closing may take to send the last message."""
COPY_BELOW = 65536
"""Frames shorter than this are copied. ZMQ's notification that a buffer was sent costs more."""
HEADER_ROOM = 128
"""Maximum number of bytes before a message's payload."""
HIGH_WATER_MARK = 16
"""Messages that ZMQ may queue per peer and direction. A session that respects its slots never has
more than half of this number queued. From a peer that does not, ZMQ stops reading at this number,
and TCP makes it wait."""
LOCAL_SEND_BYTES = 512 * 1024
"""What the kernel may queue to a server on this host, where no wire is to be filled. A queue of 4
MB, as the kernel would make it, costs four images up to half of their time (docs/transport.md).
Over a network the kernel decides, because the queue must cover what is on the wire."""
_MOST_SEND_BYTES = Path("/proc/sys/net/core/wmem_max")
NEEDED_DESCRIPTORS = 12
"""Descriptors that one client may need: socket, monitor, connection and ZMQ's own threads."""
# Used once per message; an enum costs more.
_MESSAGE_BYTE = bytes((Opcode.MESSAGE,))
_BYE, _PING = int(Opcode.BYE), int(Opcode.PING)
_EVENTS, _POLLIN, _DONTWAIT = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.DONTWAIT)
FAILURES = (
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


_MECHANISM_MISMATCH = int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)


def configure(socket: zmq.Socket[bytes]) -> None:
    """Set the options that both ends share, before ``bind`` or ``connect``."""
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES + HEADER_ROOM)
    socket.set(zmq.LINGER, LINGER_MS)
    socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.set(zmq.RCVHWM, HIGH_WATER_MARK)


def has_input(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message can be received at once. Cheaper than ``recv`` and its exception."""
    return bool(int(socket.get(_EVENTS)) & _POLLIN)


def make_fd_poll(socket: zmq.Socket[bytes]) -> select.poll:
    """Make a poll of ``socket``'s descriptor, for a socket that seldom receives.

    It costs a third of ``has_input``, which must be called only when the poll is readable, and then
    until it returns False. Use it only for a socket that never sends: sending clears the
    descriptor's signal.
    """
    # The descriptor signals only after the events were read once.
    has_input(socket)
    poll = select.poll()
    poll.register(int(socket.get(zmq.FD)), select.POLLIN)
    return poll


class ClientSocket:
    """A DEALER socket connected to ``endpoint``, with its own context.

    It is the ``FrameConnection`` of a session after ``attach_session``.

    Attributes:
        address: The server's address as the user gave it, for messages.
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
        self._gone_reason: str | None = None
        self._connected = self._rejected = self._closed = False
        self._drained = False  # no message was there, and nothing was done since
        try:
            configure(self._socket)
            self._socket.set(zmq.IPV6, int(ipv6))
            if _may_shorten_send_queue(endpoint):
                self._socket.set(zmq.SNDBUF, LOCAL_SEND_BYTES)
            if curve is not None:
                curve.apply(self._socket)
            self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(
                zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED | FAILURES
            )
            self._socket.connect(endpoint)
            self._monitor_poll = make_fd_poll(self._monitor)
            self._sockets_poll = select.poll()
            for socket in (self._monitor, self._socket):
                self._sockets_poll.register(int(socket.get(zmq.FD)), select.POLLIN)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise TransportError(f"cannot connect to {address}: {error}") from error

    def request(
        self,
        opcode: Opcode,
        epoch: bytes,
        body: Mapping[str, Any],
        *,
        answer: Opcode,
        timeout_s: float,
    ) -> tuple[bytes, dict[str, Any]]:
        """Send a control message and wait for ``answer``; return its epoch and body.

        Raises:
            Refused: The server refused, or rejected the key.
            ProtocolError: The answer has another protocol version, or none.
            PeerGone: The server ended the session instead.
            TransportTimeout: No answer arrived within ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(WouldBlock):  # refused before it was sent: the monitor knows why
            self.send_control(opcode, epoch, body)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TransportTimeout(self._timeout_message(timeout_s))
            if not has_input(self._socket):
                self._sockets_poll.poll(math.ceil(left * 1000))
                self._read_monitor()
                if self._refusal is not None:
                    raise self._refusal
            frames = self._receive()
            if frames is None:
                continue
            version, number, came_epoch = decode_prefix(frames[0].buffer)
            if version != PROTOCOL_VERSION:
                raise ProtocolError(
                    f"{self.address} uses protocol version {version}, "
                    f"this client uses {PROTOCOL_VERSION}: install the same release on both"
                )
            if number == Opcode.BYE:
                raise PeerGone(bye_reason(frames))
            if number == Opcode.REFUSED:
                refusal = decode_body(_body_frame(frames))
                raise Refused(*(text_field(refusal, name) for name in ("field", "got", "expected")))
            if number == answer and epoch in (NO_EPOCH, came_epoch):
                return came_epoch, decode_body(_body_frame(frames))

    def send_control(self, opcode: Opcode, epoch: bytes, body: Mapping[str, Any]) -> None:
        """Send a control message without waiting for an answer. Raises ``WouldBlock``."""
        self._drained = False
        try:
            self._socket.send_multipart(encode(opcode, epoch, body), zmq.DONTWAIT)
        except zmq.Again as error:
            raise WouldBlock(f"the queue to {self.address} is full") from error

    def attach_session(self, epoch: bytes, deliver: Callable[[memoryview], None]) -> None:
        """Become the ``FrameConnection`` of session ``epoch``; pass its frames to ``deliver``."""
        self._epoch, self._deliver = epoch, deliver

    # --- FrameConnection

    def send(self, frame: Any) -> bool:
        """See ``FrameConnection.send``."""
        self._drained = False
        try:
            self._socket.send(frame, _DONTWAIT, copy=len(frame) < COPY_BELOW)
        except zmq.Again:
            return False
        return True

    def pump(self, timeout_s: float) -> str | None:
        """See ``FrameConnection.pump``."""
        # Checked before sleeping, unless nothing was done since the last check: sending may have
        # cleared the descriptor's signal although a message is there.
        sleep = timeout_s > 0 and self._gone_reason is None
        if sleep and (self._drained or not has_input(self._socket)):
            self._drained = False
            self._sockets_poll.poll(math.ceil(timeout_s * 1000))
            if self._dispatch():
                # The caller has its message; the next call reads further ones.
                return self._gone_reason
        while has_input(self._socket):
            self._dispatch()
        self._drained = True
        if self._monitor_poll.poll(0):
            self._read_monitor()
            if self._gone_reason is not None:
                # Messages that arrived before the connection broke are still delivered.
                while has_input(self._socket):
                    self._dispatch()
        return self._gone_reason

    def close(self, reason: str = "") -> None:
        """End the session, if there is one, with ``reason``; close the socket. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._deliver is not None and self._gone_reason is None:
            with contextlib.suppress(TransportError):
                self.send_control(Opcode.BYE, self._epoch, {"reason": reason})
        self._socket.disable_monitor()
        self._context.destroy(
            linger=LINGER_MS if self._connected and self._gone_reason is None else 0
        )

    # --- inside

    def _receive(self) -> list[zmq.Frame] | None:
        """All frames of the next message; None if there is none."""
        try:
            frame = self._socket.recv(_DONTWAIT, copy=False)
        except zmq.Again:
            return None
        frames = [frame]
        while frame.more:
            frame = self._socket.recv(_DONTWAIT, copy=False)
            frames.append(frame)
        return frames

    def _dispatch(self) -> bool:
        """Handle the next message; False if there is none."""
        frames = self._receive()
        if frames is None:
            return False
        head = frames[0].buffer
        if self._deliver is not None and len(frames) == 1 and head[6:7] == _MESSAGE_BYTE:
            self._deliver(head)  # it checks the rest of the header
            return True
        try:
            _, number, epoch = decode_prefix(head)
        except ProtocolError:
            number, epoch = 0, NO_EPOCH
        if number == _BYE and epoch == self._epoch:
            self._gone_reason = self._gone_reason or bye_reason(frames)
        elif number != _PING and self._deliver is not None:
            # Too many frames are delivered as an empty frame, which the channel counts.
            self._deliver(head if len(frames) == 1 else head[:0])
        return True

    def _read_monitor(self) -> None:
        """Read the monitor's events about the connection."""
        while has_input(self._monitor):
            report = recv_monitor_message(self._monitor, zmq.DONTWAIT)
            event = report["event"]
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._connected = True
            elif event == zmq.Event.DISCONNECTED:
                if self._connected and self._gone_reason is None:
                    self._gone_reason = f"the connection to {self.address} broke"
            else:
                self._rejected = True
                self._refusal = self._refusal or self._key_refused(event, report["value"])

    def _key_refused(self, event: int, value: int) -> Refused | None:
        """The refusal that a failed ZMQ handshake means for the keys, or None."""
        expected = f"keys that the server at {self.address} lets in"
        if event == zmq.Event.HANDSHAKE_FAILED_AUTH:
            return Refused("key", "a key that is not on its list", expected)
        if value == _MECHANISM_MISMATCH:
            if self._encrypted:
                return Refused("key", "keys", f"none: the server at {self.address} has none itself")
            return Refused("key", "none (--server_key, --client_key)", expected)
        if event != zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
            return None
        # The server hung up before ZMQ read its greeting.
        if not self._encrypted and zmtp_greeting.read_mechanism(self._endpoint) == "CURVE":
            return Refused("key", "none (--server_key, --client_key)", expected)
        if self._encrypted:
            either = "another server's key, one not on its list, or keys where it has none itself"
            return Refused("key", either, expected)
        return None

    def _timeout_message(self, timeout_s: float) -> str:
        self._read_monitor()
        what = f"nothing answered at {self.address} within {timeout_s:g} s"
        if self._connected:
            return f"{what}: connected, but the server is silent"
        if self._rejected:
            return f"{what}: something listens there that is not a policy server"
        return what


def _require_descriptors(address: str) -> None:
    """Check that enough descriptors are free: ZMQ aborts the process if it gets none.

    Raises:
        TransportError: Not enough descriptors are free.
    """
    taken: list[int] = []
    try:
        for _ in range(NEEDED_DESCRIPTORS):
            taken.append(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError as error:
        raise TransportError(
            f"cannot connect to {address}: {error.strerror}: got {len(taken)} descriptors, "
            f"expected {NEEDED_DESCRIPTORS}; close some, or raise the limit (ulimit -n)"
        ) from error
    finally:
        for fd in taken:
            os.close(fd)


def _may_shorten_send_queue(endpoint: str) -> bool:
    """Whether the server is on this host, and the kernel grants ``LOCAL_SEND_BYTES``. It would
    shorten the queue further where less is allowed, which costs more than it gains."""
    if not is_loopback(urlsplit(endpoint).hostname or ""):
        return False
    with contextlib.suppress(OSError, ValueError):
        return int(_MOST_SEND_BYTES.read_text(encoding="ascii")) >= LOCAL_SEND_BYTES
    return False


def _body_frame(frames: list[zmq.Frame]) -> bytes:
    return frames[1].bytes if len(frames) > 1 else b""


def bye_reason(frames: list[zmq.Frame]) -> str:
    """The reason in a BYE message, as text for ``PeerGone``."""
    with contextlib.suppress(ProtocolError):
        reason = decode_body(_body_frame(frames)).get("reason")
        if isinstance(reason, str) and reason:
            return f"the peer closed: {reason}"
    return "the peer closed"
