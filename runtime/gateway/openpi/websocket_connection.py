"""A websocket over a blocking socket, which one thread uses.

The library's protocol parses and writes the frames; it does no I/O of its own. A thread that both
reads and answers saves a client two wake-ups per request, which the library's own connection needs.
What arrives while a request is computed is read by ``keep_alive``, so pings are answered.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from logging import Logger

from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import Event, State

from runtime.gateway.openpi.payload_reader import PayloadProtocol

HANDSHAKE_S, CLOSE_S = 5.0, 1.0
RECEIVE_BYTES = 64 * 1024
"""Most bytes of a read, but for the payload of a large frame."""
LOOK_BYTES = 4096
"""Most bytes that are read while a request is computed. The answers to that many bytes of pings do
not fill a socket."""

CheckRequest = Callable[["WebsocketConnection", Request], Response | None]


class HandshakeFailed(Exception):
    """The client did not become a websocket: it left, was too slow, or got an HTTP error."""


class WebsocketConnection:
    """The server's side of a websocket, without compression.

    One thread calls ``shake_hands``, ``receive``, ``send`` and ``close``. ``keep_alive``,
    ``announce_close`` and ``abort`` are for others.

    Args:
        client: A connected socket. It is closed by ``close``.
        max_bytes: The size of the largest message.
        logger: The protocol's.

    Attributes:
        peer: The client's address.
    """

    def __init__(self, client: socket.socket, max_bytes: int, logger: Logger) -> None:
        self._socket = client
        self.peer: tuple[str, int] = client.getpeername()[:2]
        self._protocol = PayloadProtocol(max_size=max_bytes, logger=logger)
        self._lock = threading.Lock()  # of the protocol, and of what is written to the socket
        self._messages: deque[str | bytes] = deque()
        self._text, self._parts = False, bytearray()  # of a message in fragments
        self._computing = False
        self._close_at_s: float | None = None
        self._pinged_s = time.monotonic()

    def shake_hands(self, check: CheckRequest) -> str:
        """Make the socket a websocket; return the path that the client asked for.

        Args:
            check: Returns the answer to a request that is not to become a websocket, or None.

        Raises:
            HandshakeFailed: The client is no websocket. It got the answer that there is for it.
        """
        deadline_s = time.monotonic() + HANDSHAKE_S
        protocol = self._protocol
        try:
            while not (events := protocol.events_received()):
                self._wait_until(deadline_s)
                self._feed_protocol(self._receive(0))
                self._flush()
                if protocol.handshake_exc is not None:
                    raise HandshakeFailed(str(protocol.handshake_exc))
            request = events[0]
            if not isinstance(request, Request):
                raise HandshakeFailed(f"got {request}, expected an HTTP request")
            response = check(self, request) or protocol.accept(request)
            protocol.send_response(response)
            self._flush()
        except OSError as error:
            raise HandshakeFailed(str(error)) from error
        if protocol.state is not State.OPEN:
            raise HandshakeFailed(f"HTTP status {response.status_code}")
        self._socket.settimeout(None)
        self._take(events[1:])
        return request.path

    def respond(self, status: int, text: str) -> Response:
        """Return an HTTP response that refuses a request, for ``check`` of ``shake_hands``."""
        return self._protocol.reject(status, text)

    def receive(self) -> str | bytes:
        """Wait for the next message; text where it is a text frame.

        Raises:
            ConnectionClosed: The connection has ended, by whichever side.
        """
        with self._lock:
            self._computing = False
        while not self._messages:
            self._require_open()
            data = self._read()
            with self._lock:
                self._feed(data)
        with self._lock:
            self._computing = True
        return self._messages.popleft()

    def send(self, message: str | bytes) -> None:
        """Send a message; text as a text frame.

        Raises:
            ConnectionClosed: The connection has ended, or the client does not read.
        """
        with self._lock:
            if self._protocol.state is State.OPEN:
                if isinstance(message, str):
                    self._protocol.send_text(message.encode())
                else:
                    self._protocol.send_binary(message)
                try:
                    self._flush()
                    return
                except OSError:
                    self._protocol.receive_eof()
        self._finish()
        raise self._protocol.close_exc

    def close(self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = "") -> None:
        """Say that the connection ends, wait shortly for the client to say so, too, and close."""
        try:
            self.announce_close(code, reason, CLOSE_S)
            if self._protocol.close_expected():
                self._finish()
        finally:
            with self._lock:  # nobody reads another's socket
                self._computing = False
                self._socket.close()

    # For other threads

    def keep_alive(self, ping_every_s: float) -> None:
        """Answer the pings of a client whose request is computed; else send one if it is time.

        Never waits for the client, nor for its thread.
        """
        if not self._lock.acquire(blocking=False):
            return  # it is being sent to, or read
        try:
            if self._protocol.state is not State.OPEN or not self._writable():
                return
            now_s = time.monotonic()
            if self._computing:
                self._read_arrived()
            elif now_s - self._pinged_s >= ping_every_s:
                self._pinged_s = now_s
                self._protocol.send_ping(b"")
                self._flush()
        except OSError:
            self._protocol.receive_eof()
            self.abort()
        finally:
            self._lock.release()

    def announce_close(self, code: int, reason: str, within_s: float) -> None:
        """Send the client that the connection ends, if that is possible in time. Idempotent."""
        if not self._lock.acquire(timeout=within_s):
            return  # it is being sent to, and does not read
        try:
            if self._protocol.state is State.OPEN and self._socket.fileno() >= 0:
                self._protocol.send_close(code, reason)
                self._set_deadline()
                with contextlib.suppress(OSError):
                    self._flush()
        finally:
            self._lock.release()

    def abort(self) -> None:
        """End the connection at once. Its thread gets ``ConnectionClosed``."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    # Internal

    def _read(self) -> bytes | None:
        """Wait for what arrives next; return what ``_feed`` needs of it, None at the end."""
        try:
            if self._close_at_s is not None:
                self._wait_until(self._close_at_s)
            return self._receive(0)
        except OSError:
            return None

    def _receive(self, flags: int, most: int = RECEIVE_BYTES) -> bytes | None:
        """Return what arrives next, but for what belongs to a large payload: that is put there."""
        reader = self._protocol.reader
        if not reader.missing:
            return self._socket.recv(most, flags) or None
        count = self._socket.recv_into(reader.missing, 0, flags)
        reader.written(count)
        return b"" if count else None

    def _read_arrived(self) -> None:
        """Read some of what has arrived, unless it has a message already. The lock is held."""
        if not self._messages:
            with contextlib.suppress(BlockingIOError):
                self._feed(self._receive(socket.MSG_DONTWAIT, LOOK_BYTES))

    def _writable(self) -> bool:
        """Whether a few KiB can be sent without waiting for the client."""
        if self._socket.fileno() < 0:
            return False
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        return bool(poller.poll(0))

    def _feed(self, data: bytes | None) -> None:
        """Give the protocol what was read, None at the end, and send what it answers.

        The lock is held.
        """
        self._feed_protocol(data)
        try:
            self._flush()
        except OSError:
            self._protocol.receive_eof()
        self._take(self._protocol.events_received())
        if self._protocol.close_expected():
            self._set_deadline()

    def _feed_protocol(self, data: bytes | None) -> None:
        if self._protocol.state is State.CLOSED:
            return
        if data is not None:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()

    def _take(self, events: Iterable[Event]) -> None:
        """Keep the messages among ``events``. The protocol has checked sizes and order."""
        for event in events:
            if not isinstance(event, Frame):
                continue
            if event.opcode is Opcode.TEXT or event.opcode is Opcode.BINARY:
                self._text = event.opcode is Opcode.TEXT
                if event.fin:
                    self._keep(event.data)
                else:
                    self._parts[:] = event.data
            elif event.opcode is Opcode.CONT:
                self._parts += event.data
                if event.fin:
                    self._keep(bytes(self._parts))
                    self._parts.clear()

    def _keep(self, data: bytes | bytearray | memoryview) -> None:
        whole = data if type(data) is bytes else bytes(data)
        self._messages.append(whole.decode(errors="replace") if self._text else whole)

    def _flush(self) -> None:
        """Send what the protocol has to send. The lock is held."""
        for data in self._protocol.data_to_send():
            if data:
                self._socket.sendall(data)
            else:
                with contextlib.suppress(OSError):  # the client has closed
                    self._socket.shutdown(socket.SHUT_WR)

    def _require_open(self) -> None:
        if self._protocol.state is State.CLOSED:
            raise self._protocol.close_exc

    def _finish(self) -> None:
        """Read until the client has closed, for at most ``CLOSE_S``."""
        with self._lock:
            self._computing = False
            self._set_deadline()
        with contextlib.suppress(ConnectionClosed):
            while True:
                self._messages.clear()
                self._require_open()
                data = self._read()
                with self._lock:
                    self._feed(data)

    def _set_deadline(self) -> None:
        if self._close_at_s is None:
            self._close_at_s = time.monotonic() + CLOSE_S

    def _wait_until(self, deadline_s: float) -> None:
        """Let the socket's calls wait until then.

        Raises:
            TimeoutError: It is too late.
        """
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left_s)
