"""A policy that runs in another process: ``PolicyClient`` is a ``Policy`` and an ``AsyncPolicy``.

Guaranteed:

* ``submit`` and ``poll`` never wait for the model; on shared memory they are memory operations.
* At most ``max_in_flight`` requests are unanswered. Beyond that one observation waits, the newest:
  an older one that waited is superseded, counted, and never sent.
* An answer is given out only if its request is still wanted. Answers to requests that timed out,
  were cancelled or belong to another session are dropped and counted.
* A dead server is ``ServerLost``, and stays so until ``reconnect``: whether an arm goes on after a
  loss is the caller's decision.

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
from runtime.client.connection import ServerConnection
from runtime.client.requests import ClientStatistics, PendingRequests
from runtime.client.session import ClientSession
from runtime.errors import RequestTimeout, ServerBusy, ServerLost
from runtime.options.connection import ConnectionOptions
from runtime.protocol import messages
from runtime.trace import recorder as trace
from transport.base import SLOTS
from transport.errors import PeerGone, TransportTimeout, WouldBlock
from transport.schema import Schema

SessionKind = Literal["robot", "sim"]
MOST_S = 1e6
"""The longest ``timeout_s``: what is longer is an infinity, or a number of milliseconds."""
MAX_IN_FLIGHT = SLOTS - 1
"""One of a direction's slots is for the observation that waits."""


