"""A thread that watches a server's connections and cuts one whose message never ends.

ZMQ bounds the frames of a message, not their number, and hands a message on when its last frame is
there. A client whose message never ends would fill the memory of a server that sees nothing of it.
But the kernel counts the bytes that each connection received, and the server those that were handed
on. The difference is what ZMQ holds. A thread compares them, because the serving thread may be busy
for long. Rejected: speaking ZMQ's protocol without libzmq, as a gateway does. It has no encryption
then, and nothing answers heartbeats during a long inference.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from transport.base_channel import SLOTS
from transport.handshake_messages import MAX_CONTROL_BYTES
from transport.zeromq.client_socket import FAILURES, HEADER_ROOM, has_input, make_fd_poll

CHECK_EVERY_S = 0.02
"""How often open connections are checked. ZMQ may hold what arrives meanwhile beyond the limit."""
QUIET_CHECK_EVERY_S = 0.16
"""The same while little arrives: a server that waits is to need next to no processor time."""
_QUIET_BYTES = 65536
"""Fewer than these between two checks, on all connections, are little."""
CONTROL_BYTES = 16 * MAX_CONTROL_BYTES
"""Bytes of one connection that ZMQ may hold beside the messages of its session."""
FRAME_BYTES = 48
"""At least what a frame costs beside its content, with encryption."""
_HEARTBEAT_BYTES_PER_S = 128
"""At least what heartbeats send, with encryption. They are never handed on."""
_BYTES_RECEIVED = struct.Struct("<128xQ")
"""``tcpi_bytes_received`` in Linux's ``struct tcp_info``."""
_EVENTS = zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED | zmq.Event.MONITOR_STOPPED | FAILURES


class Connection:
    """One connection of a client to ``port``. ZMQ owns its descriptor and may close it at any time.

    The number of the descriptor may then be another connection's, or another file's. Only the inode
    shows which it is.

    Attributes:
        handed_on: Bytes that were handed on, or more. Only the serving thread writes it.
        limit: Bytes that ZMQ may hold.
        closed: Whether it was found closed.

    Raises:
        OSError: It is closed already.
    """

    __slots__ = (
        "_checked_s",
        "_fd",
        "_ignored",
        "_inode",
        "_received",
        "closed",
        "handed_on",
        "limit",
    )

    def __init__(self, fd: int, port: int) -> None:
        self._fd, self.handed_on, self.limit, self.closed = fd, 0, CONTROL_BYTES, False
        self._ignored, self._checked_s, self._received = 0.0, time.monotonic(), 0
        self._inode = os.fstat(fd).st_ino
        if self._call(socket.socket.getsockname)[1:2] != (port,) or not self.open:
            raise OSError(errno.EBADF, f"descriptor {fd} is no longer a client's")

    @property
    def open(self) -> bool:
        """Whether the descriptor is still this connection's."""
        try:
            return os.fstat(self._fd).st_ino == self._inode
        except OSError:
            return False

    def check(self) -> int:
        """Shut the connection down if ZMQ holds too much of it.

        Returns:
            Bytes that arrived since the last check.

        Raises:
            OSError: It is closed, or the kernel does not count, or no descriptor is free.
        """
        # The serving thread may hand on any number of bytes between two of these lines.
        handed_on_before = self.handed_on
        received = self._bytes_received()
        handed_on_after = self.handed_on
        now_s = time.monotonic()
        heartbeats = _HEARTBEAT_BYTES_PER_S * (now_s - self._checked_s)
        self._ignored = min(self._ignored + heartbeats, received - handed_on_before)
        self._checked_s = now_s
        if received - handed_on_after - self._ignored > self.limit:
            self._cut()
        arrived, self._received = received - self._received, received
        return arrived

    def _bytes_received(self) -> int:
        info: bytes = self._call(
            lambda each: each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
        )
        if len(info) < _BYTES_RECEIVED.size:
            raise OSError("struct tcp_info has no tcpi_bytes_received")
        received: int = _BYTES_RECEIVED.unpack(info)[0]
        return received

    def _cut(self) -> None:
        # A duplicate stays this connection's whatever ZMQ does meanwhile.
        with socket.socket(fileno=os.dup(self._fd)) as own:
            if os.fstat(own.fileno()).st_ino == self._inode:
                own.shutdown(socket.SHUT_RDWR)

    def _call(self, function: Callable[[socket.socket], Any]) -> Any:
        # IPv6's addresses are the longer ones, so both families' fit.
        borrowed = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 0, self._fd)
        try:
            return function(borrowed)
        finally:
            borrowed.detach()


