"""The policy server: one process, one model, many isolated sessions.

Guaranteed:

* A session's episode state is its own (``Policy.fork``); a reset or a failure in one is not seen
  in another.
* Within a session the newest observation is served; one that was passed over is answered
  SUPERSEDED, so nothing is lost without a word. Between sessions: ``runtime.scheduler``.
* Whatever a client sends, and whatever the policy raises, the server lives on and says why.
* The model can be replaced between two inferences (``swap``); no request is lost by it.

One thread: it waits for all sessions at once, chooses a request or a batch, infers, answers, looks
again. Inference is the only thing that takes time, and a second thread could not make it faster.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from policies.errors import ContractMismatch, InferenceError, PolicyError
from policies.types import ActionChunk, Policy
from runtime import frames, messages, trace
from runtime.admission import Demand, Limits, admit
from runtime.costs import Costs
from runtime.scheduler import Request, Scheduler
from runtime.served import Served
from runtime.served_model import ServedModel
from transport.adaptive import DEFAULT_SPIN_US
from transport.channel import Kind, Message
from transport.control import Hello, Welcome
from transport.errors import PeerGone, Refused, TransportError, ViewsHeld
from transport.listener import Listener
from transport.sessions import ServerSession

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

LOOK_EVERY_S = 1.0
"""How often a server with a session timeout looks for sessions that have said nothing."""
ERRAND_S = 10.0
"""How long another thread waits for the serving one, which may be inferring."""


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """Counts since the server was made.

    Attributes:
        answered: Requests answered with a chunk.
        failed: Requests answered with an error, those that were late among them.
        superseded: Requests passed over for a newer one of the same session.
        late: Requests whose time was up before they could be computed.
        resets: Episodes reset.
        refused: Clients that were not let in.
        batches: Inferences of more than one observation.
        swaps: How often the model was replaced.
        sessions: Sessions open now.
    """

    answered: int
    failed: int
    superseded: int
    late: int
    resets: int
    refused: int
    batches: int
    swaps: int
    sessions: int


class PolicyServer:
    """Serves ``policy`` on ``host:port`` until ``stop``.

    Args:
        policy: Already warm; the server does not load it and does not close it.
        host, port: Where to listen; port 0 takes a free one (``port`` says which).
        transports: What may be offered to clients.
        max_sessions: Sessions open at a time.
        limits: On what a session may ask for.
        max_batch: Observations computed together at most; None for all the policy can.
        batch_wait_ms: How long a simulation's request may wait for partners; a robot's never does.
        session_timeout_s: End a session that has said nothing for so long; 0 for never, since a
            robot that is paused says nothing either.
        costs: What an inference takes, from the warm-up; learned otherwise.
        spin_us: How long to watch for the next request of a client in a tight exchange before
            sleeping, 0 to 200.

    Raises:
        AddressInUse, TransportError: The address cannot be had.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        transports: Sequence[str] = ("shm", "zmq"),
        max_sessions: int = 64,
        limits: Limits | None = None,
        max_batch: int | None = None,
        batch_wait_ms: float = 0.0,
        session_timeout_s: float = 0.0,
        costs: Costs | None = None,
        spin_us: float = DEFAULT_SPIN_US,
    ) -> None:
        self._model = ServedModel.of(policy, max_batch=max_batch)
        self._max_batch, self._limits = max_batch, limits or Limits()
        self._session_timeout_s = session_timeout_s
        self._costs = costs or Costs()
        self._wait_ns = round(batch_wait_ms * 1e6)
        self._scheduler = Scheduler(self._costs, self._model.sizes, max_wait_ns=self._wait_ns)
        self._reply_schema = messages.reply_schema(policy.contract)
        self._counts = dict.fromkeys(ServerStatistics.__slots__, 0)
        self._sessions: dict[int, ServerSession] = {}
        self._errands: deque[Callable[[], None]] = deque()
        self._stopping: str | None = None
        self._look_at_s = 0.0
        self._began_s = time.monotonic()
        self._listener = Listener(
            host,
            port,
            describe=self._describe,
            accept=self._accept,
            transports=transports,
            max_sessions=1 if self._model.exclusive else max_sessions,
            spin_us=spin_us,
        )

    @property
    def host(self) -> str:
        return self._listener.host

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def model(self) -> ServedModel:
        """What is being served."""
        return self._model

    def statistics(self) -> ServerStatistics:
        return ServerStatistics(**{**self._counts, "sessions": len(self._listener.sessions)})

    def status(self) -> dict[str, Any]:
        """Everything an operator may want to see; JSON values. For the serving thread: others use
        ``between``."""
        info = self._model.policy.info
        statistics = self.statistics()
        return {
            "address": f"{self.host}:{self.port}",
            "up_s": round(time.monotonic() - self._began_s, 1),
            "policy": {
                "id": self._model.generation,
                "checkpoint": info.checkpoint,
                "device": info.device,
                "engine": info.engine,
                "precision": info.precision,
            },
            "batch_sizes": list(self._model.sizes),
            "costs_ms": {str(size): cost for size, cost in self._costs.as_dict().items()},
            "counts": {name: getattr(statistics, name) for name in ServerStatistics.__slots__},
            "sessions": [
                {
                    "id": session.id,
                    "client": session.hello.client,
                    "transport": session.channel.transport,
                    **session.attachment.status(),
                }
                for session in self._sessions.values()
                if session.attachment is not None
            ],
        }

    def between(self, errand: Callable[[], Result], timeout_s: float = ERRAND_S) -> Result:
        """Run ``errand`` in the serving thread between two inferences; for other threads.

        Raises:
            TimeoutError: The server is not serving, or infers for longer.
            Exception: Whatever ``errand`` raises.
        """
        future: Future[Result] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(errand())
                except Exception as error:
                    future.set_exception(error)

        self._errands.append(run)
        self._listener.wake()
        try:
            return future.result(timeout_s)
        finally:
            future.cancel()

    def swap(self, policy: Policy) -> Policy:
        """Serve ``policy`` from the next inference on; what was served until now, to be closed.

        For the serving thread (``between``). Sessions of a policy that keeps nothing go on with the
        new one at once; a session with episode state keeps its old fork until its next reset.

        Raises:
            ContractMismatch: Its contract is another one; nothing has changed.
            PolicyError: It cannot be forked, where the old one could.
        """
        old = self._model
        if policy.contract != old.policy.contract:
            raise ContractMismatch("contract", f"{policy.contract}", f"{old.policy.contract}")
        new = ServedModel.of(policy, old.generation + 1, self._max_batch)
        if new.exclusive and not old.exclusive:
            raise PolicyError("the new policy cannot be forked: it would serve one session only")
        self._model = new
        self._scheduler.sizes = tuple(sorted({1, *new.sizes}))
        self._counts["swaps"] += 1
        for session in self._sessions.values():
            served: Served | None = session.attachment
            if served is not None and old.shared and new.shared:
                served.policy, served.generation = policy, new.generation
        logger.info("policy %d: %s", new.generation, policy.info.checkpoint)
        return old.policy

    def serve(self) -> None:
        """Answer requests until ``stop``. Every client is then told the reason."""
        scheduler, wait = self._scheduler, self._listener.wait
        patience_s: float | None = None
        while self._stopping is None:
            for session in wait(patience_s):
                self._look_after(session)
            while self._errands:
                self._errands.popleft()()
            turn = scheduler.next(time.monotonic_ns())
            for request in turn.late:
                self._counts["late"] += 1
                self._too_late(request)
            if len(turn.batch) == 1:
                self._answer(turn.batch[0])
            elif turn.batch:
                self._answer_batch(turn.batch)
            patience_s = self._patience(turn.wait_until_ns)

    def stop(self, reason: str = "the server was stopped") -> None:
        """Make ``serve`` return. Safe from a signal handler or another thread."""
        self._stopping = reason
        self._listener.wake()

    def close(self) -> None:
        """End every session and give the address back. Idempotent."""
        self._listener.close(self._stopping or "the server was closed")

    def __enter__(self) -> PolicyServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Sessions

    def _describe(self) -> dict[str, Any]:
        return self._model.describe()

    def _patience(self, wait_until_ns: int | None) -> float | None:
        """How long the next wait may take; None for as long as it likes."""
        patience_s = None
        if wait_until_ns is not None:
            patience_s = max(0.0, (wait_until_ns - time.monotonic_ns()) / 1e9)
        elif len(self._scheduler):
            return 0.0
        if self._session_timeout_s:
            self._end_silent_sessions()
            patience_s = min(LOOK_EVERY_S, LOOK_EVERY_S if patience_s is None else patience_s)
        return patience_s

    def _end_silent_sessions(self) -> None:
        now_s = time.monotonic()
        if now_s < self._look_at_s:
            return
        self._look_at_s = now_s + LOOK_EVERY_S
        for session in list(self._sessions.values()):
            served: Served | None = session.attachment
            if served and now_s - served.heard_ns / 1e9 > self._session_timeout_s:
                session.channel.close(f"nothing was said for {self._session_timeout_s:g} s")
                self._end(session)

    def _accept(self, hello: Hello) -> Welcome:
        try:
            return self._welcome(hello)
        except Refused:
            self._counts["refused"] += 1
            raise

    def _welcome(self, hello: Hello) -> Welcome:
        try:
            frames.reader(hello.schema, hello.attributes, self._model.policy.contract)
        except ContractMismatch as error:
            raise Refused(error.field, error.got, error.expected) from error
        if hello.schema.nbytes > self._limits.message_bytes:
            most = f"at most {self._limits.message_bytes}"
            raise Refused("message", f"{hello.schema.nbytes} bytes", most)
        demand = self._demand(hello)
        present = [session.attachment.demand for session in self._sessions.values()]
        admit(demand, present, self._limits, self._costs)
        lossy = frames.JPEG in hello.attributes
        attributes = {
            "kind": demand.kind,
            "deterministic": messages.is_deterministic(self._model.policy.info) and not lossy,
            "contract": messages.contract_hash(self._model.policy.contract),
        }
        return Welcome(schema=self._reply_schema, attributes=attributes)

    def _demand(self, hello: Hello) -> Demand:
        return Demand.read(hello.attributes, hello.schema.nbytes + self._reply_schema.nbytes)

    def _look_after(self, session: ServerSession) -> None:
        """Take what a session has sent, or its end."""
        if session.ended is None or session.attachment is not None:
            self._drain(session)
        if session.ended is not None:
            self._end(session)

    def _drain(self, session: ServerSession) -> None:
        """Take everything the session has sent; keep the newest observation."""
        if session.attachment is None and not self._begin(session):
            return
        served: Served = session.attachment
        channel = session.channel
        try:
            while (message := channel.poll()) is not None:
                if message.kind is Kind.DATA:
                    request = served.request(session.id, message, message.budget_ns)
                    older = self._scheduler.offer(request)
                    if older is not None:
                        self._pass_over(session, older.content, message.request_id)
                else:
                    with message:
                        if message.kind is Kind.RESET and not self._reset(session, message):
                            return
                if not channel.unread:
                    return
        except PeerGone as error:
            logger.debug("session %d: %s", session.id, error)

    def _begin(self, session: ServerSession) -> bool:
        """Give the session a policy of its own; whether it has one now."""
        hello, model = session.hello, self._model
        logger.info(
            "session %d: %s (%s) over %s: %s",
            session.id,
            hello.client,
            hello.attributes.get("kind", "sim"),
            session.channel.transport,
            session.transport_reason,
        )
        try:
            policy = model.policy if model.exclusive else model.policy.fork()
        except Exception as error:
            logger.exception("session %d: the policy could not be forked", session.id)
            session.channel.close(f"the policy could not be forked: {error!r}")
            return False
        served = session.attachment = Served(
            policy,
            frames.reader(hello.schema, hello.attributes, model.policy.contract),
            self._demand(hello),
            alone=hello.attributes.get("deterministic") is True and not model.exact,
            trace_key=trace.read_key(hello.attributes.get("trace")),
            generation=model.generation,
        )
        self._sessions[session.id] = session
        self._scheduler.join(session.id, robot=served.demand.robot, budget_ns=served.budget_ns)
        return self._start_episode(session, policy)

    def _reset(self, session: ServerSession, message: Message) -> bool:
        """A new episode, which nothing that still waits belongs to."""
        waiting = self._scheduler.withdraw(session.id)
        if waiting is not None:
            self._pass_over(session, waiting.content, message.request_id)
        self._counts["resets"] += 1
        served: Served = session.attachment
        served.heard_ns = time.monotonic_ns()
        if served.generation != self._model.generation:
            self._renew(served)
        return self._start_episode(session, served.policy)

    def _renew(self, served: Served) -> None:
        """A fork of the model that is served now."""
        old, served.generation = served.policy, self._model.generation
        served.policy = self._model.policy.fork()
        _close(old)

    def _start_episode(self, session: ServerSession, policy: Policy) -> bool:
        """A policy that fails to costs its session only."""
        try:
            policy.reset()
        except Exception as error:
            logger.exception("session %d: the policy failed to reset", session.id)
            session.channel.close(f"the policy failed to reset: {error!r}")
            self._end(session)
            return False
        return True

    def _end(self, session: ServerSession) -> None:
        served: Served | None = session.attachment
        if served is None:
            return
        session.attachment = None
        self._sessions.pop(session.id, None)
        waiting = self._scheduler.leave(session.id)
        if waiting is not None:
            waiting.content.release()
        if served.policy is not self._model.policy:
            _close(served.policy)
        logger.info("session %d ended: %s; %s", session.id, session.ended, served.counts)

    # Requests

    def _answer(self, request: Request) -> None:
        session, message = self._sessions[request.session], request.content
        try:
            with message:
                self._serve_one(session, request, message)
        except ViewsHeld as error:
            self._end_for_kept_views(session, error)

    def _serve_one(self, session: ServerSession, request: Request, message: Message) -> None:
        began_ns = time.monotonic_ns()
        try:
            chunk = self._infer(session.attachment, message)
        except PolicyError as error:
            self._fail(session, message, error)
        except Exception as error:
            # Anyone's policy runs here. Its bug costs this request, not the other robots.
            logger.exception("session %d: the policy failed", session.id)
            self._fail(session, message, InferenceError(f"the policy failed: {error!r}"))
        else:
            self._costs.add(1, time.monotonic_ns() - began_ns)
            self._reply(session, request, chunk, began_ns - request.arrived_ns, 1)

    def _infer(self, served: Served, message: Message) -> ActionChunk:
        """A call of its own, so that the observation's views end with it, before the release."""
        obs = served.read(message.arrays)
        chunk = served.policy.infer(obs)
        self._check(chunk, obs.timestep)
        return chunk

    def _answer_batch(self, batch: list[Request]) -> None:
        """Several sessions' observations at once; one that fails costs no other."""
        began_ns = time.monotonic_ns()
        try:
            answers = self._infer_batch(batch)
        except Exception as error:
            logger.exception("the policy failed on a batch of %d", len(batch))
            answers = [InferenceError(f"the policy failed: {error!r}")] * len(batch)
        size = next((n for n in self._scheduler.sizes if n >= len(batch)), len(batch))
        self._costs.add(size, time.monotonic_ns() - began_ns)
        self._counts["batches"] += 1
        for request, answer in zip(batch, answers, strict=True):
            session, message = self._sessions[request.session], request.content
            try:
                with message:
                    if isinstance(answer, PolicyError):
                        self._fail(session, message, answer)
                    else:
                        waited_ns = began_ns - request.arrived_ns
                        self._reply(session, request, answer, waited_ns, len(batch))
            except ViewsHeld as error:
                self._end_for_kept_views(session, error)

    def _infer_batch(self, batch: list[Request]) -> list[ActionChunk | PolicyError]:
        """In the batch's order; a call of its own as ``_infer``."""
        answers: list[ActionChunk | PolicyError | None] = [None] * len(batch)
        places, observations = [], []
        for place, request in enumerate(batch):
            served: Served = self._sessions[request.session].attachment
            try:
                observations.append(served.read(request.content.arrays))
                places.append(place)
            except PolicyError as error:
                answers[place] = error
        infer_batch = self._model.infer_batch
        if infer_batch is None:
            raise InferenceError("this policy has no infer_batch")
        found = infer_batch(observations)
        for place, obs, answer in zip(places, observations, found, strict=True):
            answers[place] = answer
            if not isinstance(answer, PolicyError):
                try:
                    self._check(answer, obs.timestep)
                except PolicyError as error:
                    answers[place] = error
        return [answer or InferenceError("the policy did not answer") for answer in answers]

    def _check(self, chunk: ActionChunk, timestep: int) -> None:
        messages.check_chunk(chunk, self._model.policy.contract)
        if chunk.obs_timestep != timestep:
            raise InferenceError(
                f"the policy answered for tick {chunk.obs_timestep}, asked for "
                f"{timestep}: it must pass obs.timestep on"
            )

    def _too_late(self, request: Request) -> None:
        session, message = self._sessions[request.session], request.content
        session.attachment.counts["late"] += 1
        budget_ms, waited_ms = (
            (ns - request.arrived_ns) / 1e6 for ns in (request.deadline_ns, time.monotonic_ns())
        )
        with message:
            error = InferenceError(
                f"the request's time was up: it had {budget_ms:.1f} ms, waited {waited_ms:.1f}, "
                f"and an inference takes at least {self._costs.least(1) / 1e6:.1f}"
            )
            self._fail(session, message, error)

    def _pass_over(self, session: ServerSession, message: Message, by: int) -> None:
        self._counts["superseded"] += 1
        session.attachment.counts["superseded"] += 1
        with message:
            body = str(by).encode()
            self._send(
                session,
                lambda: session.channel.send_body(Kind.SUPERSEDED, message.request_id, body),
            )

    def _reply(
        self, session: ServerSession, request: Request, chunk: ActionChunk, waited_ns: int, n: int
    ) -> None:
        try:
            loan = session.channel.loan()
        except TransportError as error:
            logger.warning("session %d: the answer was not sent: %s", session.id, error)
            return
        served: Served = session.attachment
        number = request.content.request_id
        inferred_ns = time.monotonic_ns() if trace.on else 0
        messages.write_chunk(chunk, waited_ns, self._model.generation, loan.arrays)
        try:
            loan.publish(number)
        except TransportError as error:
            logger.warning("session %d: the answer was not sent: %s", session.id, error)
        self._counts["answered"] += 1
        served.answered(request, n)
        if trace.on:
            flow, arrived_ns = trace.flow(served.trace_key, number), request.arrived_ns
            trace.served(chunk.stages_ns, arrived_ns, arrived_ns + waited_ns, inferred_ns, flow)

    def _fail(self, session: ServerSession, message: Message, error: PolicyError) -> None:
        logger.info("session %d: request %d: %s", session.id, message.request_id, error)
        self._counts["failed"] += 1
        session.attachment.counts["failed"] += 1
        body = messages.encode_error(error)
        self._send(session, lambda: session.channel.send_body(Kind.ERROR, message.request_id, body))

    def _send(self, session: ServerSession, send: Callable[[], None]) -> None:
        try:
            send()
        except TransportError as error:
            logger.warning("session %d: the answer was not sent: %s", session.id, error)

    def _end_for_kept_views(self, session: ServerSession, error: ViewsHeld) -> None:
        """Its next observations could not be sent. Better now, with the reason, than silence."""
        logger.error("session %d: the policy keeps what it was given: %s", session.id, error)
        session.channel.close(f"the policy keeps what it was given: {error}")
        self._end(session)


def _close(policy: Policy) -> None:
    try:
        policy.close()
    except Exception:
        logger.exception("a session's policy failed to close")


if __name__ == "__main__":
    # `python -m runtime.server` is the documented command; the command line is a noun of its own.
    from runtime.serve import main

    raise SystemExit(main())
