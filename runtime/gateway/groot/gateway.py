"""Serves the clients of NVIDIA Isaac GR00T: ZMQ, MessagePack, ``.npy`` arrays."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time

from policies.types import PolicyContract
from runtime.gateway.client_log import ClientLog
from runtime.gateway.config import GatewayCommand
from runtime.gateway.groot.client import GrootClient, GrootRequests
from runtime.gateway.groot.modalities import GrootModalities
from runtime.gateway.groot.zmtp import ZmtpConnection
from runtime.options.api_keys import ApiKeys
from runtime.options.observation_keys import ObservationKeys
from transport.address import bare_host, format_address, resolve

logger = logging.getLogger(__name__)

ROOM_BYTES = 16 * 1024**2
"""Room for pictures that the policy does not take, which are answered with what was expected."""
MORE_CONNECTIONS = 16
"""Connections beyond ``max_clients``, for clients that are told that there is no place."""
UNUSED_S = 5.0
"""How old a connection without a place is when it may be closed for a new one."""
CLOSE_S = 2.0
"""How long ``close`` waits for requests that are being computed."""
ACCEPT_AGAIN_S = 0.1
"""Pause after a failed accept, for which the system had no descriptor or memory."""


class GrootGateway:
    """Listens for GR00T's clients; see ``runtime.gateway.cli.Gateway``.

    Endpoints: ``get_action``, ``reset``, ``ping``, ``get_modality_config``; there is no ``kill``.
    Each connection is one session, which ends with it; an idle one is kept. Whatever is wrong with
    a request is answered ``{"error": text}``, also where it is too long.

    A connection beyond ``MORE_CONNECTIONS`` is closed before it sends anything: a ZMQ client keeps
    its request, and tries again until it is accepted. So that peers that say nothing keep nobody
    out, the oldest connection without a place makes room for it.

    Args:
        command: Where to listen, the server, and how many clients there may be.
        keys: The observations' keys; see ``GrootModalities``.
        api_keys: Keys of which each request must have one as ``api_token``; None for no keys.
        contract: The served policy's.

    Raises:
        InvalidConfig: ``keys`` does not fit the contract.
        OSError: The address is taken or not this machine's.
        TransportError: The host's name is unknown.
    """

    def __init__(
        self,
        command: GatewayCommand,
        keys: ObservationKeys,
        api_keys: ApiKeys | None,
        contract: PolicyContract,
    ) -> None:
        self._command, self._api_keys = command, api_keys
        self._modalities = GrootModalities(contract, keys)
        self._max_bytes = max_request_bytes(contract)
        self._places = threading.Semaphore(command.max_clients)
        self._clients: list[GrootClient] = []
        self._log = ClientLog(logger)
        host, ipv6 = resolve(bare_host(command.host), command.port or 0, listening=True)
        self._listener = socket.create_server(
            (host, command.port or 0), family=socket.AF_INET6 if ipv6 else socket.AF_INET
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
        """End all sessions and free the address. Call it after ``serve``. Idempotent.

        A session whose request is not answered within ``CLOSE_S`` ends with its reply, or with the
        process.
        """
        self.stop()
        self._listener.close()
        for client in self._clients:
            client.cut()
        deadline_s = time.monotonic() + CLOSE_S
        for client in self._clients:
            client.join(max(0.0, deadline_s - time.monotonic()))
        self._clients.clear()
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
        name = f"groot {format_address(*peer[:2])}"
        self._clients = [client for client in self._clients if client.is_alive()]
        if len(self._clients) >= self._command.max_clients + MORE_CONNECTIONS:
            connected.close()
            self._make_room()
            return
        try:
            connection = ZmtpConnection(connected, self._max_bytes)
        except OSError as error:
            self._log.write(logging.INFO, f"{name}: left at once: {error}")
            connected.close()
            return
        requests = GrootRequests(
            self._command, name, self._api_keys, self._modalities, self._places, log=self._log
        )
        client = GrootClient(connection, requests, name, self._log)
        try:
            client.start()
        except RuntimeError as error:  # the system has no thread for it
            self._log.write(logging.WARNING, f"{name}: refused: {error}")
            connection.close()
            return
        self._clients.append(client)

    def _make_room(self) -> None:
        """End the oldest connection without a place, if it is not too new."""
        before_s = time.monotonic() - UNUSED_S
        unused = (one for one in self._clients if not one.has_place and one.accepted_s < before_s)
        client = next(unused, None)
        if client is not None:
            self._log.write(logging.INFO, f"{client.name}: makes room for another client")
            client.cut()


def max_request_bytes(contract: PolicyContract) -> int:
    """Return the longest request in bytes: some times what the policy needs, and room."""
    pixels = sum(max(h * w for h, w in camera.accepted_hw) for camera in contract.cameras)
    return 4 * (3 * pixels + 8 * contract.state_dim) + ROOM_BYTES
