"""Accepts TCP clients, each with a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from runtime.gateway.client_log import ClientLog
from transport.address import bare_host, format_address, resolve

CLOSE_S = 2.0
"""How long ``close`` waits for requests that are being computed."""
ACCEPT_AGAIN_S = 0.1
"""Pause after a failed accept, for which the system had no descriptor or memory."""


class ClientThread(threading.Thread):
    """Serves one connection."""

    def cut(self) -> None:
        """End the connection, and so the thread soon. For another thread. Idempotent."""
        raise NotImplementedError


Client = TypeVar("Client", bound=ClientThread)


class ClientListener(Generic[Client]):
    """A TCP listener that starts a thread for each client.

    Args:
        host, port: Where it listens; port 0 chooses a free one.
        make_client: Called with a connection and the client's address; returns the thread to
            start, or None where the client is refused. It may raise ``OSError``: the client left.
        log: For what goes wrong with a client.
        prefix: Of a client's address in the log.
        backlog: Connections that may wait to be accepted; None for the system's default.

    Attributes:
        port: The TCP port that it listens on.
        clients: Those whose threads may still run, the oldest first.

    Raises:
        OSError: The address is taken or not this machine's.
        TransportError: The host's name is unknown.
    """

    def __init__(
        self,
        host: str,
        port: int,
        make_client: Callable[[socket.socket, str], Client | None],
        log: ClientLog,
        *,
        prefix: str = "",
        backlog: int | None = None,
    ) -> None:
        self._make_client, self._log, self._prefix = make_client, log, prefix
        self.clients: list[Client] = []
        numeric, ipv6 = resolve(bare_host(host), port, listening=True)
        self._listener = socket.create_server(
            (numeric, port), family=socket.AF_INET6 if ipv6 else socket.AF_INET, backlog=backlog
        )
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)

    def serve(self) -> None:
        """Accept clients until ``stop``."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._woken in ready:
                    return
                self._accept()

    def stop(self) -> None:
        """Make ``serve`` return. For a signal handler or another thread. Idempotent."""
        with contextlib.suppress(OSError):  # closed, or stopped very often
            self._wake.send(b"\0")

    def close(self) -> None:
        """End all connections and free the address. Call it after ``serve``. Idempotent.

        A thread whose request is not answered within ``CLOSE_S`` ends with its reply, or with the
        process.
        """
        self.stop()
        self._listener.close()
        for client in self.clients:
            client.cut()
        deadline_s = time.monotonic() + CLOSE_S
        for client in self.clients:
            client.join(max(0.0, deadline_s - time.monotonic()))
        self.clients.clear()
        self._wake.close()
        self._woken.close()

    def _accept(self) -> None:
        try:
            connected, peer = self._listener.accept()
        except BlockingIOError:
            return  # it left again
        except OSError as error:
            self._log.write(logging.WARNING, f"a client could not be accepted: {error}")
            time.sleep(ACCEPT_AGAIN_S)
            return
        address = format_address(*peer[:2])
        name = f"{self._prefix}{address}"
        self.clients = [client for client in self.clients if client.is_alive()]
        try:
            client = self._make_client(connected, address)
        except OSError as error:
            self._log.write(logging.INFO, f"{name}: left at once: {error}")
            client = None
        if client is None:
            connected.close()
            return
        try:
            client.start()
        except RuntimeError as error:  # the system has no thread for it
            self._log.write(logging.WARNING, f"{name}: refused: {error}")
            connected.close()
            return
        self.clients.append(client)
