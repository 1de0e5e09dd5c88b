"""The gateway for clients of openpi: MessagePack over a websocket.

The server speaks first, with what it serves. Then each binary frame is an observation, which one
binary frame with the actions answers. A text frame is an error, which openpi's client raises; the
connection can be used further, unless the observation was not readable at all.

The protocol has no reset, so a policy that keeps a state between observations is refused.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from policies.errors import ContractMismatch, PolicyError
from policies.types import PolicyContract
from policies.yaml_config import InvalidConfig
from runtime.errors import RuntimeFault
from runtime.gateway.config import GatewayCommand, ObservationKeys
from runtime.gateway.gateway_session import GatewaySession
from runtime.gateway.observation_map import ObservationMap, find_value
from runtime.gateway.openpi.websocket_connection import WebsocketConnection
from runtime.gateway.openpi.websocket_server import WebsocketServer
from runtime.options.api_keys import ApiKeys
from runtime.wire_formats.msgpack_arrays import MalformedFrame, pack, unpack
from transport.address import format_address
from transport.errors import Refused, TransportError
from transport.zeromq.curve import KeyFileError

logger = logging.getLogger(__name__)

OTHER_BYTES = 4 * 2**20
"""What a frame may have beside the policy's pictures, e.g. those of cameras it does not use."""
MORE_SOCKETS = 16
"""Connections beyond ``max_clients``, for handshakes, refusals and health checks."""
API_KEY = "Api-Key "
REASON_BYTES = 123
"""Longest reason of a closed connection."""


