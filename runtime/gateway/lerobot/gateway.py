"""Serves LeRobot's ``RobotClient``: gRPC, the service ``transport.AsyncInference``.

A client calls ``Ready``, ``SendPolicyInstructions``, and then ``SendObservations`` from one thread
and ``GetActions`` from another. The newest observation is answered; one that a newer one replaced
is not even read.

One event loop has all calls, so a waiting ``GetActions`` holds no thread. A thread per client reads
its pickles and waits for the server.

A connection of gRPC is a session. gRPC's Python API does not tell when one is closed, and no call
needs to break off then, so every ``SWEEP_S`` the sessions are compared with the process's sockets.
Pings close the connections of hosts that are gone. After a lost connection, LeRobot's client sends
no instructions again: its calls are refused until it is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from policies.errors import ContractMismatch, ObservationError, PolicyError
from policies.types import PolicyContract
from policies.yaml_config import InvalidConfig
from runtime.errors import RuntimeFault
from runtime.gateway.client_log import ClientErrors, ClientLog
from runtime.gateway.config import GatewayCommand
from runtime.gateway.lerobot.messages import join_parts
from runtime.gateway.lerobot.peer import Accepted, LerobotPeer, Received
from runtime.gateway.lerobot.protobuf_fields import data_field, read_fields, write_bytes
from runtime.gateway.observation_map import COLOURS, ObservationMap
from runtime.options.api_keys import ApiKeys
from runtime.options.observation_keys import ObservationKeys
from transport.address import format_address
from transport.errors import Refused, TransportError
from transport.zeromq.curve import KeyFileError

logger = logging.getLogger(__name__)

SERVICE = "transport.AsyncInference"
WAIT_S = 2.0
"""How long ``GetActions`` waits for an observation, as LeRobot's server does."""
RECEIVE_S = 10.0
"""How long a message may take from its first byte to its last; a connection's handshake, too."""
IDLE_S = 600.0
"""How long a connection may make no call. LeRobot's client always has one waiting."""
SWEEP_S = 0.5
"""How long the session of a client that is gone lasts at most, but for a running request."""
MAX_PART_BYTES = 4 * 2**20
"""Largest message; a client's are 2 MiB and a few bytes."""
MAX_INSTRUCTIONS_BYTES = 2**18
SLACK_BYTES = 2**18
"""What an observation may have beside its images."""
MAX_REASON_CHARS = 500
"""Longest reason, which travels in a header of limited size."""
CALLS_PER_CLIENT = 4
SPARE_CONNECTIONS = 16
"""Connections without a session, beside one per client."""
SERVER = "server"
"""Kind of all errors for which the policy server cannot be asked."""


