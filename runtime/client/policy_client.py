"""A policy that runs in another process: ``PolicyClient`` is a ``Policy`` and an ``AsyncPolicy``.

Guaranteed:

* ``submit`` and ``poll`` never wait for the model; on shared memory they are memory operations.
* At most ``max_in_flight`` requests are without a reply. Beyond that only the newest observation
  waits; an older one that waited is superseded, counted, and never sent.
* A reply is returned only if its request is still wanted. Replies to requests that timed out, were
  cancelled or belong to another session are dropped and counted.
* A dead server raises ``ServerLost`` on every call until ``reconnect``: the caller decides whether
  an arm continues after the loss.

Not thread-safe. Needs neither torch nor mujoco.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from policies.errors import RequestExpired
from policies.types import ActionChunk, MetaObs, PolicyContract, PolicyInfo
from runtime.client.client_session import ClientSession
from runtime.client.connection import ServerConnection
from runtime.client.pending_requests import ClientStatistics, PendingRequests
from runtime.errors import RequestTimeout, ServerBusy, ServerLost
from runtime.options.connection import ConnectionOptions
from runtime.protocol import messages
from runtime.trace import recorder as trace
from transport.base_channel import SLOTS
from transport.errors import PeerGone, TransportTimeout, WouldBlock
from transport.schema import Schema

SessionKind = Literal["robot", "sim"]
MAX_TIMEOUT_S = 1e6
"""The longest ``timeout_s``. A longer one is infinity, or a value in milliseconds by mistake."""
MAX_IN_FLIGHT = SLOTS - 1
"""One slot of the ring towards the server is kept for the waiting observation."""


class PolicyClient:
    """A session with a policy server.

    The constructor reads the contract. The first observation opens the session and fixes its
    shapes; ``open`` does so earlier.

    Args:
        address: ``"HOST:PORT"`` or ``"[V6]:PORT"``.
        transport: ``"auto"``, ``"shm"`` or ``"zmq"``; the last two allow no other.
        kind: ``"robot"`` or ``"sim"``: the server serves robots first, and reports the kind.
        deterministic: Request replies that are bit-equal to those of the policy in any other
            process. The property ``deterministic`` has the server's reply.
        timeout_s: The limit for the handshake, and the default one for ``infer``.
        max_in_flight: Requests that may be without a reply at a time, 1 to ``MAX_IN_FLIGHT``.
        name: This client's name in the server's log and status.
        resize: Resize images to the model's size at the client, with the same bits as at the
            server. For slow links, and for a server whose CPU is busier than the client's.
        jpeg_quality: Send images as JPEG of this quality, 1 to 100, if the session goes over a
            network. Lossy; needs ``simplejpeg`` on both sides.
        server_key, client_key: The server's public and the client's secret key file
            (``runtime.tools.keys``), for a server that requires keys.
        rate_hz: Planned requests per second.
        deadline_ms: Time from a request to the moment its reply is needed. A server that cannot
            keep it, or the rate, for all its clients refuses the session, with the numbers.

    Raises:
        JpegMissing: ``jpeg_quality`` is given and ``simplejpeg`` is not installed.
        KeyFileError: A key file cannot be used.
        Refused: The server does not accept the client's key.
        TransportTimeout: No server answers at the address.
        ProtocolError: The server uses another version of the protocol.
        ContractMismatch: The server's description cannot be read.
    """

    def __init__(
        self,
        address: str,
        *,
        transport: str = "auto",
        kind: SessionKind = "sim",
        deterministic: bool = False,
        timeout_s: float = 5.0,
        max_in_flight: int = 2,
        name: str = "",
        resize: bool = False,
        jpeg_quality: int | None = None,
        server_key: str = "",
        client_key: str = "",
        rate_hz: float | None = None,
        deadline_ms: float | None = None,
    ) -> None:
        if not 1 <= max_in_flight <= MAX_IN_FLIGHT:
            raise ValueError(f"max_in_flight: got {max_in_flight}, expected 1 to {MAX_IN_FLIGHT}")
        self.address, self.timeout_s = address, _checked_timeout("timeout_s", timeout_s)
        self._options = ConnectionOptions(transport, resize, jpeg_quality, server_key, client_key)
        self._options.check()
        self._kind, self._deterministic = kind, deterministic
        self._max_in_flight = max_in_flight
        declared = {"rate_hz": rate_hz, "deadline_ms": deadline_ms}
        self._demand: dict[str, Any] = {
            name: value for name, value in declared.items() if value is not None
        }
        self._name = name or f"pid {os.getpid()}"
        self._schema: Schema | None = None
        self._session: ClientSession | None = None
        self._first_seed: int | None = None
        self._requests = PendingRequests(max_in_flight)
        self._lost = ""
        self._connection = ServerConnection(address, timeout_s, self._options.keys())

    # Description

    @property
    def contract(self) -> PolicyContract:
        """The served policy's contract, as read by the constructor."""
        return self._connection.contract

    @property
    def info(self) -> PolicyInfo:
        """The checkpoint, device and engine of the policy, and the hash of its weights, as the
        server described them when this client connected, the last time."""
        return self._connection.info

    @property
    def episode_state(self) -> bool:
        """Whether the policy keeps a state between the observations of an episode, so that a new
        episode needs ``reset``. True if the server is too old to say."""
        return self._connection.episode_state

    @property
    def transport(self) -> str:
        """``"shm"`` or ``"zmq"``; empty before the session is open."""
        return self._session.channel.transport if self._session else ""

    @property
    def transport_reason(self) -> str:
        """Why this transport was chosen, in words; empty before the session is open."""
        return self._session.reason if self._session else ""

    @property
    def pictures(self) -> str:
        """How images are sent, in words; empty before the session is open."""
        return self._session.writer.description if self._session else ""

    @property
    def deterministic(self) -> bool:
        """Whether the server guarantees replies bit-equal to the policy's in any other process."""
        return self._session is not None and self._session.deterministic

    @property
    def policy_id(self) -> int:
        """The id of the policy that computed the last reply; 0 before the first.

        1 for the server's first policy, one more each time an operator replaces it.
        """
        return self._requests.policy_id

    def statistics(self) -> ClientStatistics:
        """Counts of requests and replies since the client was made."""
        return self._requests.statistics()

    # The session

    def open(self, schema: Schema) -> None:
        """Open the session for observations of ``schema`` (``messages.observation_schema``).

        Raises:
            ContractMismatch: The policy needs something else; names field, got and expected.
            Refused: The server refused the session, e.g. it has too many.
            TransportUnavailable: The only allowed transport cannot be used; says why.
            TransportTimeout, ProtocolError: As the constructor.
        """
        if self._session is not None:
            raise ValueError("open: the session is already open")
        self._open(schema)

    def _open(self, schema: Schema) -> ClientSession:
        trace_key = trace.new_key()
        attributes = {
            "kind": self._kind,
            "deterministic": self._deterministic,
            "trace": trace_key,
            **self._demand,
        }
        opened = self._connection.open(
            schema, self._options, client=self._name, attributes=attributes
        )
        session = ClientSession(opened, self.contract, self._requests, trace_key)
        if self._first_seed is not None:
            session.reset(self._first_seed)
            self._first_seed = None
        self._session, self._schema = session, schema
        self._requests.counts["sessions"] += 1
        return session

    def require_weights(self, expected_hash: str) -> None:
        """Require the weights and normalizers with this hash (``PolicyInfo.weights_hash``).

        An empty hash requires nothing. Others are accepted if this server's operator has replaced
        those by others since (``metronome ctl load``).

        Raises:
            ContractMismatch: Other weights, or a server that does not say their hash.
        """
        self._connection.require_weights(expected_hash)

    def reconnect(self, timeout_s: float = 30.0) -> None:
        """Open a new session after ``ServerLost``; retry with back-off for ``timeout_s``.

        Requests in flight are forgotten. The contract must be the one this client started with, and
        the weights those that the server described last; see ``require_weights``. A refusal is
        tried again: the server may not have noticed yet that the old session died.

        Raises:
            ServerLost: No server accepted within ``timeout_s``; has the last error.
            ContractMismatch: The server now has another policy.
        """
        schema = self._schema
        self._drop_session()
        self._lost = f"no session with {self.address} since reconnect() failed"
        self._connection.reconnect(timeout_s, lambda: None if schema is None else self.open(schema))
        self._lost = ""

    # Requests

    def loan_images(self) -> Mapping[str, NDArray[np.uint8]]:
        """Arrays by camera to render the next observation into, uint8 (height, width, 3), with a
        leading axis for a policy that takes several ticks (``PolicyContract.obs_axes``).

        They are the message's own arrays where images are sent unchanged: an observation with these
        array objects is then sent by the next ``submit`` or ``infer`` without a copy of its images.
        Empty before the session is open.

        Raises:
            ServerLost: The server is gone.
            ServerBusy: As ``submit``.
        """
        self._require_server()
        if self._session is None:
            return {}
        try:
            return self._session.loan_images()
        except (PeerGone, WouldBlock) as error:
            raise self._map_error(error) from error

    def submit(self, obs: MetaObs) -> int:
        """Send an observation, or keep it to be sent; return its request id.

        Raises:
            ServerLost: The server is gone.
            ServerBusy: The server has read none of the last requests yet; nothing was sent.
            ContractMismatch: The arrays of ``obs`` are not those of this session.
            Refused, TransportUnavailable, RequestTimeout: The session did not open; as ``open``.
        """
        session = self._session_for(obs)
        try:
            return session.submit(obs, budget_ns=0)
        except (PeerGone, WouldBlock) as error:
            raise self._map_error(error) from error

    def poll(self) -> ActionChunk | None:
        """The next chunk of a wanted request, or None; never blocks.

        Raises:
            PolicyError: A request failed with this error.
            ServerLost: The server is gone.
        """
        self._require_server()
        if self._session is None:
            return None
        try:
            return self._session.poll()
        except PeerGone as error:
            raise self._map_error(error) from error

    def infer(self, obs: MetaObs, timeout_s: float | None = None) -> ActionChunk:
        """Cancel earlier requests, send ``obs``, and wait for its chunk.

        Args:
            timeout_s: The limit for the reply; the constructor's by default. The first request
                opens the session, which has the constructor's limit.

        Raises:
            RequestTimeout: No reply within ``timeout_s``; raised early if the server cannot
                compute one in that time.
            PolicyError, ServerLost: As ``poll``.
            ValueError: ``timeout_s`` is not 0 to ``MAX_TIMEOUT_S``.
        """
        timeout_s = (
            self.timeout_s if timeout_s is None else _checked_timeout("timeout_s", timeout_s)
        )
        self.cancel()
        session = self._session_for(obs)
        deadline_ns = time.monotonic_ns() + round(timeout_s * 1e9)
        request_id: int | None = None
        while True:
            remaining_s = (deadline_ns - time.monotonic_ns()) / 1e9
            try:
                if request_id is None:
                    with contextlib.suppress(WouldBlock):  # its next reply frees a slot
                        request_id = session.submit(obs, max(1, round(remaining_s * 1e9)))
                answered_id, chunk = session.receive(max(0.0, remaining_s))
            except RequestExpired as error:
                raise RequestTimeout(
                    f"no answer from {self.address} within {timeout_s:g} s: {error}"
                ) from error
            except TransportTimeout as error:
                self.cancel()
                raise RequestTimeout(
                    f"no answer from {self.address} within {timeout_s:g} s"
                ) from error
            except PeerGone as error:
                raise self._map_error(error) from error
            if chunk is not None and answered_id == request_id:
                return chunk

    def cancel(self) -> None:
        """Cancel every request; replies that still arrive are dropped."""
        self._requests.cancel()

    def reset(self, seed: int | None = None) -> None:
        """Start a new episode: cancel every request, and reset the policy's state at the server.

        Args:
            seed: 0 to 2⁶³-1, for a policy that draws random numbers; see ``SamplingPolicy``.
                Without one its generator goes on. A seed that is given before the session opens is
                for its first episode.
        """
        self.cancel()
        self._require_server()
        if self._session is None:
            self._first_seed = seed
        else:
            try:
                self._session.reset(seed)
            except PeerGone as error:
                raise self._map_error(error) from error

    def fork(self) -> PolicyClient:
        """A new client of the same server, with the same options and its own session."""
        return PolicyClient(
            self.address,
            kind=self._kind,
            deterministic=self._deterministic,
            timeout_s=self.timeout_s,
            max_in_flight=self._max_in_flight,
            name=self._name,
            **self._demand,
            **self._options.keywords(),
        )

    def close(self) -> None:
        """End the session and the connection. Idempotent."""
        self._drop_session()
        self._connection.close()
        self._lost = self._lost or "this client was closed"

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Internal

    def _session_for(self, obs: MetaObs) -> ClientSession:
        """The open session; opened for observations like ``obs`` if there is none."""
        self._require_server()
        if self._session is not None:
            return self._session
        try:
            return self._open(messages.observation_schema(obs))
        except TransportTimeout as error:
            raise RequestTimeout(f"the session did not open: {error}") from error
        except PeerGone as error:
            raise self._map_error(error) from error

    def _require_server(self) -> None:
        if self._lost:
            raise ServerLost(self._lost)

    def _map_error(self, error: PeerGone | WouldBlock) -> ServerLost | ServerBusy:
        """The client's error for a transport's; after ``PeerGone`` the session is dropped."""
        if isinstance(error, WouldBlock):
            return ServerBusy(f"the server at {self.address} is busy: {error}")
        self._lost = f"the server at {self.address} is gone: {error}"
        self._drop_session()
        return ServerLost(self._lost)

    def _drop_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


def _checked_timeout(name: str, seconds: float) -> float:
    if not 0 <= seconds <= MAX_TIMEOUT_S:
        raise ValueError(f"{name}: got {seconds:g}, expected 0 to {MAX_TIMEOUT_S:g} seconds")
    return seconds
