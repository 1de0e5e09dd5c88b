"""A gateway that goes on when the server is started again with another policy.

The server's description is read every ``WATCH_EVERY_S``. A policy that fits what clients send and
get needs nothing. For another one the gateway is made again on the same port: its clients'
connections end, and those that connect from then on are served. If it cannot be made for that
policy, e.g. because the map does not fit, the old one stays and its sessions are refused.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Protocol

from policies.errors import ContractMismatch, PolicyError
from policies.types import PolicyContract
from policies.yaml_config import InvalidConfig
from runtime.errors import RuntimeFault
from runtime.gateway.config import GatewayCommand
from runtime.gateway.gateway_session import require_same_policy
from runtime.protocol import messages
from transport.address import parse_address
from transport.dialer import Dialer
from transport.errors import TransportError
from transport.zeromq.curve import KeyFileError

logger = logging.getLogger(__name__)

WATCH_EVERY_S = 1.0
"""How often the server is asked which policy it has."""
ANSWER_S = 0.5
"""How long it may take to answer; ``close`` waits no longer than this."""


class Gateway(Protocol):
    """A listener for the clients of one foreign protocol.

    The constructor takes ``(command, keys, api_keys, contract)`` and listens on the command's port.
    It raises ``InvalidConfig`` if ``keys`` does not fit the contract or the protocol
    cannot serve the policy, and ``OSError`` if the address is taken.

    Attributes:
        port: The TCP port that it listens on.
    """

    port: int

    def serve(self) -> None:
        """Serve clients until ``stop``."""
        ...

    def stop(self) -> None:
        """Make ``serve`` return soon. For a signal handler or another thread. Idempotent."""
        ...

    def close(self) -> None:
        """End all sessions and free the address. Call it after ``serve``. Idempotent."""
        ...


MakeGateway = Callable[[GatewayCommand, PolicyContract], Gateway]


class RenewingGateway:
    """A ``Gateway`` that is made again when the server has another policy.

    Args:
        command: Address and server.
        contract, episode_state: The served policy's.
        make: Makes the gateway for a policy; raises as ``Gateway``'s constructor.

    Attributes:
        port: The TCP port that it listens on, also after it was made again.

    Raises:
        Exception: What ``make`` raises.
    """

    def __init__(
        self,
        command: GatewayCommand,
        contract: PolicyContract,
        episode_state: bool,
        make: MakeGateway,
    ) -> None:
        self._make = make
        self._gateway = make(command, contract)
        self.port = self._gateway.port
        self._command = dataclasses.replace(command, port=self.port)
        self._served = (contract, episode_state)
        self._refused: tuple[PolicyContract, bool] | None = None
        self._next: PolicyContract | None = None
        self._stopped = False
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._watch_server, name="policy watch")

    def serve(self) -> None:
        """Serve clients until ``stop``.

        Raises:
            OSError: The port was taken between the end of the old gateway and the new one's start.
        """
        self._watch.start()
        while not self._stopped:
            contract, self._next = self._next, None
            if contract is not None:
                self._gateway.close()
                self._gateway = self._make(self._command, contract)
                continue  # there may have been a ``stop`` in between
            self._gateway.serve()
            if self._next is None:
                return

    def stop(self) -> None:
        """Make ``serve`` return soon. For a signal handler or another thread. Idempotent."""
        self._stopped = True
        self._gateway.stop()

    def close(self) -> None:
        """End all sessions and free the address. Call it after ``serve``. Idempotent."""
        self._ended.set()
        if self._watch.ident is not None:
            self._watch.join()
        self._gateway.close()

    def _watch_server(self) -> None:
        with Dialer(
            *parse_address(self._command.server),
            timeout_s=ANSWER_S,
            curve=self._command.connection.keys(),
        ) as dialer:
            while not self._ended.wait(WATCH_EVERY_S):
                try:
                    description = dialer.describe()
                    contract, _ = messages.read_description(description)
                except (TransportError, PolicyError):
                    continue  # it is not there, or it is no server; its clients are told
                self._compare(contract, description.get("episode_state") is not False)

    def _compare(self, contract: PolicyContract, episode_state: bool) -> None:
        """Have the gateway made again if the server's policy needs it and it can be served."""
        found = (contract, episode_state)
        difference = _difference(found, self._served)
        if not difference:
            self._refused = None
        if not difference or found == self._refused:
            return
        try:
            self._make(dataclasses.replace(self._command, port=0), contract).close()
        except (InvalidConfig, OSError, ValueError, PolicyError, RuntimeFault) as error:
            self._refuse(found, difference, error)
        except (TransportError, KeyFileError) as error:  # e.g. it is gone again
            logger.info("the server's new policy cannot be tried: %s", error)
        else:
            logger.warning("%s: all clients are disconnected; new ones are served", difference)
            self._served, self._refused, self._next = found, None, contract
            self._gateway.stop()

    def _refuse(
        self, found: tuple[PolicyContract, bool], difference: str, error: Exception
    ) -> None:
        self._refused = found
        logger.error("%s; it cannot be served (%s): clients are refused", difference, error)


def _difference(found: tuple[PolicyContract, bool], served: tuple[PolicyContract, bool]) -> str:
    """Return in words how the policies differ for a client; empty if they do not."""
    try:
        require_same_policy(found[0], served[0])
    except ContractMismatch as error:
        return str(error)
    if found[1] != served[1]:
        return f"policy: got episode_state {found[1]}, expected {served[1]}"
    return ""
