"""What becomes of a request: computed alone or in a batch, refused, passed over; and the reply."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from policies.errors import InferenceError, PolicyError, RequestExpired
from policies.types import ActionChunk
from runtime.protocol import messages
from runtime.server.rate_limiter import TokenBucket
from runtime.server.scheduler import QueuedRequest
from runtime.server.session import SessionState
from runtime.server.state import ServerState
from runtime.trace import recorder as trace
from transport.channel import Kind, Message
from transport.errors import TransportError, ViewsHeld
from transport.server.sessions import ServerSession

logger = logging.getLogger(__name__)


class RequestHandler:
    """Infers and replies; whatever a policy does costs the requests it was asked for, no more.

    Args:
        end: Called with a session that cannot go on.
    """

    def __init__(self, state: ServerState, end: Callable[[ServerSession], None]) -> None:
        self._state, self._end = state, end

    def answer(self, request: QueuedRequest) -> None:
        """One observation, alone."""
        served, message = self._state.sessions[request.session], request.content
        try:
            with message:
                self._serve_one(served, request, message)
        except ViewsHeld as error:
            self.end_for_kept_views(served.session, error)

    def _serve_one(self, served: SessionState, request: QueuedRequest, message: Message) -> None:
        began_ns = time.monotonic_ns()
        try:
            chunk = self._infer(served, message)
        except PolicyError as error:
            self._fail(served, message, error)
        except Exception as error:
            # Anyone's policy runs here. Its bug costs this request, not the other robots.
            logger.exception("session %d: the policy failed", served.session.id)
            self._fail(served, message, InferenceError(f"the policy failed: {error!r}"))
        else:
            self._state.costs.add(1, time.monotonic_ns() - began_ns)
            self._reply(served, request, chunk, began_ns - request.arrived_ns, 1)

    def _infer(self, served: SessionState, message: Message) -> ActionChunk:
        """A call of its own, so that the observation's views end with it, before the release."""
        obs = served.read(message.arrays)
        chunk = served.policy.infer(obs)
        self._check(chunk, obs.timestep)
        return chunk

    def answer_batch(self, batch: list[QueuedRequest]) -> None:
        """Several sessions' observations at once; one that fails costs no other."""
        began_ns = time.monotonic_ns()
        try:
            answers = self._infer_batch(batch)
        except Exception as error:
            logger.exception("the policy failed on a batch of %d", len(batch))
            answers = [InferenceError(f"the policy failed: {error!r}")] * len(batch)
        else:
            size = next((n for n in self._state.scheduler.sizes if n >= len(batch)), len(batch))
            self._state.costs.add(size, time.monotonic_ns() - began_ns)
        self._state.counts["batches"] += 1
        for request, answer in zip(batch, answers, strict=True):
            served, message = self._state.sessions[request.session], request.content
            try:
                with message:
                    if isinstance(answer, PolicyError):
                        self._fail(served, message, answer)
                    else:
                        waited_ns = began_ns - request.arrived_ns
                        self._reply(served, request, answer, waited_ns, len(batch))
            except ViewsHeld as error:
                self.end_for_kept_views(served.session, error)

    def _infer_batch(self, batch: list[QueuedRequest]) -> list[ActionChunk | PolicyError]:
        """In the batch's order; a call of its own as ``_infer``."""
        answers: list[ActionChunk | PolicyError | None] = [None] * len(batch)
        places, observations = [], []
        for place, request in enumerate(batch):
            served = self._state.sessions[request.session]
            try:
                observations.append(served.read(request.content.arrays))
                places.append(place)
            except PolicyError as error:
                answers[place] = error
        infer_batch = self._state.model.infer_batch
        if infer_batch is None:
            raise InferenceError("this policy has no infer_batch")
        found = infer_batch(observations) if observations else []
        for place, obs, answer in zip(places, observations, found, strict=True):
            answers[place] = answer
            if not isinstance(answer, PolicyError):
                try:
                    self._check(answer, obs.timestep)
                except PolicyError as error:
                    answers[place] = error
        return [answer or InferenceError("the policy did not answer") for answer in answers]

    def _check(self, chunk: ActionChunk, timestep: int) -> None:
        messages.check_chunk(chunk, self._state.model.policy.contract)
        if chunk.obs_timestep != timestep:
            raise InferenceError(
                f"the policy answered for tick {chunk.obs_timestep}, asked for "
                f"{timestep}: it must pass obs.timestep on"
            )

    def reply_expired(self, request: QueuedRequest) -> None:
        """Its time was up before it could be computed."""
        self._state.counts["late"] += 1
        served, message = self._state.sessions[request.session], request.content
        served.counts["late"] += 1
        budget_ms, waited_ms = (
            (ns - request.arrived_ns) / 1e6 for ns in (request.deadline_ns, time.monotonic_ns())
        )
        error = RequestExpired(
            f"the request's time was up: it had {budget_ms:.1f} ms, waited {waited_ms:.1f}, "
            f"and an inference takes at least {self._state.costs.least(1) / 1e6:.1f}"
        )
        try:
            with message:
                self._fail(served, message, error)
        except ViewsHeld as held:
            self.end_for_kept_views(served.session, held)

    def reply_rate_limited(self, served: SessionState, message: Message, pace: TokenBucket) -> None:
        """The session asks more often than it may."""
        self._state.counts["too_many"] += 1
        with message:
            error = InferenceError(f"too many requests: expected at most {pace.rate_hz:g} per s")
            self._fail(served, message, error)

    def reply_superseded(self, served: SessionState, message: Message, by: int) -> None:
        """A newer request of the session, ``by``, takes its place."""
        self._state.counts["superseded"] += 1
        served.counts["superseded"] += 1
        with message:
            body = str(by).encode()
            self._send(
                served,
                lambda: served.session.channel.send_body(Kind.SUPERSEDED, message.request_id, body),
            )

    def _reply(
        self,
        served: SessionState,
        request: QueuedRequest,
        chunk: ActionChunk,
        waited_ns: int,
        n: int,
    ) -> None:
        session = served.session
        try:
            loan = session.channel.loan()
        except TransportError as error:
            logger.warning("session %d: the answer was not sent: %s", session.id, error)
            return
        loan.announce()
        number = request.content.request_id
        inferred_ns = time.monotonic_ns() if trace.on else 0
        try:
            messages.write_chunk(chunk, waited_ns, served.generation, loan.arrays)
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            # Anyone's policy made it, and only its actions were checked.
            loan.cancel()
            failure = InferenceError(f"the policy's answer cannot be sent: {error!r}")
            self._fail(served, request.content, failure)
            return
        try:
            loan.publish(number)
        except TransportError as error:
            logger.warning("session %d: the answer was not sent: %s", session.id, error)
        self._state.counts["answered"] += 1
        served.answered(request, n)
        if trace.on:
            flow, arrived_ns = trace.flow(served.trace_key, number), request.arrived_ns
            trace.served(chunk.stages_ns, arrived_ns, arrived_ns + waited_ns, inferred_ns, flow)

    def _fail(self, served: SessionState, message: Message, error: PolicyError) -> None:
        logger.info("session %d: request %d: %s", served.session.id, message.request_id, error)
        self._state.counts["failed"] += 1
        served.counts["failed"] += 1
        body = messages.encode_error(error)
        self._send(
            served, lambda: served.session.channel.send_body(Kind.ERROR, message.request_id, body)
        )

    def _send(self, served: SessionState, send: Callable[[], None]) -> None:
        try:
            send()
        except TransportError as error:
            logger.warning("session %d: the answer was not sent: %s", served.session.id, error)

    def end_for_kept_views(self, session: ServerSession, error: ViewsHeld) -> None:
        """Its next observations could not be sent. Better now, with the reason, than silence."""
        logger.error("session %d: the policy keeps what it was given: %s", session.id, error)
        session.channel.close(f"the policy keeps what it was given: {error}")
        self._end(session)
