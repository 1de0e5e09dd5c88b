"""Serves ILStudio's clients: pickles over TCP, in its words ``-m HOST:PORT``.

Each connection has a thread. An observation may be a batch; each row of it is a session of its own,
computed beside the others. There is no reset message: a ``timestep`` that is not above the last one
begins a new episode. An error is an empty list, at which ILStudio's client raises; the reason is in
this process's log.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Sequence

from policies.errors import PolicyError
from policies.types import ActionChunk, MetaObs, PolicyContract
from policies.yaml_config import InvalidConfig
from runtime.errors import RuntimeFault
from runtime.gateway.client_listener import ClientListener, ClientThread
from runtime.gateway.client_log import ClientErrors, ClientLog
from runtime.gateway.config import GatewayCommand
from runtime.gateway.gateway_session import GatewaySession
from runtime.gateway.ilstudio.chunk_pickle import NO_ACTIONS, ChunkWriter
from runtime.gateway.ilstudio.framed_socket import FramedSocket, MessageTooLong, NothingAsked
from runtime.gateway.ilstudio.observations import NO_TIMESTEP, IlstudioObservations
from runtime.options.api_keys import ApiKeys
from runtime.options.observation_keys import ObservationKeys
from transport.errors import TransportError
from transport.zeromq.curve import KeyFileError

logger = logging.getLogger(__name__)

SLOW_S = 10.0
"""Longest time for one message, in either direction."""
FIRST_S = 60.0
"""Longest silence of a client that got no actions yet.

ILStudio's client, which may need longer for its simulation, connects again by itself.
"""
SERVER = "server"
"""Kind of all errors for which the policy server cannot be asked."""
BACKLOG = 1024
"""Connections that may wait to be accepted. One beyond has to try again, after a second."""


class IlstudioGateway:
    """Listens for ILStudio's clients; see ``runtime.gateway.renewing_gateway.Gateway``.

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
            raise InvalidConfig(
                "api_keys: got a file, expected none: ILStudio's clients have no key"
            )
        self._command, self._contract = command, contract
        self._observations = IlstudioObservations(contract, keys)
        self._log = ClientLog(logger)
        self._listener = ClientListener(
            command.host, command.port or 0, self._make_client, self._log, backlog=BACKLOG
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

    def _make_client(self, connected: socket.socket, address: str) -> _Client | None:
        if (count := len(self._listener.clients)) >= self._command.max_clients:
            refusal = f"{address}: refused, {count} clients are connected"
            self._log.write(logging.WARNING, refusal)
            return None
        messages = FramedSocket(connected, self._observations.max_bytes, SLOW_S)
        return _Client(
            messages, address, self._command, self._observations, self._contract, log=self._log
        )


class _Client(ClientThread):
    """The thread of one connection."""

    def __init__(
        self,
        messages: FramedSocket,
        address: str,
        command: GatewayCommand,
        observations: IlstudioObservations,
        contract: PolicyContract,
        *,
        log: ClientLog,
    ) -> None:
        super().__init__(name=f"ilstudio {address}", daemon=True)
        self._messages = messages
        self._command, self._observations, self._contract = command, observations, contract
        self._writer = ChunkWriter()
        self._rows: list[_Row] = []
        self._log, self._errors = log, ClientErrors(log, self.name)

    def cut(self) -> None:
        """End the connection."""
        self._messages.cut()

    def run(self) -> None:
        self._log.write(logging.INFO, f"{self.name}: connected")
        try:
            self._serve()
            self._disconnected(logging.INFO, "")
        except NothingAsked:
            self._disconnected(logging.WARNING, f", it asked for nothing within {FIRST_S:g} s")
        except TimeoutError:
            self._disconnected(logging.WARNING, f", a message took it over {SLOW_S:g} s")
        except OSError as error:
            self._disconnected(logging.INFO, f": {error}")
        finally:
            self._messages.close()
            for row in self._rows:
                row.close()

    def _disconnected(self, level: int, reason: str) -> None:
        self._log.write(level, f"{self.name}: disconnected{reason}")

    def _serve(self) -> None:
        wait_s: float | None = FIRST_S
        while True:
            try:
                message = self._messages.receive(wait_s)
            except MessageTooLong as error:
                self._fail(f"message: {error}")
                self._messages.send(NO_ACTIONS)
                continue
            if message is None:
                return
            answer = self._answer(message)
            if answer is not NO_ACTIONS:
                wait_s = None
            self._messages.send(answer)
            if answer is NO_ACTIONS:
                del message
                self._messages.free_memory()

    def _answer(self, message: memoryview) -> bytes | memoryview:
        arrived_ns = self._messages.arrived_ns
        try:
            observations = self._observations.read(message)
            for obs in observations:
                obs.t_capture_ns = arrived_ns
            answer = self._writer.write(self._infer(observations))
        except (RuntimeFault, TransportError) as error:
            self._fail(f"{error}", SERVER)
        except (PolicyError, KeyFileError) as error:
            self._fail(f"{error}")
        except Exception:  # else the client would send it again on a new connection, without end
            text = f"{self.name}: the gateway failed"
            self._log.write(logging.ERROR, text, with_traceback=True)
        else:
            self._errors.worked()
            return answer
        return NO_ACTIONS

    def _fail(self, reason: str, kind: str = "") -> None:
        self._errors.failed(kind or reason, reason)

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
            self._session = GatewaySession(self._command, self._name, self._contract)
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
    started = []
    try:
        for thread in others:
            thread.start()
            started.append(thread)
        run(0)
    finally:  # also where the system has no thread: a session is used by one call at a time
        for thread in started:
            thread.join()
    if errors:
        raise errors[min(errors)]
    return [results[at] for at in range(len(calls))]
