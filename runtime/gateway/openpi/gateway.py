"""The gateway for clients of openpi: MessagePack over a websocket.

The server speaks first, with what it serves. Then each binary frame is an observation, which one
frame answers; ``clients`` has the details. Which kind of client it is is told by the path: ``/`` is
openpi's own, ``VLLM_OMNI_PATH`` that of vLLM-Omni's robot endpoint.

openpi's own protocol has no reset, so its clients are refused where the policy keeps a state
between observations.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from functools import partial
from http import HTTPStatus

from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from policies.errors import ContractMismatch, PolicyError
from policies.types import PolicyContract
from policies.yaml_config import InvalidConfig
from runtime.gateway.config import GatewayCommand
from runtime.gateway.gateway_session import GatewaySession
from runtime.gateway.observation_map import ObservationMap
from runtime.gateway.openpi.clients import (
    OpenpiClient,
    VllmOmniClient,
    describe,
    describe_for_vllm_omni,
)
from runtime.gateway.openpi.websocket_connection import WebsocketConnection
from runtime.gateway.openpi.websocket_server import WebsocketServer
from runtime.options.api_keys import ApiKeys
from runtime.options.observation_keys import ObservationKeys
from runtime.wire_formats.msgpack_arrays import MalformedFrame, pack
from transport.address import format_address
from transport.errors import Refused

logger = logging.getLogger(__name__)

OTHER_BYTES = 4 * 2**20
"""What a frame may have beside the policy's pictures, e.g. those of cameras it does not use."""
MORE_SOCKETS = 16
"""Connections beyond ``max_clients``, for handshakes, refusals and health checks."""
API_KEY = "Api-Key "
REASON_BYTES = 123
"""Longest reason of a closed connection."""
VLLM_OMNI_PATH = "/v1/realtime/robot/openpi"
CLIENTS = {"/": (OpenpiClient, describe), VLLM_OMNI_PATH: (VllmOmniClient, describe_for_vllm_omni)}
"""Path: its kind of client, and what that gets first."""
NO_RESET = (
    f"a policy with a state between observations needs a reset: use the path {VLLM_OMNI_PATH}"
)


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
        InvalidConfig: ``keys`` does not fit the contract, or another policy is served.
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
            with contextlib.closing(self._open_session("openpi gateway")) as session:
                self._episode_state = session.episode_state
        except ContractMismatch as error:
            raise InvalidConfig(str(error)) from error
        self._greetings = {path: pack(says(contract)) for path, (_, says) in CLIENTS.items()}
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
        if path not in CLIENTS:
            known = ", ".join((*CLIENTS, "/healthz"))
            return connection.respond(
                HTTPStatus.NOT_FOUND, f"path: got {path:.80}, expected one of {known}\n"
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
        path = path.partition("?")[0]
        client = CLIENTS[path][0](
            peer, self._observations, partial(self._open_session, peer, path=path)
        )
        try:
            if self._episode_state and path == "/":
                connection.close(CloseCode.POLICY_VIOLATION, NO_RESET)
                return
            client.open()
            connection.send(self._greetings[path])
            while True:
                reply = client.reply(connection.receive())
                if reply is not None:
                    connection.send(reply)
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

    def _open_session(self, name: str, path: str = VLLM_OMNI_PATH) -> GatewaySession:
        """Return a session with the policy server for a client of ``path``.

        Raises:
            ContractMismatch: It serves another policy now, or one that needs a reset.
            TransportError: It does not answer.
        """
        session = GatewaySession(self._command, name, self._contract)
        try:
            if session.episode_state and path == "/":
                raise ContractMismatch(
                    "policy",
                    "one that keeps a state between observations",
                    f"one without, or the path {VLLM_OMNI_PATH}, which has a reset",
                )
        except ContractMismatch:
            session.close()
            raise
        return session


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
