"""Serves the clients of NVIDIA Isaac GR00T: ZMQ, MessagePack, ``.npy`` arrays."""

from __future__ import annotations

import logging
import socket
import threading
import time

from policies.types import PolicyContract
from runtime.gateway.client_listener import ClientListener
from runtime.gateway.client_log import ClientLog
from runtime.gateway.config import GatewayCommand
from runtime.gateway.groot.client import GrootClient, GrootRequests
from runtime.gateway.groot.modalities import GrootModalities
from runtime.gateway.groot.zmtp import ZmtpConnection
from runtime.options.api_keys import ApiKeys
from runtime.options.observation_keys import ObservationKeys

logger = logging.getLogger(__name__)

ROOM_BYTES = 16 * 1024**2
"""Room for pictures that the policy does not take, which are answered with what was expected."""
MORE_CONNECTIONS = 16
"""Connections beyond ``max_clients``, for clients that are told that there is no place."""
UNUSED_S = 5.0
"""How old a connection without a place is when it may be closed for a new one."""


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
        self._log = ClientLog(logger)
        self._listener = ClientListener(
            command.host, command.port or 0, self._make_client, self._log, prefix="groot "
        )
        self.port = self._listener.port

    def serve(self) -> None:
        """Accept clients until ``stop``."""
        self._listener.serve()

    def stop(self) -> None:
        """Make ``serve`` return. For a signal handler or another thread. Idempotent."""
        self._listener.stop()

    def close(self) -> None:
        """End all sessions and free the address. As ``ClientListener.close``."""
        self._listener.close()

    def _make_client(self, connected: socket.socket, address: str) -> GrootClient | None:
        if len(self._listener.clients) >= self._command.max_clients + MORE_CONNECTIONS:
            self._make_room()
            return None
        name = f"groot {address}"
        connection = ZmtpConnection(connected, self._max_bytes)
        requests = GrootRequests(
            self._command, name, self._api_keys, self._modalities, self._places, log=self._log
        )
        return GrootClient(connection, requests, name, self._log)

    def _make_room(self) -> None:
        """End the oldest connection without a place, if it is not too new."""
        before_s = time.monotonic() - UNUSED_S
        clients = self._listener.clients
        unused = (one for one in clients if not one.has_place and one.accepted_s < before_s)
        client = next(unused, None)
        if client is not None:
            self._log.write(logging.INFO, f"{client.name}: makes room for another client")
            client.cut()


def max_request_bytes(contract: PolicyContract) -> int:
    """Return the longest request in bytes: some times what the policy needs, and room."""
    pixels = sum(max(h * w for h, w in camera.accepted_hw) for camera in contract.cameras)
    return 4 * (3 * pixels + 8 * contract.state_dim) + ROOM_BYTES
