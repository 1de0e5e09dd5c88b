"""The actor that runs a policy server on a node of the cluster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import RuntimeFault
from runtime.server.server_process import ServerProcess

POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class ServerPlace:
    """A server that is ready.

    Attributes:
        address: ``HOST:PORT``, reachable from every node.
    """

    address: str


class PolicyServerActor:
    """A policy server in a child process, which ends with the actor.

    Args:
        flags: The server's command line without host and port.
    """

    def __init__(self, flags: Sequence[str]) -> None:
        self._flags = list(flags)
        self._server: ServerProcess | None = None

    def start(self) -> ServerPlace | str:
        """Start the server and wait until it is ready; return why not if it does not start."""
        import ray

        host = ray.util.get_node_ip_address()
        try:
            self._server = ServerProcess([*self._flags, "--host", host, "--insecure"])
        except RuntimeFault as error:
            return str(error)
        return ServerPlace(self._server.address)

    def wait(self) -> str:
        """Return how the server ended, once it has."""
        while self._server is not None and self._server.alive:
            time.sleep(POLL_S)
        return "" if self._server is None else self._server.status