class LerobotGateway:
    """A gRPC server for LeRobot's clients.

    Args:
        command: Address, server, limits.
        keys: The user's map of cameras and state. Without one, cameras have the policy's names
            and the state is the robot's motors.
        api_keys: None; the protocol has no place for keys.
        contract: The policy's.

    Attributes:
        port: The TCP port that it listens on.

    Raises:
        InvalidConfig: ``keys`` does not fit the contract, or there are ``api_keys``.
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
                "api_keys: got a file, expected none: LeRobot's clients have no key"
            )
        ObservationMap(contract, keys, image_keys=lambda name: (name,), state_keys=(), part_size=1)
        self._command, self._keys = command, keys
        self._max_bytes = SLACK_BYTES + sum(
            max(height * width for height, width in camera.accepted_hw) * COLOURS
            for camera in contract.cameras
        )
        self._peers: dict[str, LerobotPeer] = {}
        self._delayed = 0
        self._log = ClientLog(logger)
        self._errors: dict[str, ClientErrors] = {}
        self._ending: list[LerobotPeer] = []
        self._stopping = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        try:
            self.port = self._loop.run_until_complete(self._listen())
        except BaseException:
            self._loop.close()
            raise

    def serve(self) -> None:
        """Serve clients until ``stop``."""
        self._loop.run_until_complete(self._serve())

    def stop(self) -> None:
        """Make ``serve`` return soon. For a signal handler or another thread. Idempotent."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._stopping.set)

    def close(self) -> None:
        """End all sessions and free the address. Call it after ``serve``. Idempotent.

        A session that waits for the policy is ended after its reply.
        """
        if self._loop.is_closed():
            return
        self._loop.run_until_complete(self._server.stop(None))
        for peer in list(self._peers.values()):
            self._forget(peer)
        for peer in self._ending:
            peer.join()
        self._loop.close()

    # The server

    async def _listen(self) -> int:
        self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 0),  # else a second gateway takes some of the clients
                ("grpc.max_receive_message_length", MAX_PART_BYTES),
                ("grpc.max_concurrent_streams", CALLS_PER_CLIENT),
                ("grpc.max_allowed_incoming_connections", self._max_connections),
                ("grpc.server_handshake_timeout_ms", round(RECEIVE_S * 1000)),
                ("grpc.max_connection_idle_ms", round(IDLE_S * 1000)),
                # A client whose host is gone closes nothing.
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
            ),
            # And the delayed ones.
            maximum_concurrent_rpcs=(CALLS_PER_CLIENT + 1) * self._command.max_clients,
        )
        # A unary call is a stream of one message. As a stream, its call is known before its
        # message came, so a slow message takes no longer than is allowed here. Without
        # (de)serializers a handler gets and returns bytes.
        methods = {
            name: grpc.stream_unary_rpc_method_handler(self._answering(call))
            for name, call in (
                ("Ready", self._ready),
                ("SendPolicyInstructions", self._instruct),
                ("SendObservations", self._observe),
                ("GetActions", self._act),
            )
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, methods),)
        )
        address = format_address(self._command.host, self._command.port or 0)
        try:
            port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error
        return port

    @property
    def _max_connections(self) -> int:
        """Also some without a session: their calls get a reason, and they are soon closed."""
        return 2 * self._command.max_clients + SPARE_CONNECTIONS

    async def _serve(self) -> None:
        await self._server.start()
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), SWEEP_S)
            self._sweep()
        await self._server.stop(None)

    def _sweep(self) -> None:
        """End the sessions of the clients that are gone."""
        for peer in [peer for peer in self._ending if peer.ended]:
            peer.join()
            self._ending.remove(peer)
        if not self._errors:  # every peer has an entry
            return
        try:
            connected = remote_ports(self.port)
        except OSError as error:  # no descriptor is left; the next sweep tries again
            self._log.write(logging.WARNING, f"lost clients are not looked for: {error}")
            return
        for name in list(self._errors):
            if int(name.rpartition(":")[2]) not in connected:
                del self._errors[name]
                if name in self._peers:
                    self._log.write(logging.INFO, f"{name} is gone")
                    self._forget(self._peers[name])

    def _forget(self, peer: LerobotPeer) -> None:
        del self._peers[peer.name]
        self._ending.append(peer)
        peer.end()

    # The calls

    def _answering(
        self, call: Callable[[Any, str], Awaitable[bytes]]
    ) -> Callable[[Any, Any], Awaitable[bytes]]:
        """Return ``call`` as a handler of gRPC's: its errors become a status with their text."""

        async def answer(messages: Any, context: Any) -> bytes:
            name: str = context.peer()
            try:
                return await call(messages, name)
            except Exception as error:
                code, reason = _status(error), _reason(error)
                self._log_error(name, code, reason, error)
            await context.abort(code, reason)
            return b""  # abort raises

        return answer

    def _log_error(self, name: str, code: Any, reason: str, error: Exception) -> None:
        if code is grpc.StatusCode.UNKNOWN:
            self._log.write(logging.ERROR, f"{name}: {reason}", with_traceback=True)
            return
        kind = SERVER if isinstance(error, RuntimeFault | TransportError) else reason
        self._errors_of(name).failed(kind, f"{code.name}: {reason}")

    def _errors_of(self, name: str) -> ClientErrors:
        """The errors of a connection, also of one without a session."""
        if name not in self._errors:
            self._errors[name] = ClientErrors(self._log, name)
        return self._errors[name]

    async def _ready(self, _: object, name: str) -> bytes:
        peer = self._peers.get(name)
        if peer is None:
            if len(self._peers) >= self._command.max_clients:
                raise Refusal(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"clients: got {len(self._peers) + 1}, expected at most {len(self._peers)}",
                )
            self._log.write(logging.INFO, f"{name} is connected")
            peer = self._peers[name] = LerobotPeer(name, self._command, self._keys, self._log)
            self._errors_of(name)
        try:
            await peer.reset()
        except BaseException:
            if not peer.connected and self._peers.get(name) is peer:
                self._forget(peer)
            raise
        return b""

    async def _instruct(self, messages: AsyncIterator[bytes], name: str) -> bytes:
        peer = self._peers.get(name)
        if peer is None:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "got no Ready, expected it first")
        async with _receiving("instructions: got no message"):
            message = await anext(messages, b"")
        if len(message) > MAX_INSTRUCTIONS_BYTES:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"instructions: got {len(message)} bytes, "
                f"expected at most {MAX_INSTRUCTIONS_BYTES}",
            )
        content = data_field(read_fields(message), 1)
        try:
            await peer.instruct(content)
        except ContractMismatch as error:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, f"{error}") from error
        return b""

    async def _observe(self, parts: AsyncIterator[bytes], name: str) -> bytes:
        peer, _ = self._accepted_peer(name)
        if peer.receiving:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "got a second observation, expected the end of the first one",
            )
        peer.receiving, episode = True, peer.episode
        try:
            async with _receiving("observation: got no END"):
                content = await join_parts(parts, self._max_bytes)
            if peer.episode == episode:  # else it was begun before a reset
                peer.offer(Received(content, time.monotonic_ns()))
        finally:
            peer.receiving = False
        return b""

    async def _act(self, _: object, name: str) -> bytes:
        known = self._peers.get(name)
        if known is None or known.accepted is None:
            await self._delay()
        peer, accepted = self._accepted_peer(name)
        received = await peer.newest(WAIT_S)
        if received is None:
            return b""
        actions = await peer.answer(received, accepted)
        self._errors_of(name).worked()
        return write_bytes(1, actions)

    async def _delay(self) -> None:
        """Wait before a refusal: a client would ask again at once, without end.

        Not for more calls than there may be clients: the number of running calls is limited.
        """
        if self._delayed < self._command.max_clients:
            self._delayed += 1
            try:
                await asyncio.sleep(WAIT_S)
            finally:
                self._delayed -= 1

    def _accepted_peer(self, name: str) -> tuple[LerobotPeer, Accepted]:
        peer = self._peers.get(name)
        if peer is None or peer.accepted is None:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "got no accepted SendPolicyInstructions on this connection, expected Ready and "
                "it first: start the client again",
            )
        return peer, peer.accepted