class ConnectionMonitor:
    """Watches the connections of ``server_socket`` from ``start`` to ``stop``.

    Attributes:
        fd: Descriptor of an eventfd that is readable while ``take_counts`` has counts, from
            ``start`` on.
    """

    def __init__(self, server_socket: zmq.Socket[bytes]) -> None:
        self._server_socket = server_socket
        self._events: zmq.Socket[bytes] = server_socket.get_monitor_socket(_EVENTS)
        self.fd, self._port = -1, 0
        self._thread = threading.Thread(target=self._run, name="zmq-connections", daemon=True)
        self._lock = threading.Lock()
        self._by_fd: dict[int, Connection] = {}
        self._by_identity: dict[bytes, Connection] = {}
        self._lost = self._failed = 0
        self._every_s = CHECK_EVERY_S

    def start(self, port: int) -> None:
        """Open ``fd`` and start the thread. ``server_socket`` is bound to ``port``."""
        self._port = port
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close ``fd``. The monitor cannot be started again."""
        self._server_socket.disable_monitor()  # reported as MONITOR_STOPPED
        self._thread.join()
        os.close(self.fd)

    # --- for the serving thread

    def count(self, identity: bytes, frame: zmq.Frame, nbytes: int) -> None:
        """Count a message that was handed on, with ``FRAME_BYTES`` for each of its frames.

        Args:
            frame: Any of its frames.
        """
        connection = self._by_identity.get(identity)
        if connection is None or connection.closed:
            connection = self._identify(identity, frame)
            if connection is None:
                return
        connection.handed_on += nbytes

    def allow(self, identity: bytes, message_bytes: int) -> None:
        """Let ZMQ hold a session's messages, of at most ``message_bytes`` each."""
        connection = self._by_identity.get(identity)
        if connection is not None:
            connection.limit = CONTROL_BYTES + SLOTS * (message_bytes + HEADER_ROOM)

    def take_counts(self) -> tuple[int, int]:
        """Return (lost connections, failed ZMQ handshakes) since the last call."""
        with self._lock:
            lost, failed = self._lost, self._failed
            self._lost = self._failed = 0
            if lost or failed:
                os.eventfd_read(self.fd)
        if lost:
            open_ones = {name: one for name, one in self._by_identity.items() if not one.closed}
            self._by_identity = open_ones
        return lost, failed

    def _identify(self, identity: bytes, frame: zmq.Frame) -> Connection | None:
        """Find the connection that ``frame`` came from; None if it is closed."""
        try:
            connection = self._connection(int(frame.get(zmq.SRCFD)))
        except (OSError, zmq.ZMQError):
            return None
        self._by_identity[identity] = connection
        return connection

    # --- for either

    def _connection(self, fd: int) -> Connection:
        """The connection with this descriptor. Raises ``OSError`` if it is closed."""
        with self._lock:
            connection = self._by_fd.get(fd)
            if connection is None or not connection.open:
                self._forget(fd)
                connection = self._by_fd[fd] = Connection(fd, self._port)
            return connection

    # --- the thread

    def _run(self) -> None:
        poll = make_fd_poll(self._events)
        checked_s = time.monotonic()
        while True:
            poll.poll(self._every_s * 1000 if self._by_fd else None)
            while has_input(self._events):
                report = recv_monitor_message(self._events, zmq.DONTWAIT)
                if report["event"] == zmq.Event.MONITOR_STOPPED:
                    return
                self._handle(report["event"], report["value"])
            if time.monotonic() >= checked_s + self._every_s:
                quiet = self._check_all() < _QUIET_BYTES
                self._every_s = (
                    min(2 * self._every_s, QUIET_CHECK_EVERY_S) if quiet else CHECK_EVERY_S
                )
                checked_s = time.monotonic()

    def _handle(self, event: int, value: int) -> None:
        if event == zmq.Event.ACCEPTED:
            self._every_s = CHECK_EVERY_S
            try:
                self._connection(value)
            except OSError:  # closed again
                return
        elif event == zmq.Event.DISCONNECTED:
            # ``_check_all`` forgets it: the number may be the next connection's by now.
            with self._lock:
                self._lost += 1
                os.eventfd_write(self.fd, 1)
        else:
            with self._lock:
                self._failed += 1
                os.eventfd_write(self.fd, 1)

    def _check_all(self) -> int:
        """Check every connection; return how many bytes arrived since the last time."""
        arrived = 0
        for fd, connection in list(self._by_fd.items()):
            if connection.open:
                with contextlib.suppress(OSError):  # the next check repeats it
                    arrived += connection.check()
                continue
            with self._lock:
                if self._by_fd.get(fd) is connection:
                    self._forget(fd)
        return arrived

    def _forget(self, fd: int) -> None:
        connection = self._by_fd.pop(fd, None)
        if connection is not None:
            connection.closed = True