class PolicyClient:
    """A session with a policy server.

    The contract is read at once; the session itself is opened with the first observation, whose
    shapes it keeps, or by ``open``.

    Args:
        address: ``"HOST:PORT"`` or ``"[V6]:PORT"``.
        transport: ``"auto"``, or ``"shm"`` or ``"zmq"`` to force one.
        kind: ``"robot"`` or ``"sim"``; the server logs it and reports it.
        deterministic: Ask for answers that are bit-equal wherever the policy runs; whether they
            are is ``deterministic`` once the session is open.
        timeout_s: For the handshake, and for ``infer`` unless told otherwise.
        max_in_flight: Requests that may be unanswered at a time, 1 to ``MAX_IN_FLIGHT``.
        name: What the server calls this client in its log.
        resize: Bring pictures to the model's size here, with the same bits as at the server: for
            links that are slow, and where the server's processor is scarcer than this one's.
        jpeg_quality: Send pictures as JPEG of this quality, 1 to 100, where the session goes over
            a network. Lossy; needs ``simplejpeg`` on both sides.
        server_key, client_key: Key files (``runtime.tools.keys``), for a server that wants keys:
            its public one, and one's own secret one.
        rate_hz: How often it means to ask, and deadline_ms: how soon it needs its answers. A server
            of many clients that cannot keep them refuses the session, with the numbers.

    Raises:
        JpegMissing: ``jpeg_quality`` without ``simplejpeg``.
        KeyFileError: A key file that cannot be used.
        Refused: The server does not let this key in.
        TransportTimeout: Nothing answered there.
        ProtocolError: What answered speaks another version.
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
        self.address, self.timeout_s = address, _finite("timeout_s", timeout_s)
        self._options = ConnectionOptions(transport, resize, jpeg_quality, server_key, client_key)
        self._options.check()
        self._kind, self._deterministic = kind, deterministic
        self._max_in_flight = max_in_flight
        asked = {"rate_hz": rate_hz, "deadline_ms": deadline_ms}
        self._demand: dict[str, Any] = {
            name: value for name, value in asked.items() if value is not None
        }
        self._name = name or f"pid {os.getpid()}"
        self._schema: Schema | None = None
        self._session: ClientSession | None = None
        self._requests = PendingRequests(max_in_flight)
        self._lost = ""
        self._service = ServerConnection(address, timeout_s, self._options.keys())

    # What it is

    @property
    def contract(self) -> PolicyContract:
        return self._service.contract

    @property
    def info(self) -> PolicyInfo:
        """Where the policy runs, as the server says."""
        return self._service.info

    @property
    def transport(self) -> str:
        """``"shm"`` or ``"zmq"``; empty before the session is open."""
        return self._session.channel.transport if self._session else ""

    @property
    def transport_reason(self) -> str:
        """Why this transport."""
        return self._session.reason if self._session else ""

    @property
    def pictures(self) -> str:
        """How pictures cross, in words; empty before the session is open."""
        return self._session.pictures.description if self._session else ""

    @property
    def deterministic(self) -> bool:
        """Whether the server grants that answers are bit-equal wherever the policy runs."""
        return self._session is not None and self._session.deterministic

    @property
    def policy_id(self) -> int:
        """Which of the server's policies gave the last answer: 1, and one more each time an
        operator replaced it; 0 before the first."""
        return self._requests.policy_id

    def statistics(self) -> ClientStatistics:
        return self._requests.statistics()

    # The session

    def open(self, schema: Schema) -> None:
        """Open the session for observations of ``schema`` (``messages.observation_schema``).

        Raises:
            ContractMismatch: Not what the policy needs; names field, got and expected.
            Refused: The server declined for a reason of its own, e.g. too many sessions.
            TransportUnavailable: The transport that was forced cannot be had, and why.
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
        opened = self._service.open(schema, self._options, client=self._name, attributes=attributes)
        session = ClientSession(opened, self.contract, self._requests, trace_key)
        self._session, self._schema = session, schema
        self._requests.counts["sessions"] += 1
        return session

    def reconnect(self, timeout_s: float = 30.0) -> None:
        """Start a new session after ``ServerLost``, trying with back-off for ``timeout_s``.

        Everything in flight is forgotten. The contract must be the one this client started with.
        A server that refuses is asked again: it may not have noticed yet that the old session died.

        Raises:
            ServerLost: No server took us in time; says what the last one said.
            ContractMismatch: A server with another policy answered.
        """
        schema = self._schema
        self._drop_session()
        self._lost = f"no session with {self.address} since reconnect() failed"
        self._service.redial(timeout_s, lambda: None if schema is None else self.open(schema))
        self._lost = ""

    # Requests

    def loan_images(self) -> Mapping[str, NDArray[np.uint8]]:
        """Arrays by camera to render the next observation into: the message's own, where pictures
        cross as they are. Empty before the session is open.

        Give an observation with these very arrays to the next ``submit`` or ``infer`` and the
        pictures are not copied on the way out.

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
            raise self._mapped(error) from error

    def submit(self, obs: MetaObs) -> int:
        """Hand over an observation, return its request id.

        Raises:
            ServerLost: The server is gone.
            ServerBusy: It has not looked at any of the last requests yet; nothing was sent.
            ContractMismatch: Not an observation of this session's kind.
            Refused, TransportUnavailable, RequestTimeout: At the opening, as ``open``.
        """
        session = self._session_for(obs)
        try:
            return session.submit(obs, budget_ns=0)
        except (PeerGone, WouldBlock) as error:
            raise self._mapped(error) from error

    def poll(self) -> ActionChunk | None:
        """The next finished chunk, or None; never blocks.

        Raises:
            PolicyError: What a request failed with.
            ServerLost: The server is gone.
        """
        self._require_server()
        if self._session is None:
            return None
        try:
            return self._session.poll()
        except PeerGone as error:
            raise self._mapped(error) from error

    def infer(self, obs: MetaObs, timeout_s: float | None = None) -> ActionChunk:
        """The chunk for ``obs``: ``submit`` and wait. Earlier requests are cancelled.

        Args:
            timeout_s: The time from now on that the answer has. The opening of the session, by
                the first request, has ``timeout_s`` of the constructor instead.

        Raises:
            RequestTimeout: No answer within ``timeout_s``; or at once, where the server cannot
                compute one in that time.
            PolicyError, ServerLost: As ``poll``.
            ValueError: ``timeout_s`` is not 0 to ``MOST_S``.
        """
        timeout_s = self.timeout_s if timeout_s is None else _finite("timeout_s", timeout_s)
        self.cancel()
        session = self._session_for(obs)
        deadline_ns = time.monotonic_ns() + round(timeout_s * 1e9)
        request_id: int | None = None
        while True:
            remaining_s = (deadline_ns - time.monotonic_ns()) / 1e9
            try:
                if request_id is None:
                    with contextlib.suppress(WouldBlock):  # its next answer makes room
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
                raise self._mapped(error) from error
            if chunk is not None and answered_id == request_id:
                return chunk

    def cancel(self) -> None:
        """Forget every request; what is still answered will be dropped."""
        self._requests.cancel()

    def reset(self) -> None:
        """Start a new episode: cancel, and tell the server to forget this session's episode."""
        self.cancel()
        self._require_server()
        if self._session is not None:
            try:
                self._session.reset()
            except PeerGone as error:
                raise self._mapped(error) from error

    def fork(self) -> PolicyClient:
        """A client with a session of its own at the same server."""
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
        """End the session. Idempotent."""
        self._drop_session()
        self._service.close()
        self._lost = self._lost or "this client was closed"

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Inside

    def _session_for(self, obs: MetaObs) -> ClientSession:
        """The session; where there is none, one for observations like ``obs`` is opened."""
        self._require_server()
        if self._session is not None:
            return self._session
        try:
            return self._open(messages.observation_schema(obs))
        except TransportTimeout as error:
            raise RequestTimeout(f"the session did not open: {error}") from error
        except PeerGone as error:
            raise self._mapped(error) from error

    def _require_server(self) -> None:
        if self._lost:
            raise ServerLost(self._lost)

    def _mapped(self, error: PeerGone | WouldBlock) -> ServerLost | ServerBusy:
        """What a transport's error means here. Without its server a client has no session."""
        if isinstance(error, WouldBlock):
            return ServerBusy(f"the server at {self.address} is busy: {error}")
        self._lost = f"the server at {self.address} is gone: {error}"
        self._drop_session()
        return ServerLost(self._lost)

    def _drop_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


def _finite(name: str, seconds: float) -> float:
    if not 0 <= seconds <= MOST_S:
        raise ValueError(f"{name}: got {seconds:g}, expected 0 to {MOST_S:g} seconds")
    return seconds
