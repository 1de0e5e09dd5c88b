"""One GR00T client: answers its requests with its session, in a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from policies.errors import ContractMismatch, PolicyError
from policies.types import ActionChunk, PolicyContract
from runtime.errors import RuntimeFault
from runtime.gateway.config import GatewayCommand
from runtime.gateway.gateway_session import GatewaySession
from runtime.gateway.groot.modalities import GrootModalities, has_batch_axis, is_flat
from runtime.options.api_keys import ApiKeys
from runtime.wire_formats.bounded_msgpack import Data, MalformedFrame, require_map, shown
from runtime.wire_formats.npy_arrays import pack, unpack
from transport.errors import Refused, TransportError
from transport.zeromq.curve import KeyFileError

logger = logging.getLogger(__name__)

MAX_LOGGED = 10
"""Refused requests of one client that are logged."""
ENDPOINTS = ("get_action", "get_modality_config", "ping", "reset")


class GrootRequests:
    """Answers one client's requests. The first ``reset`` or ``get_action`` opens its session.

    Not thread-safe.

    Args:
        command: Server, keys, and what the session declares.
        name: The client's name in the server's log and status.
        api_keys: What a request's ``api_token`` must be one of; None if it needs none.
        contract: What the gateway was started for. A server with another policy is refused.
        modalities: Of ``contract``.

    Attributes:
        admitted: Whether the client's last readable request had the key that it needs.
    """

    def __init__(
        self,
        command: GatewayCommand,
        name: str,
        api_keys: ApiKeys | None,
        contract: PolicyContract,
        modalities: GrootModalities,
    ) -> None:
        self._command, self._name, self._api_keys = command, name, api_keys
        self._contract, self._modalities = contract, modalities
        self._session: GatewaySession | None = None
        self._timestep = 0
        self._logged = 0
        self.admitted = api_keys is None

    def answer(self, request: Data) -> bytes:
        """Return the reply to ``request``: ``{"error": text}`` for whatever is wrong."""
        try:
            return pack(self._answer(unpack(request)))
        except (MalformedFrame, PolicyError, RuntimeFault, TransportError, KeyFileError) as error:
            return self._failed(str(error))
        except Exception as error:
            logger.exception("%s: a request failed", self._name)
            return self._failed(f"the gateway failed: {type(error).__name__}")

    def close(self) -> None:
        """End the session. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _failed(self, error: str) -> bytes:
        self._logged += 1
        if self._logged <= MAX_LOGGED:
            logger.warning("%s: %.300s", self._name, error)
        return pack({"error": error})

    def _answer(self, request: Mapping[str, Any]) -> Any:
        self.admitted = self._api_keys is None or self._api_keys.match(request.get("api_token"))
        if not self.admitted:
            raise MalformedFrame("api_token", "none or a wrong one", "one of the gateway's")
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
        if self._session is None:
            self._session = GatewaySession(self._command, self._name, self._contract)
        if self._session.episode_state and not has_reset:
            raise ContractMismatch(
                "policy",
                "one that keeps a state between observations",
                "one without: clients of version N1.5 have no reset",
            )
        chunk = self._session.infer(obs)
        self._timestep += 1
        return chunk

    def _open(self) -> None:
        """Open the session before the first observation, so that a refusal shows at once.

        A server that is not there is asked again for the first observation.

        Raises:
            PolicyError, Refused: The server has another policy, or does not admit the session.
        """
        try:
            if self._session is None:
                self._session = GatewaySession(self._command, self._name, self._contract)
            self._session.open()
        except Refused:
            raise
        except TransportError as error:
            logger.warning("%s: %.300s", self._name, error)


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


class GrootClient:
    """The thread of one client, which computes one request at a time.

    Args:
        identity: The client's ZMQ routing id.
        name: As the session's.
        requests: Answers the requests; closed by the thread.
        reply: Is given this client and each reply, in the thread; None when the thread ends.

    Attributes:
        busy: Whether a request was submitted and its reply not yet sent. Kept by the caller.
    """

    def __init__(
        self,
        identity: bytes,
        name: str,
        requests: GrootRequests,
        reply: Callable[[GrootClient, list[bytes] | None], None],
    ) -> None:
        self.identity, self.name, self.requests, self.busy = identity, name, requests, False
        self._reply = reply
        self._submitted: queue.SimpleQueue[tuple[list[bytes], Data] | None] = queue.SimpleQueue()
        # A daemon: one that waits for the policy must not keep the process.
        self._thread = threading.Thread(target=self._run, name="groot client", daemon=True)
        self._thread.start()

    def submit(self, envelope: list[bytes], request: Data) -> None:
        """Compute the reply to ``request``; it is sent with the frames of ``envelope`` first."""
        self._submitted.put((envelope, request))

    def end(self) -> None:
        """End the session and the thread after the request that is being computed."""
        self._submitted.put(None)

    def join(self, timeout_s: float) -> bool:
        """Return whether the thread has ended within ``timeout_s``."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (submitted := self._submitted.get()) is not None:
                envelope, request = submitted
                self._reply(self, [*envelope, self.requests.answer(request)])
                del submitted, request  # they are as long as a picture
        finally:
            self.requests.close()
            self._reply(self, None)
