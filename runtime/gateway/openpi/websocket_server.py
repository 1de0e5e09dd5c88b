"""Accepts websockets; each has a thread."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable

from websockets.frames import CloseCode

from runtime.gateway.openpi.websocket_connection import (
    CLOSE_S,
    CheckRequest,
    HandshakeFailed,
    WebsocketConnection,
)

logger = logging.getLogger(__name__)

PING_EVERY_S = 20.0
"""A ping that is not answered ends no connection: a client that computes may not answer."""
LOOK_EVERY_S = 2.0
"""How often pings are answered or sent."""
SILENT_S = 60.0
"""How long a client's host may acknowledge nothing before the connection ends."""
SEND_WITHIN_S = 1
"""How long a part of a reply may wait for a client that does not read, while it fills a socket."""
CLIENT_THREAD = "openpi client"


class WebsocketServer:
    """A TCP listener for websockets.

    Args:
        host, port: Where it listens; port 0 chooses a free one.
        max_connections: More sockets are closed at once.
        max_bytes: The size of the largest message.
        check: As in ``WebsocketConnection.shake_hands``.
        handle: Called in the connection's thread with the connection and its path. The connection
            is closed when it returns.

    Attributes:
        port: The TCP port that it listens on.

    Raises:
        OSError: The address cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        max_connections: int,
        max_bytes: int,
        check: CheckRequest,
        handle: Callable[[WebsocketConnection, str], None],
    ) -> None:
        self._check, self._handle, self._max_bytes = check, handle, max_bytes
        self._free = threading.BoundedSemaphore(max_connections)
        self._connections: dict[WebsocketConnection, threading.Thread] = {}
        self._lock = threading.Lock()  # of ``_connections``
        self._quiet = logging.getLogger(f"{__name__}.websockets")
        self._quiet.setLevel(logging.WARNING)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._stopped, self._stopper = socket.socketpair()  # safe to use in a signal handler
        self._stopper.setblocking(False)

    def serve(self) -> None:
        """Accept clients until ``stop``.

        Raises:
            RuntimeError: It can accept no more clients, e.g. for want of descriptors.
        """
        look_at_s = time.monotonic() + LOOK_EVERY_S
        try:
            with selectors.DefaultSelector() as ready:
                ready.register(self._listener, selectors.EVENT_READ)
                ready.register(self._stopped, selectors.EVENT_READ)
                while True:
                    events = ready.select(max(0.0, look_at_s - time.monotonic()))
                    found = {key.fileobj for key, _ in events}
                    if self._stopped in found:
                        return
                    if self._listener in found:
                        self._accept()
                    if time.monotonic() >= look_at_s:
                        self._keep_all_alive()
                        look_at_s = time.monotonic() + LOOK_EVERY_S
        except (OSError, ValueError) as error:  # the latter: its socket is closed
            raise RuntimeError(f"cannot accept clients any more: {error}") from error

    def stop(self) -> None:
        """Make ``serve`` return soon. For a signal handler or another thread. Idempotent."""
        with contextlib.suppress(OSError):  # stopped before, or closed
            self._stopper.send(b"x")

    def close(self, reason: str) -> None:
        """End all connections and free the address. Call it after ``serve``. Idempotent.

        What ``handle`` does at the time is waited for.

        Args:
            reason: Is sent to the clients.
        """
        self._listener.close()
        with self._lock:
            connections = dict(self._connections)
        until_s = time.monotonic() + CLOSE_S
        for connection in connections:
            left_s = max(0.0, until_s - time.monotonic())
            connection.announce_close(CloseCode.GOING_AWAY, reason, left_s)
        for thread in connections.values():
            thread.join(max(0.0, until_s - time.monotonic()))
        for connection in connections:
            connection.abort()
        for thread in connections.values():
            thread.join()
        self._stopped.close()
        self._stopper.close()

    # Internal

    def _accept(self) -> None:
        """Start a thread for the next client, if there are not too many."""
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # it has gone already
            return
        if not self._free.acquire(blocking=False):
            client.close()
            return
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(SILENT_S * 1000))
            wait = struct.pack("ll", SEND_WITHIN_S, 0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
            connection = WebsocketConnection(client, self._max_bytes, self._quiet)
        except OSError:  # it has gone already
            client.close()
            self._free.release()
            return
        thread = threading.Thread(target=self._serve, args=(connection,), name=CLIENT_THREAD)
        with self._lock:  # its end waits for its beginning
            thread.start()
            self._connections[connection] = thread

    def _serve(self, connection: WebsocketConnection) -> None:
        code = CloseCode.INTERNAL_ERROR
        try:
            path = connection.shake_hands(self._check)
            self._handle(connection, path)
            code = CloseCode.NORMAL_CLOSURE
        except HandshakeFailed as error:
            logger.debug("%s: %s", connection.peer, error)
        finally:
            connection.close(code)
            with self._lock:
                del self._connections[connection]
            self._free.release()

    def _keep_all_alive(self) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.keep_alive(PING_EVERY_S)
