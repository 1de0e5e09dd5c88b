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
import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from policies.errors import ContractMismatch
from policies.types import ActionChunk, MetaObs, PolicyContract, PolicyInfo
from runtime import messages
from runtime.errors import RequestTimeout, ServerBusy, ServerLost
from transport.auto import Dialer, parse_address
from transport.base import SLOTS
from transport.channel import Channel, Kind, Loan, Message
from transport.errors import PeerGone, TransportError, TransportTimeout, WouldBlock
from transport.schema import Schema

logger = logging.getLogger(__name__)

SessionKind = Literal["robot", "sim"]
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.05, 1.0
MAX_IN_FLIGHT = SLOTS - 1
"""One of a direction's slots is for the observation that waits."""


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """Counts since the client was made.

    Attributes:
        requests: Observations published.
        replies: Chunks given out.
        failures: Requests answered with an error.
        superseded: Observations passed over for a newer one, here or at the server.
        dropped_late: Answers that nobody wanted any more.
        sessions: Sessions opened; more than one after a reconnect.
    """

    requests: int = 0
    replies: int = 0
    failures: int = 0
    superseded: int = 0
    dropped_late: int = 0
    sessions: int = 0


@dataclass(slots=True)
class _Request:
    began_ns: int
    packed_ns: int
    budget_ns: int = 0
    published_ns: int = 0
    wanted: bool = True


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

    Raises:
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
    ) -> None:
        if not 1 <= max_in_flight <= MAX_IN_FLIGHT:
            raise ValueError(f"max_in_flight: got {max_in_flight}, expected 1 to {MAX_IN_FLIGHT}")
        self.address = address
        self.timeout_s = timeout_s
        self._wish, self._kind, self._deterministic = transport, kind, deterministic
        self._max_in_flight = max_in_flight
        self._name = name or f"pid {os.getpid()}"
        self._schema: Schema | None = None
        self._channel: Channel | None = None
        self._loan: Loan | None = None
        self._waiting: int | None = None  # the request whose observation sits in self._loan
        self._in_flight: dict[int, _Request] = {}
        self._reset_due = False
        self._granted = False
        self._last_id = 0
        self._lost = ""
        self._counts = dict.fromkeys(ClientStatistics.__slots__, 0)
        self._dialer = Dialer(*parse_address(address), timeout_s=timeout_s)
        try:
            self._contract, self._info = messages.read_description(self._dialer.describe())
        except BaseException:
            self._dialer.close()
            raise

    # What it is

    @property
    def contract(self) -> PolicyContract:
        return self._contract

    @property
    def info(self) -> PolicyInfo:
        """Where the policy runs, as the server says."""
        return self._info

    @property
    def transport(self) -> str:
        """``"shm"`` or ``"zmq"``; empty before the session is open."""
        return self._channel.transport if self._channel else ""

    @property
    def transport_reason(self) -> str:
        """Why this transport."""
        return str(getattr(self._channel, "transport_reason", ""))

    @property
    def deterministic(self) -> bool:
        """Whether the server grants that answers are bit-equal wherever the policy runs."""
        return self._granted

    def statistics(self) -> ClientStatistics:
        return ClientStatistics(**self._counts)

    # The session

    def open(self, schema: Schema) -> None:
        """Open the session for observations of ``schema`` (``messages.observation_schema``).

        Raises:
            ContractMismatch: Not what the policy needs; names field, got and expected.
            Refused: The server declined for a reason of its own, e.g. too many sessions.
            TransportUnavailable: The transport that was forced cannot be had, and why.
            TransportTimeout, ProtocolError: As the constructor.
        """
        if self._channel is not None:
            raise ValueError("open: the session is already open")
        # The same check as the server's, so that the answer needs no round trip.
        messages.check_observation_schema(schema, self._contract)
        channel, welcome = self._dialer.open(
            schema,
            client=self._name,
            transport=self._wish,
            attributes={"kind": self._kind, "deterministic": self._deterministic},
        )
        theirs, ours = welcome.attributes.get("contract"), messages.contract_hash(self._contract)
        if theirs != ours or welcome.schema != messages.reply_schema(self._contract):
            channel.close("this client was made for another policy")
            raise ContractMismatch(
                "contract", f"{theirs!r}, another server's at {self.address}", f"{ours!r}"
            )
        self._channel, self._schema = channel, schema
        self._granted = welcome.attributes.get("deterministic") is True
        self._counts["sessions"] += 1
        logger.info(
            "session with %s over %s: %s", self.address, self.transport, self.transport_reason
        )

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
        deadline_s = time.monotonic() + timeout_s
        backoff_s = FIRST_BACKOFF_S
        while True:
            self._dialer.close()
            remaining_s = deadline_s - time.monotonic()
            try:
                self._dialer = Dialer(
                    *parse_address(self.address),
                    timeout_s=max(0.1, min(self.timeout_s, remaining_s)),
                )
                contract, self._info = messages.read_description(self._dialer.describe())
                if contract != self._contract:
                    raise ContractMismatch("contract", f"{contract}", f"{self._contract}")
                if schema is not None:
                    self.open(schema)
                self._lost = ""
                return
            except TransportError as error:
                if time.monotonic() + backoff_s >= deadline_s:
                    raise ServerLost(
                        f"no server at {self.address} within {timeout_s:g} s: {error}"
                    ) from error
            time.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)

    # Requests

    def loan_images(self) -> Mapping[str, NDArray[np.uint8]]:
        """The next message's own picture arrays by camera, to render into (needs an open session).

        Give an observation with these very arrays to the next ``submit`` or ``infer`` and the
        pictures are not copied on the way out.

        Raises:
            ServerLost: The server is gone.
            ServerBusy: As ``submit``.
            ValueError: The session is not open.
        """
        self._require_server()
        self._supersede_waiting()
        loan = self._take_loan()
        start = len(messages.IMAGE)
        return {n[start:]: a for n, a in loan.arrays.items() if n.startswith(messages.IMAGE)}

    def submit(self, obs: MetaObs) -> int:
        """Hand over an observation, return its request id.

        Raises:
            ServerLost: The server is gone.
            ServerBusy: It has not looked at any of the last requests yet; nothing was sent.
            ContractMismatch: Not an observation of this session's kind.
            Refused, TransportUnavailable, RequestTimeout: At the opening, as ``open``.
        """
        return self._submit(obs, 0)

    def _submit(self, obs: MetaObs, budget_ns: int) -> int:
        self._require_server()
        if self._channel is None:
            try:
                self.open(messages.observation_schema(obs))
            except TransportTimeout as error:
                raise RequestTimeout(f"the session did not open: {error}") from error
            except PeerGone as error:
                raise self._server_lost(str(error)) from error
        began_ns = time.monotonic_ns()  # opening the session is not part of any request
        self._supersede_waiting()
        loan = self._take_loan()
        messages.write_observation(obs, loan.arrays)
        self._last_id += 1
        self._in_flight[self._last_id] = _Request(began_ns, time.monotonic_ns(), budget_ns)
        self._waiting = self._last_id
        self._publish_waiting()
        return self._last_id

    def poll(self) -> ActionChunk | None:
        """The next finished chunk, or None; never blocks.

        Raises:
            PolicyError: What a request failed with.
            ServerLost: The server is gone.
        """
        self._require_server()
        if self._channel is None:
            return None
        try:
            while (message := self._channel.poll()) is not None:
                _, chunk = self._take(message)
                if chunk is not None:
                    return chunk
        except PeerGone as error:
            raise self._server_lost(str(error)) from error
        return None

    def infer(self, obs: MetaObs, timeout_s: float | None = None) -> ActionChunk:
        """The chunk for ``obs``: ``submit`` and wait. Earlier requests are cancelled.

        Raises:
            RequestTimeout: No answer within ``timeout_s``.
            PolicyError, ServerLost: As ``poll``.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_ns = time.monotonic_ns() + round(timeout_s * 1e9)
        self.cancel()
        request_id: int | None = None
        while True:
            remaining_s = (deadline_ns - time.monotonic_ns()) / 1e9
            try:
                if request_id is None:
                    with contextlib.suppress(ServerBusy):
                        request_id = self._submit(obs, max(1, round(remaining_s * 1e9)))
                answered_id, chunk = self._take(self._open_channel().recv(max(0.0, remaining_s)))
            except TransportTimeout as error:
                self.cancel()
                raise RequestTimeout(
                    f"no answer from {self.address} within {timeout_s:g} s"
                ) from error
            except PeerGone as error:
                raise self._server_lost(str(error)) from error
            if chunk is not None and answered_id == request_id:
                return chunk

    def cancel(self) -> None:
        """Forget every request; what is still answered will be dropped."""
        self._supersede_waiting()
        for request in self._in_flight.values():
            request.wanted = False

    def reset(self) -> None:
        """Start a new episode: cancel, and tell the server to forget this session's episode."""
        self.cancel()
        self._require_server()
        self._drop_loan()
        self._reset_due = self._channel is not None
        with contextlib.suppress(ServerBusy):  # then it goes before the next observation
            self._send_reset()

    def fork(self) -> PolicyClient:
        """A client with a session of its own at the same server."""
        return PolicyClient(
            self.address,
            transport=self._wish,
            kind=self._kind,
            deterministic=self._deterministic,
            timeout_s=self.timeout_s,
            max_in_flight=self._max_in_flight,
            name=self._name,
        )

    def close(self) -> None:
        """End the session. Idempotent."""
        self._drop_session()
        self._dialer.close()
        self._lost = self._lost or "this client was closed"

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Inside

    def _open_channel(self) -> Channel:
        if self._channel is None:
            raise ValueError("the session is not open: call open(schema) first")
        return self._channel

    def _take_loan(self) -> Loan:
        if self._loan is None:
            self._send_reset()
            channel = self._open_channel()
            with self._mapped_errors():
                self._loan = channel.loan()
        return self._loan

    def _send_reset(self) -> None:
        if self._reset_due:
            self._last_id += 1
            channel = self._open_channel()
            with self._mapped_errors():
                channel.send_body(Kind.RESET, self._last_id)
            self._reset_due = False

    @contextlib.contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except PeerGone as error:
            raise self._server_lost(str(error)) from error
        except WouldBlock as error:
            raise ServerBusy(f"the server at {self.address} is busy: {error}") from error

    def _publish_waiting(self) -> None:
        """Publish the waiting observation if the bound allows.

        Only requests that are still wanted count: an answer that was given up, or that a server
        lost, must not hold up the ones after it. The ring bounds them all the same.
        """
        if self._waiting is None or self._loan is None:
            return
        if sum(r.wanted for r in self._in_flight.values()) > self._max_in_flight:
            return
        request, loan = self._in_flight[self._waiting], self._loan
        self._loan = None
        with self._mapped_errors():
            loan.publish(self._waiting, budget_ns=request.budget_ns)
        request.published_ns = time.monotonic_ns()
        self._waiting = None
        self._counts["requests"] += 1

    def _supersede_waiting(self) -> None:
        if self._waiting is not None:
            del self._in_flight[self._waiting]
            self._waiting = None
            self._counts["superseded"] += 1

    def _take(self, message: Message) -> tuple[int, ActionChunk | None]:
        """Account for an answer; its chunk, or None when there is none to give out."""
        received_ns = time.monotonic_ns()
        with message:
            request = self._in_flight.pop(message.request_id, None)
            # Answers come in order: what was asked before and is not wanted needs none any more.
            for earlier in [i for i, r in self._in_flight.items() if i < message.request_id]:
                if not self._in_flight[earlier].wanted:
                    del self._in_flight[earlier]
            try:
                if request is None or not request.wanted:
                    self._counts["dropped_late"] += 1
                elif message.kind is Kind.DATA:
                    chunk = messages.read_chunk(message.arrays, self._contract)
                    self._counts["replies"] += 1
                    return message.request_id, _with_stages(chunk, request, received_ns)
                elif message.kind is Kind.SUPERSEDED:
                    self._counts["superseded"] += 1
                else:
                    self._counts["failures"] += 1
                    raise messages.decode_error(message.body)
                return message.request_id, None
            finally:
                with contextlib.suppress(ServerLost, ServerBusy):  # the next call will say so
                    self._publish_waiting()

    def _require_server(self) -> None:
        if self._lost:
            raise ServerLost(self._lost)

    def _server_lost(self, reason: str) -> ServerLost:
        self._lost = f"the server at {self.address} is gone: {reason}"
        self._drop_session()
        return ServerLost(self._lost)

    def _drop_loan(self) -> None:
        if self._loan is not None:
            self._loan.cancel()
            self._loan = None

    def _drop_session(self) -> None:
        self._drop_loan()
        self._waiting = None
        self._in_flight.clear()
        self._reset_due = False
        if self._channel is not None:
            channel, self._channel = self._channel, None
            try:
                channel.close()
            except TransportError as error:
                logger.debug("closing the channel: %s", error)


def _with_stages(chunk: ActionChunk, request: _Request, received_ns: int) -> ActionChunk:
    """``chunk`` with this side's stages; all of them add up to the request.

    What is neither ours nor the server's is the wire's, both ways: ``publish`` on the way out,
    ``reply`` the rest. Publishing wakes the server, which may be at work before our call returns;
    that overlap is the server's time, not counted twice.
    """
    wire_ns = received_ns - request.packed_ns - sum(chunk.stages_ns.values())
    publish_ns = min(request.published_ns - request.packed_ns, wire_ns)
    stages = {
        "pack": request.packed_ns - request.began_ns,
        "publish": publish_ns,
        **chunk.stages_ns,
        "reply": wire_ns - publish_ns,
        "unpack": time.monotonic_ns() - received_ns,
    }
    return dataclasses.replace(chunk, stages_ns=stages)