class OpenpiGateway:
    """A ``Gateway`` for openpi's clients; one thread per connection.

    Args:
        command: Address, limits, and the policy server.
        keys: Where an observation has what; openpi's usual keys where it does not say.
        api_keys: The clients' keys; None accepts every client.
        contract: The policy's.

    Attributes:
        port: The TCP port that it listens on.

    Raises:
        InvalidConfig: ``keys`` does not fit the contract, or the policy has an episode state.
        OSError: The address cannot be listened on.
        TransportError: The policy server does not answer.
    """

    def __init__(
        self,
        command: GatewayCommand,
        keys: ObservationKeys,
        api_keys: ApiKeys | None,
        contract: PolicyContract,
    ) -> None:
        self._command, self._api_keys, self._contract = command, api_keys, contract
        others = ("observation/image",) if len(contract.cameras) == 1 else ()
        self._observations = ObservationMap(
            contract,
            keys,
            image_keys=lambda camera: (f"images/{camera}", *others),
            state_keys=("state", "observation/state"),
        )
        try:
            self._open_session("openpi gateway").close()
        except ContractMismatch as error:
            raise InvalidConfig(str(error)) from error
        self._metadata = pack(describe(contract))
        self._clients = threading.BoundedSemaphore(command.max_clients)
        self._server = WebsocketServer(
            command.host,
            command.port or 0,
            max_connections=command.max_clients + MORE_SOCKETS,
            max_bytes=max_frame_bytes(contract),
            check=self._check_request,
            handle=self._serve_client,
        )
        self.port = self._server.port

    def serve(self) -> None:
        """Serve clients until ``stop``.

        Raises:
            RuntimeError: It can accept no more clients, e.g. for want of descriptors.
        """
        self._server.serve()

    def stop(self) -> None:
        """Make ``serve`` return soon. For a signal handler or another thread. Idempotent."""
        self._server.stop()

    def close(self) -> None:
        """End all sessions and free the address. Call it after ``serve``. Idempotent.

        A request that is at the server is waited for.
        """
        self._server.close("the gateway stops")

    # Connections

    def _check_request(self, connection: WebsocketConnection, request: Request) -> Response | None:
        """Return the answer to an HTTP request that is not to become a websocket."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if path != "/":
            return connection.respond(
                HTTPStatus.NOT_FOUND, f"path: got {path:.80}, expected / or /healthz\n"
            )
        given = request.headers.get_all("Authorization")
        if self._api_keys is not None and not (
            len(given) == 1
            and given[0].startswith(API_KEY)
            and self._api_keys.match(given[0].removeprefix(API_KEY).strip())
        ):
            logger.warning("refused a client at %s: no valid key", format_address(*connection.peer))
            return connection.respond(
                HTTPStatus.UNAUTHORIZED,
                f"Authorization: got {'another' if given else 'no'} key, expected "
                f"'{API_KEY}KEY' with one of the gateway's keys\n",
            )
        return None

    def _serve_client(self, connection: WebsocketConnection, path: str) -> None:
        peer = f"openpi {format_address(*connection.peer)}"
        if not self._clients.acquire(blocking=False):
            most = self._command.max_clients
            connection.close(
                CloseCode.TRY_AGAIN_LATER, f"clients: got {most + 1}, expected at most {most}"
            )
            return
        logger.info("%s connected", peer)
        client = _Client(peer, self._observations, lambda: self._open_session(peer))
        try:
            client.open()
            connection.send(self._metadata)
            while True:
                connection.send(client.reply(connection.receive()))
        except MalformedFrame as error:
            logger.warning("%s sent a malformed frame: %s", peer, error)
            with contextlib.suppress(ConnectionClosed):
                connection.send(str(error))
            connection.close(CloseCode.INVALID_DATA, "malformed frame")
        except (Refused, PolicyError) as error:
            logger.warning("%s is refused: %s", peer, error)
            connection.close(CloseCode.TRY_AGAIN_LATER, close_reason(str(error)))
        except ConnectionClosed as error:
            logger.info("%s: %s", peer, error)
        finally:
            client.close()
            logger.info("%s is gone", peer)
            self._clients.release()

    def _open_session(self, name: str) -> GatewaySession:
        """Return a session with the policy server.

        Raises:
            ContractMismatch: It serves another policy now, or one with episode state.
            TransportError: It does not answer.
        """
        session = GatewaySession(self._command, name, self._contract)
        try:
            if session.episode_state:
                raise ContractMismatch(
                    "policy",
                    "one that keeps a state between observations",
                    "one without: openpi's protocol has no reset",
                )
        except ContractMismatch:
            session.close()
            raise
        return session


class _Client:
    """One client: its session, and how many observations it has sent.

    Args:
        peer: Its name.
        observations: Converts its observations.
        open_session: Opens a session with the policy server.
    """

    def __init__(
        self, peer: str, observations: ObservationMap, open_session: Callable[[], GatewaySession]
    ) -> None:
        self._peer, self._observations, self._open_session = peer, observations, open_session
        self._session: GatewaySession | None = None
        self._timestep, self._logged = 0, ""
        self._total_s: float | None = None

    def open(self) -> None:
        """Open the session, so that a refusal shows at once. A server that is not there is asked
        again for the first observation.

        Raises:
            Refused, PolicyError: The server does not admit the session, or has another policy.
        """
        try:
            self._session = self._open_session()
            self._session.open()
        except (Refused, PolicyError):
            raise
        except TransportError as error:
            logger.warning("%s: %s", self._peer, error)

    def reply(self, frame: str | bytes) -> str | bytes:
        """Return the frame that answers ``frame``; text is an error.

        Raises:
            MalformedFrame: ``frame`` is no map of MessagePack.
        """
        began_s = time.monotonic()
        if isinstance(frame, str):
            raise MalformedFrame("", "text", "a binary frame")
        observation = unpack(frame)
        try:
            reply = self._infer(observation)
        except (PolicyError, RuntimeFault, TransportError, KeyFileError) as error:
            text = str(error)
            if text != self._logged:  # a client may send the same observation without end
                logger.warning("%s: %s", self._peer, text)
                self._logged = text
            return text
        self._total_s = time.monotonic() - began_s
        return reply

    def _infer(self, observation: Mapping[str, Any]) -> bytes:
        prompt = find_value(observation, "prompt")
        if not isinstance(prompt, str | None):
            raise ContractMismatch("prompt", type(prompt).__name__, "text")
        obs = self._observations.read(observation, timestep=self._timestep, raw_lang=prompt or "")
        if self._session is None:
            self._session = self._open_session()
        began_s = time.monotonic()
        chunk = self._session.infer(obs)
        timing = {"infer_ms": (time.monotonic() - began_s) * 1000}
        if self._total_s is not None:
            timing["prev_total_ms"] = self._total_s * 1000
        self._timestep += 1
        return pack({"actions": chunk.actions, "server_timing": timing})

    def close(self) -> None:
        """End the session. Idempotent."""
        if self._session is not None:
            self._session.close()


def close_reason(text: str) -> str:
    """Return ``text``, cut to what a closed connection may have as a reason."""
    encoded = text.encode()
    if len(encoded) <= REASON_BYTES:
        return text
    return f"{encoded[: REASON_BYTES - 3].decode(errors='ignore')}..."


def max_frame_bytes(contract: PolicyContract) -> int:
    """Return the size of the largest frame that a client of this policy may send."""
    pictures = sum(max(h * w * 3 for h, w in one.accepted_hw) for one in contract.cameras)
    return pictures + OTHER_BYTES


def describe(contract: PolicyContract) -> dict[str, Any]:
    """Return the first map that a client gets: what is served."""
    return {
        "server": "metronome",
        "policy_type": contract.policy_type,
        "cameras": {camera.name: list(camera.source_hw) for camera in contract.cameras},
        "state_dim": contract.state_dim,
        "action_dim": contract.action_dim,
        "chunk_size": contract.chunk_size,
        "n_action_steps": contract.n_action_steps,
        "first_action_offset": contract.first_action_offset,
        "dt_s": contract.dt_s,
        "ctrl_space": contract.ctrl_space,
        "ctrl_type": contract.ctrl_type,
        "gripper_continuous": contract.gripper_continuous,
        "state_names": list(contract.state_names),
        "action_names": list(contract.action_names),
    }