class Refusal(Exception):
    """A call that is refused, with a status of gRPC's and a reason."""

    def __init__(self, code: Any, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def remote_ports(port: int) -> set[int]:
    """Return the other sides' TCP ports of this process's connections to its ``port``.

    Two hosts can use the same port; then a client that is gone is only noticed with the other one.

    Raises:
        OSError: This process has no descriptor left to look with.
    """
    found = set()
    for name in os.listdir("/dev/fd"):  # noqa: PTH208
        try:
            # Not a duplicate: gRPC relies on closing its descriptor to end its events.
            shared = socket.socket(fileno=int(name))
        except OSError:
            continue  # no socket
        try:
            tcp = shared.family in (socket.AF_INET, socket.AF_INET6)
            if tcp and shared.getsockname()[1] == port:
                found.add(shared.getpeername()[1])
        except OSError:
            pass  # it listens, or was closed
        finally:
            shared.detach()
    return found


@contextlib.asynccontextmanager
async def _receiving(missing: str) -> AsyncIterator[None]:
    """Refuse the call if the block, which receives a message, takes longer than ``RECEIVE_S``."""
    try:
        async with asyncio.timeout(RECEIVE_S):
            yield
    except TimeoutError as error:
        raise Refusal(
            grpc.StatusCode.ABORTED, f"{missing} within {RECEIVE_S:g} s, expected it by then"
        ) from error


def _reason(error: Exception) -> str:
    known = _status(error) is not grpc.StatusCode.UNKNOWN
    return (f"{error}" if known else f"the gateway failed: {error!r}")[:MAX_REASON_CHARS]


def _status(error: Exception) -> Any:
    """gRPC's status for ``error``; UNKNOWN for one that nobody expects.

    Never UNAVAILABLE: gRPC would repeat the call on its own, and nobody would see the reason.
    """
    match error:
        case Refusal():
            return error.code
        case ContractMismatch() | ObservationError() | ValueError():
            return grpc.StatusCode.INVALID_ARGUMENT
        case PolicyError():
            return grpc.StatusCode.INTERNAL
        case Refused():
            return grpc.StatusCode.RESOURCE_EXHAUSTED
        case RuntimeFault() | TransportError() | KeyFileError():
            return grpc.StatusCode.ABORTED
    return grpc.StatusCode.UNKNOWN
