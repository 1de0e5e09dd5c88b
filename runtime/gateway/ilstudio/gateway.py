"""Serves ILStudio's clients: pickles over TCP, in its words ``-m HOST:PORT``.

Each connection has a thread. An observation may be a batch; each row of it is a session of its own,
computed beside the others. There is no reset message: a ``timestep`` that is not above the last one
begins a new episode. An error is an empty list, at which ILStudio's client raises; the reason is in
this process's log.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

from policies.errors import PolicyError
from policies.types import ActionChunk, MetaObs, PolicyContract
from policies.yaml_config import InvalidConfig
from runtime.errors import RuntimeFault
from runtime.gateway.api_keys import ApiKeys
from runtime.gateway.config import GatewayCommand, ObservationKeys
from runtime.gateway.gateway_session import GatewaySession
from runtime.gateway.ilstudio.chunk_pickle import NO_ACTIONS, ChunkWriter
from runtime.gateway.ilstudio.framed_socket import FramedSocket, MessageTooLong
from runtime.gateway.ilstudio.observations import NO_TIMESTEP, IlstudioObservations
from transport.address import format_address, resolve
from transport.errors import TransportError
from transport.zeromq.curve import KeyFileError

logger = logging.getLogger(__name__)

SLOW_S = 10.0
"""Longest time for one message, in either direction."""
CLOSE_S = 2.0
"""How long ``close`` waits for requests in progress."""
ACCEPT_AGAIN_S = 0.1
"""Pause after a failed accept, for which the system had no descriptor or memory."""


class IlstudioGateway:
    """Listens for ILStudio's clients; see ``runtime.gateway.cli.Gateway``.

    Args:
        command: Address, server, limits.
        keys: Which picture is which camera, and the parts of the state.
        api_keys: None: the protocol has no place for keys.
        contract: The served policy's.

    Raises:
        InvalidConfig: ``keys`` does not fit the contract, or there are ``api_keys``.
        TransportError: The host is no address of this machine.
        OSError: The address is taken.
    """

    def __init__(
        self,
        command: GatewayCommand,
        keys: ObservationKeys,
        api_keys: ApiKeys | None,
        contract: PolicyContract,
    ) -> None:
        if api_keys is not None:
            raise InvalidConfig("api_keys: ILStudio's protocol has no place for keys")
        self._command, self._contract = command, contract
        self._observations = IlstudioObservations(contract, keys)
        host, ipv6 = resolve(command.host, command.port or 0, listening=True)
        self._listener = socket.create_server(
            (host, command.port or 0), family=socket.AF_INET6 if ipv6 else socket.AF_INET
        )
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._clients: list[_Client] = []

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
        """End all sessions and free the address. Idempotent."""
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
            logger.warning("a client could not be accepted: %s", error)
            time.sleep(ACCEPT_AGAIN_S)
            return
        address = format_address(*peer[:2])
        self._clients = [client for client in self._clients if client.is_alive()]
        if len(self._clients) >= self._command.max_clients:
            logger.warning("%s: refused, %d clients are connected", address, len(self._clients))
            connected.close()
            return
        try:
            messages = FramedSocket(connected, self._observations.max_bytes, SLOW_S)
        except OSError as error:
            logger.info("%s: left at once: %s", address, error)
            connected.close()
            return
        client = _Client(messages, address, self._command, self._observations, self._contract)
        self._clients.append(client)
        client.start()


class _Client(threading.Thread):
    """The thread of one connection."""

    def __init__(
        self,
        messages: FramedSocket,
        address: str,
        command: GatewayCommand,
        observations: IlstudioObservations,
        contract: PolicyContract,
    ) -> None:
        super().__init__(name=f"ilstudio {address}", daemon=True)
        self._messages = messages
        self._command, self._observations, self._contract = command, observations, contract
        self._writer = ChunkWriter()
        self._rows: list[_Row] = []

    def cut(self) -> None:
        """End the connection."""
        self._messages.cut()

    def run(self) -> None:
        logger.info("%s: connected", self.name)
        try:
            while True:
                try:
                    message = self._messages.receive()
                except MessageTooLong as error:
                    logger.warning("%s: message: %s", self.name, error)
                    self._messages.send(NO_ACTIONS)
                    continue
                if message is None:
                    break
                self._messages.send(self._answer(message))
            logger.info("%s: disconnected", self.name)
        except TimeoutError:
            logger.warning("%s: disconnected, a message took it over %g s", self.name, SLOW_S)
        except OSError as error:
            logger.info("%s: disconnected: %s", self.name, error)
        finally:
            self._messages.close()
            for row in self._rows:
                row.close()

    def _answer(self, message: memoryview) -> bytes | memoryview:
        try:
            return self._writer.write(self._infer(self._observations.read(message)))
        except (PolicyError, RuntimeFault, TransportError, KeyFileError) as error:
            logger.warning("%s: %s", self.name, error)
        except Exception:  # else the client would send it again on a new connection, without end
            logger.exception("%s: the gateway failed", self.name)
        return NO_ACTIONS

    def _infer(self, observations: Sequence[MetaObs]) -> list[ActionChunk]:
        while len(self._rows) < len(observations):
            name = f"{self.name} [{len(self._rows)}]"
            self._rows.append(_Row(self._command, name, self._contract))
        return _side_by_side(
            [
                lambda row=row, obs=obs: row.infer(obs)  # type: ignore[misc]
                for row, obs in zip(self._rows, observations, strict=False)
            ]
        )


class _Row:
    """The session of one row of a client's batches, and where its episode is."""

    def __init__(self, command: GatewayCommand, name: str, contract: PolicyContract) -> None:
        self._command, self._name, self._contract = command, name, contract
        self._session: GatewaySession | None = None
        self._last = NO_TIMESTEP

    def infer(self, obs: MetaObs) -> ActionChunk:
        """Return the chunk for ``obs``; raises as ``GatewaySession``."""
        if self._session is None:
            session = GatewaySession(self._command, self._name)
            try:
                session.contract.require(self._contract, but=("normalizer_hash",))
            except PolicyError:
                session.close()
                raise
            self._session = session
        if obs.timestep == NO_TIMESTEP:
            obs.timestep = self._last + 1
        elif obs.timestep <= self._last:
            self._session.reset()
        self._last = obs.timestep
        return self._session.infer(obs)

    def close(self) -> None:
        """End the session. Idempotent."""
        if self._session is not None:
            self._session.close()


def _side_by_side(calls: Sequence[Callable[[], ActionChunk]]) -> list[ActionChunk]:
    """Return the results of ``calls``, each made in its own thread.

    Raises:
        Exception: The first one that a call raised, after all have ended.
    """
    results: dict[int, ActionChunk] = {}
    errors: dict[int, Exception] = {}

    def run(at: int) -> None:
        try:
            results[at] = calls[at]()
        except Exception as error:
            errors[at] = error

    others = [threading.Thread(target=run, args=(at,), daemon=True) for at in range(1, len(calls))]
    for thread in others:
        thread.start()
    run(0)
    for thread in others:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return [results[at] for at in range(len(calls))]
