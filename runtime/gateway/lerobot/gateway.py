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
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from policies.errors import ContractMismatch, ObservationError, PolicyError
from policies.types import PolicyContract
from policies.yaml_config import InvalidConfig
from runtime.errors import RuntimeFault
from runtime.gateway.api_keys import ApiKeys
from runtime.gateway.config import GatewayCommand, ObservationKeys
from runtime.gateway.lerobot.messages import join_parts
from runtime.gateway.lerobot.peer import Accepted, LerobotPeer
from runtime.gateway.lerobot.protobuf_fields import data_field, read_fields, write_bytes
from runtime.gateway.observation_map import COLOURS, ObservationMap
from transport.address import format_address
from transport.errors import Refused, TransportError
from transport.zeromq.curve import KeyFileError

logger = logging.getLogger(__name__)

SERVICE = "transport.AsyncInference"
WAIT_S = 2.0
"""How long ``GetActions`` waits for an observation, as LeRobot's server does."""
RECEIVE_S = 10.0
"""How long an observation may take from its first byte to its last."""
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
        ObservationMap(contract, keys, image_keys=lambda name: (name,), state_keys=())
        self._command, self._keys = command, keys
        self._max_bytes = SLACK_BYTES + sum(
            max(height * width for height, width in camera.accepted_hw) * COLOURS
            for camera in contract.cameras
        )
        self._peers: dict[str, LerobotPeer] = {}
        self._delayed = 0
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
                # A client whose host is gone closes nothing.
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
            ),
            maximum_concurrent_rpcs=CALLS_PER_CLIENT * self._command.max_clients,
        )
        unary = grpc.unary_unary_rpc_method_handler
        streamed = grpc.stream_unary_rpc_method_handler
        # Without (de)serializers a handler gets and returns bytes.
        methods = {
            "Ready": unary(_answering(self._ready)),
            "SendPolicyInstructions": unary(_answering(self._instruct)),
            "SendObservations": streamed(_answering(self._observe)),
            "GetActions": unary(_answering(self._act)),
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
        if not self._peers:
            return
        connected = remote_ports(self.port)
        for peer in list(self._peers.values()):
            if int(peer.name.rpartition(":")[2]) not in connected:
                logger.info("%s is gone", peer.name)
                self._forget(peer)

    def _forget(self, peer: LerobotPeer) -> None:
        del self._peers[peer.name]
        self._ending.append(peer)
        peer.end()

    # The calls

    async def _ready(self, _: bytes, name: str) -> bytes:
        peer = self._peers.get(name)
        if peer is None:
            if len(self._peers) >= self._command.max_clients:
                raise Refusal(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"got a client beside {len(self._peers)}, expected at most that many",
                )
            logger.info("%s is connected", name)
            peer = self._peers[name] = LerobotPeer(name, self._command, self._keys)
        try:
            await peer.reset()
        except BaseException:
            if not peer.connected and self._peers.get(name) is peer:
                self._forget(peer)
            raise
        return b""

    async def _instruct(self, message: bytes, name: str) -> bytes:
        peer = self._peers.get(name)
        if peer is None:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "got no Ready, expected it first")
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
            async with asyncio.timeout(RECEIVE_S):
                content = await join_parts(parts, self._max_bytes)
            if peer.episode == episode:  # else it was begun before a reset
                peer.offer(content)
        except TimeoutError as error:
            raise Refusal(
                grpc.StatusCode.ABORTED, f"observation: got no END within {RECEIVE_S:g} s"
            ) from error
        finally:
            peer.receiving = False
        return b""

    async def _act(self, _: bytes, name: str) -> bytes:
        known = self._peers.get(name)
        if known is None or known.accepted is None:
            await self._delay()
        peer, accepted = self._accepted_peer(name)
        content = await peer.newest(WAIT_S)
        return b"" if content is None else write_bytes(1, await peer.answer(content, accepted))

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


def _answering(
    call: Callable[[Any, str], Awaitable[bytes]],
) -> Callable[[Any, Any], Awaitable[bytes]]:
    """Return ``call`` as a handler of gRPC's: its errors become a status with their text.

    Never UNAVAILABLE: gRPC would repeat the call on its own, and nobody would see the reason.
    """

    async def answer(request: Any, context: Any) -> bytes:
        name: str = context.peer()
        try:
            return await call(request, name)
        except Refusal as error:
            code, reason = error.code, f"{error}"
        except (ContractMismatch, ObservationError, ValueError) as error:
            code, reason = grpc.StatusCode.INVALID_ARGUMENT, f"{error}"
        except PolicyError as error:
            code, reason = grpc.StatusCode.INTERNAL, f"{error}"
        except Refused as error:
            code, reason = grpc.StatusCode.RESOURCE_EXHAUSTED, f"{error}"
        except (RuntimeFault, TransportError, KeyFileError) as error:
            code, reason = grpc.StatusCode.ABORTED, f"{error}"
        reason = reason[:MAX_REASON_CHARS]
        logger.warning("%s: %s: %s", name, code.name, reason)
        await context.abort(code, reason)
        return b""  # abort raises

    return answer
