"""Handles requests: runs the policy on one or on a batch, and sends replies and errors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from policies.errors import DeviceLost, InferenceError, PolicyError, RequestExpired
from policies.types import ActionChunk
from runtime.protocol import messages
from runtime.server.rate_limiter import TokenBucket
from runtime.server.scheduler import QueuedRequest
from runtime.server.session_state import SessionState
from runtime.server.state import ServerState
from runtime.trace import recorder as trace
from transport.channel import Kind, Message
from transport.errors import TransportError, ViewsHeld
from transport.server.listener_records import ServerSession

logger = logging.getLogger(__name__)


class RequestHandler:
    """Infers and replies. A failure of the policy affects only the requests it was computing.

    ``DeviceLost`` is the exception: the request gets it as its error, and
    ``ServerState.device_lost`` then ends the server.

    Args:
        end: Called with a session that cannot continue.
    """

    def __init__(self, state: ServerState, end: Callable[[ServerSession], None]) -> None:
        self._state, self._end = state, end

    def handle(self, request: QueuedRequest) -> None:
        """Infer one observation and reply."""
        session_state, message = self._state.sessions[request.session], request.content
        try:
            with message:
                self._serve_one(session_state, request, message)
        except ViewsHeld as error:
            self.end_for_kept_views(session_state.session, error)

    def _serve_one(
        self, session_state: SessionState, request: QueuedRequest, message: Message
    ) -> None:
        began_ns = time.monotonic_ns()
        try:
            chunk = self._infer(session_state, message)
        except DeviceLost as error:
            self._fail(session_state, message, self._state.lose_device(error))
        except PolicyError as error:
            self._fail(session_state, message, error)
        except Exception as error:
            # Third-party code: a bug in it fails this request, not the other robots.
            logger.exception("session %d: the policy failed", session_state.session.id)
            self._fail(session_state, message, InferenceError(f"the policy failed: {error!r}"))
        else:
            self._state.costs.add(1, time.monotonic_ns() - began_ns)
            self._reply(session_state, request, chunk, began_ns - request.arrived_ns, 1)

    def _infer(self, session_state: SessionState, message: Message) -> ActionChunk:
        """A separate function, so that the observation's views are gone before the release."""
        obs = session_state.read(message.arrays)
        chunk = session_state.policy.infer(obs)
        self._check(chunk, obs.timestep)
        return chunk

    def handle_batch(self, batch: list[QueuedRequest]) -> None:
        """Infer several sessions' observations at once; a failure of one affects no other."""
        began_ns = time.monotonic_ns()
        try:
            results = self._infer_batch(batch)
        except DeviceLost as error:
            results = [self._state.lose_device(error)] * len(batch)
        except Exception as error:
            logger.exception("the policy failed on a batch of %d", len(batch))
            results = [InferenceError(f"the policy failed: {error!r}")] * len(batch)
        else:
            size = next((n for n in self._state.scheduler.sizes if n >= len(batch)), len(batch))
            self._state.costs.add(size, time.monotonic_ns() - began_ns)
        self._state.counts["batches"] += 1
        for request, result in zip(batch, results, strict=True):
            session_state, message = self._state.sessions[request.session], request.content
            try:
                with message:
                    if isinstance(result, PolicyError):
                        self._fail(session_state, message, result)
                    else:
                        waited_ns = began_ns - request.arrived_ns
                        self._reply(session_state, request, result, waited_ns, len(batch))
            except ViewsHeld as error:
                self.end_for_kept_views(session_state.session, error)

    def _infer_batch(self, batch: list[QueuedRequest]) -> list[ActionChunk | PolicyError]:
        """Results in the batch's order. A separate function for the reason of ``_infer``."""
        results: list[ActionChunk | PolicyError | None] = [None] * len(batch)
        indices, observations = [], []
        for index, request in enumerate(batch):
            session_state = self._state.sessions[request.session]
            try:
                observations.append(session_state.read(request.content.arrays))
                indices.append(index)
            except PolicyError as error:
                results[index] = error
        infer_batch = self._state.model.infer_batch
        if infer_batch is None:
            raise InferenceError("this policy has no infer_batch")
        computed = infer_batch(observations) if observations else []
        for index, obs, result in zip(indices, observations, computed, strict=True):
            if isinstance(result, DeviceLost):
                result = self._state.lose_device(result)  # noqa: PLW2901
            results[index] = result
            if not isinstance(result, PolicyError):
                try:
                    self._check(result, obs.timestep)
                except PolicyError as error:
                    results[index] = error
        return [result or InferenceError("the policy returned nothing") for result in results]

    def _check(self, chunk: ActionChunk, timestep: int) -> None:
        messages.check_chunk(chunk, self._state.model.policy.contract)
        if chunk.obs_timestep != timestep:
            raise InferenceError(
                f"the policy returned a chunk for tick {chunk.obs_timestep}, expected "
                f"{timestep}: it must copy obs.timestep"
            )

    def reply_expired(self, request: QueuedRequest) -> None:
        """Reply that the request expired before it could be computed."""
        self._state.counts["late"] += 1
        session_state, message = self._state.sessions[request.session], request.content
        session_state.counts["late"] += 1
        budget_ms, waited_ms = (
            (ns - request.arrived_ns) / 1e6 for ns in (request.deadline_ns, time.monotonic_ns())
        )
        error = RequestExpired(
            f"the request expired: it had {budget_ms:.1f} ms, waited {waited_ms:.1f}, "
            f"and an inference takes at least {self._state.costs.min(1) / 1e6:.1f}"
        )
        try:
            with message:
                self._fail(session_state, message, error)
        except ViewsHeld as held:
            self.end_for_kept_views(session_state.session, held)

    def reply_rate_limited(
        self, session_state: SessionState, message: Message, rate_limiter: TokenBucket
    ) -> None:
        """Reply that the session sends more requests per second than allowed."""
        self._state.counts["too_many"] += 1
        with message:
            error = InferenceError(
                f"too many requests: expected at most {rate_limiter.rate_hz:g} per s"
            )
            self._fail(session_state, message, error)

    def reply_superseded(self, session_state: SessionState, message: Message, by: int) -> None:
        """Reply that a newer request of the session, with id ``by``, replaces this one."""
        self._state.counts["superseded"] += 1
        session_state.counts["superseded"] += 1
        with message:
            body = str(by).encode()
            self._send(
                session_state,
                lambda: session_state.session.channel.send_body(
                    Kind.SUPERSEDED, message.request_id, body
                ),
            )

    def _reply(
        self,
        session_state: SessionState,
        request: QueuedRequest,
        chunk: ActionChunk,
        waited_ns: int,
        batch_size: int,
    ) -> None:
        session = session_state.session
        try:
            loan = session.channel.loan()
        except TransportError as error:
            logger.warning("session %d: the reply was not sent: %s", session.id, error)
            return
        loan.announce()
        number = request.content.request_id
        inferred_ns = time.monotonic_ns() if trace.on else 0
        try:
            messages.write_chunk(chunk, waited_ns, session_state.generation, loan.arrays)
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            # Third-party code made the chunk, and only its actions were checked.
            loan.cancel()
            failure = InferenceError(f"the policy's chunk cannot be sent: {error!r}")
            self._fail(session_state, request.content, failure)
            return
        try:
            loan.publish(number)
        except TransportError as error:
            logger.warning("session %d: the reply was not sent: %s", session.id, error)
        self._state.counts["answered"] += 1
        session_state.count_reply(request, batch_size)
        if trace.on:
            flow, arrived_ns = trace.flow_id(session_state.trace_key, number), request.arrived_ns
            trace.add_served(chunk.stages_ns, arrived_ns, arrived_ns + waited_ns, inferred_ns, flow)

    def _fail(self, session_state: SessionState, message: Message, error: PolicyError) -> None:
        logger.info(
            "session %d: request %d: %s", session_state.session.id, message.request_id, error
        )
        self._state.counts["failed"] += 1
        session_state.counts["failed"] += 1
        body = messages.encode_error(error)
        self._send(
            session_state,
            lambda: session_state.session.channel.send_body(Kind.ERROR, message.request_id, body),
        )

    def _send(self, session_state: SessionState, send: Callable[[], None]) -> None:
        try:
            send()
        except TransportError as error:
            logger.warning(
                "session %d: the reply was not sent: %s", session_state.session.id, error
            )

    def end_for_kept_views(self, session: ServerSession, error: ViewsHeld) -> None:
        """End a session whose policy keeps views of an observation's arrays.

        Its slots cannot be reused, so later observations could not arrive. Ending the session now
        gives the client the reason.
        """
        logger.error("session %d: the policy keeps views of an observation: %s", session.id, error)
        session.channel.close(f"the policy keeps views of an observation: {error}")
        self._end(session)
