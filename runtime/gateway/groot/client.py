"""One GR00T client: its connection, and its session, which answers its requests."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

from policies.errors import ContractMismatch, PolicyError
from policies.types import ActionChunk
from runtime.errors import RuntimeFault
from runtime.gateway.client_listener import ClientThread
from runtime.gateway.client_log import ClientLog
from runtime.gateway.config import GatewayCommand
from runtime.gateway.gateway_session import GatewaySession
from runtime.gateway.groot.modalities import GrootModalities, has_batch_axis, is_flat
from runtime.gateway.groot.zmtp import ProtocolViolation, RequestTooLong, ZmtpConnection
from runtime.options.api_keys import ApiKeys
from runtime.wire_formats.bounded_msgpack import Data, MalformedFrame, require_map, shown
from runtime.wire_formats.npy_arrays import pack, unpack
from transport.errors import Refused, TransportError
from transport.zeromq.curve import KeyFileError

MAX_LOGGED = 10
"""Refused requests of one client that are logged."""
ENDPOINTS = ("get_action", "get_modality_config", "ping", "reset")


class GrootRequests:
    """Answers one client's requests. The first one takes a place, if it has a key; the first
    ``reset`` or ``get_action`` opens the session.

    Not thread-safe.

    Args:
        command: Server, keys, and what the session declares.
        name: The client's name in the server's log and status.
        api_keys: What a request's ``api_token`` must be one of; None if it needs none.
        modalities: Of the policy that the gateway was started for. Another one is refused.
        places: How many more clients may be served.
        log: The gateway's.

    Attributes:
        has_place: Whether there was a request with a valid key, and a place for it.
    """

    def __init__(
        self,
        command: GatewayCommand,
        name: str,
        api_keys: ApiKeys | None,
        modalities: GrootModalities,
        places: threading.Semaphore,
        *,
        log: ClientLog,
    ) -> None:
        self._command, self._name, self._api_keys = command, name, api_keys
        self._modalities, self._places, self.has_place = modalities, places, False
        self._session: GatewaySession | None = None
        self._timestep = 0
        self._log, self._logged = log, 0

    def answer(self, request: Data) -> bytes:
        """Return the reply to ``request``: ``{"error": text}`` for whatever is wrong."""
        try:
            return pack(self._answer(unpack(request)))
        except (MalformedFrame, PolicyError, RuntimeFault, TransportError, KeyFileError) as error:
            return self.refuse(str(error))
        except Exception as error:
            text = f"{self._name}: a request failed"
            self._log.write(logging.ERROR, text, with_traceback=True)
            return self.refuse(f"the gateway failed: {type(error).__name__}")

    def refuse(self, error: str) -> bytes:
        """Return the reply that says ``error``."""
        error = error.encode("utf-8", "replace").decode()  # neither log nor reply can have the rest
        self._logged += 1
        if self._logged <= MAX_LOGGED:
            self._log.write(logging.WARNING, f"{self._name}: {error:.300}")
        return pack({"error": error})

    def close(self) -> None:
        """End the session and free the place. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
        if self.has_place:
            self.has_place = False
            self._places.release()

    def _answer(self, request: Mapping[str, Any]) -> Any:
        if self._api_keys is not None and not self._api_keys.match(request.get("api_token")):
            raise MalformedFrame("api_token", "none or a wrong one", "one of the gateway's")
        self.has_place = self.has_place or self._places.acquire(blocking=False)
        if not self.has_place:
            most = self._command.max_clients
            raise MalformedFrame("clients", f"{most + 1}", f"at most {most}")
        endpoint = request.get("endpoint", "get_action")
        if endpoint == "get_action":
            return self._act(require_map(request.get("data"), "data"))
        if endpoint == "reset":
            _check_arguments(require_map(request.get("data") or {}, "data"), ("options",))
            self._timestep = 0
            if self._session is None:
                self._open()
            else:
                self._session.reset()
            return {}
        if endpoint == "ping":
            return {"status": "ok", "message": "Server is running"}
        if endpoint == "get_modality_config":
            return self._modalities.config()
        raise MalformedFrame("endpoint", shown(endpoint), f"one of {', '.join(ENDPOINTS)}")

    def _act(self, data: Mapping[str, Any]) -> Any:
        """Return ``[action, info]``; the action alone where ``data`` itself is the observation, as
        clients of version N1.5 send it."""
        if "observation" not in data:
            chunk = self._infer(data, has_reset=False)
            return self._modalities.actions(chunk, flat=True, batched=has_batch_axis(data))
        _check_arguments(data, ("observation", "options"))
        observation = require_map(data["observation"], "observation")
        chunk = self._infer(observation, has_reset=True)
        return [self._modalities.actions(chunk, flat=is_flat(observation)), {}]

    def _infer(self, observation: Mapping[str, Any], *, has_reset: bool) -> ActionChunk:
        """Return the chunk for ``observation``.

        Args:
            has_reset: Whether the client's version has the endpoint ``reset``.
        """
        obs = self._modalities.read(observation, self._timestep)
        session = self._made_session()
        if session.episode_state and not has_reset:
            raise ContractMismatch(
                "policy",
                "one that keeps a state between observations",
                "one without: clients of version N1.5 have no reset",
            )
        chunk = session.infer(obs)
        self._timestep += 1
        return chunk

    def _made_session(self) -> GatewaySession:
        """Return the session, which may not be open. Raises as ``GatewaySession``."""
        if self._session is None:
            contract = self._modalities.contract
            self._session = GatewaySession(self._command, self._name, contract)
        return self._session

    def _open(self) -> None:
        """Open the session before the first observation, so that a refusal shows at once.

        A server that is not there is asked again for the first observation.

        Raises:
            PolicyError, Refused: The server has another policy, or does not admit the session.
        """
        try:
            self._made_session().open()
        except Refused:
            raise
        except TransportError as error:
            self._log.write(logging.WARNING, f"{self._name}: {error!s:.300}")


def _check_arguments(data: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Refuse what GR00T's own server would refuse, and options, which no policy here has.

    Raises:
        MalformedFrame: ``data`` has another name, or an option.
    """
    for name in data:
        if name not in names:
            raise MalformedFrame("data", f"key {shown(name)}", " and ".join(names))
    options = data.get("options")
    if options is not None and options != {}:
        raise MalformedFrame("options", shown(options), "none: there are no options")


class GrootClient(ClientThread):
    """The thread of one connection, which answers heartbeats while another thread computes.

    Args:
        connection: Closed by the thread.
        requests: Answers the requests; closed by the thread.
        name: For the log.
        log: The gateway's.

    Attributes:
        accepted_s: When the connection was accepted, monotonic seconds.
    """

    def __init__(
        self, connection: ZmtpConnection, requests: GrootRequests, name: str, log: ClientLog
    ) -> None:
        # A daemon: one that waits for the policy must not keep the process.
        super().__init__(name=name, daemon=True)
        self._connection, self._requests, self._log = connection, requests, log
        self.accepted_s = time.monotonic()
        self._submitted: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    @property
    def has_place(self) -> bool:
        """As ``GrootRequests``."""
        return self._requests.has_place

    def cut(self) -> None:
        """End the connection. Idempotent."""
        self._connection.cut()

    def run(self) -> None:
        """Serve the client until it leaves."""
        try:
            self._connection.handshake()
            self._log.write(logging.INFO, f"{self.name}: connected")
            self._serve()
            self._log.write(logging.INFO, f"{self.name}: disconnected")
        except (ProtocolViolation, RuntimeError) as error:  # the latter: there is no thread for it
            self._log.write(logging.WARNING, f"{self.name}: disconnected: {error}")
        except OSError as error:  # a timeout is one, too
            self._log.write(logging.INFO, f"{self.name}: disconnected: {error}")
        finally:
            self._connection.close()

    def _serve(self) -> None:
        """Answer requests until the end of the connection, and end the session."""
        done_fd = os.eventfd(0, os.EFD_CLOEXEC)
        computing = threading.Thread(target=self._compute, args=(done_fd,), daemon=True)
        try:
            computing.start()
        except RuntimeError:
            os.close(done_fd)
            raise
        try:
            while True:
                try:
                    received = self._connection.receive()
                except RequestTooLong as error:
                    self._connection.send(error.envelope, self._requests.refuse(str(error)))
                    continue
                if received is None:
                    return
                envelope, request = received
                self._submitted.put(request)
                self._connection.serve_until(done_fd)
                os.eventfd_read(done_fd)
                self._connection.send(envelope, self._replies.get())
        finally:
            self._connection.cut()
            self._submitted.put(None)
            computing.join()
            os.close(done_fd)

    def _compute(self, done_fd: int) -> None:
        try:
            while (request := self._submitted.get()) is not None:
                self._replies.put(self._requests.answer(request))
                os.eventfd_write(done_fd, 1)
        finally:
            self._requests.close()
