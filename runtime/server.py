"""The policy server: one process, one model, many isolated sessions.

Guaranteed:

* A session's episode state is its own (``Policy.fork``); a reset or a failure in one is not seen
  in another.
* Within a session the newest observation is served; one that was passed over is answered
  SUPERSEDED, so nothing is lost without a word. Between sessions: first come, first served.
* Whatever a client sends, and whatever the policy raises, the server lives on and says why.

One thread: it waits for all sessions at once, takes one request, infers, answers, looks again.
Inference is the only thing that takes time, and a second thread could not make it faster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from policies.errors import ContractMismatch, InferenceError, PolicyError
from policies.types import ActionChunk, Policy
from runtime import frames, messages, trace
from transport.adaptive import DEFAULT_SPIN_US
from transport.channel import Kind, Message
from transport.control import Hello, Welcome
from transport.errors import PeerGone, Refused, TransportError, ViewsHeld
from transport.listener import Listener
from transport.sessions import ServerSession

logger = logging.getLogger(__name__)

SESSION_KINDS = ("robot", "sim")


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """Counts since the server was made.

    Attributes:
        answered: Requests answered with a chunk.
        failed: Requests answered with an error.
        superseded: Requests passed over for a newer one of the same session.
        resets: Episodes reset.
        sessions: Sessions open now.
    """

    answered: int
    failed: int
    superseded: int
    resets: int
    sessions: int


@dataclass(slots=True)
class _State:
    """What the server keeps of one session."""

    policy: Policy
    read: frames.Read
    waiting: Message | None = None
    since_ns: int = 0
    trace_key: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {"answered": 0, "failed": 0})


class PolicyServer:
    """Serves ``policy`` on ``host:port`` until ``stop``.

    Args:
        policy: Already warm; the server does not load it and does not close it.
        host, port: Where to listen; port 0 takes a free one (``port`` says which).
        transports: What may be offered to clients.
        max_sessions: Sessions open at a time.
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
        spin_us: float = DEFAULT_SPIN_US,
    ) -> None:
        self._policy = policy
        self._exclusive = not _can_fork(policy)
        self._reply_schema = messages.reply_schema(policy.contract)
        self._description = messages.describe(policy.contract, policy.info)
        self._counts = {"answered": 0, "failed": 0, "superseded": 0, "resets": 0}
        self._stopping: str | None = None
        self._listener = Listener(
            host,
            port,
            describe=lambda: self._description,
            accept=self._accept,
            transports=transports,
            max_sessions=1 if self._exclusive else max_sessions,
            spin_us=spin_us,
        )

    @property
    def host(self) -> str:
        return self._listener.host

    @property
    def port(self) -> int:
        return self._listener.port

    def statistics(self) -> ServerStatistics:
        return ServerStatistics(**self._counts, sessions=len(self._listener.sessions))

    def serve(self) -> None:
        """Answer requests until ``stop``. Every client is then told the reason."""
        pending: dict[int, ServerSession] = {}  # sessions with a request waiting, oldest first
        while self._stopping is None:
            for session in self._listener.wait(0.0 if pending else None):
                if session.ended is None or session.attachment is not None:
                    self._drain(session)
                state = session.attachment
                if session.ended is not None:
                    self._end(session)
                    pending.pop(session.id, None)
                elif state is not None and state.waiting is not None:
                    pending.setdefault(session.id, session)
                else:
                    pending.pop(session.id, None)
            if pending:
                self._answer(pending.pop(next(iter(pending))))

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

    def _accept(self, hello: Hello) -> Welcome:
        kind = hello.attributes.get("kind", "sim")
        if kind not in SESSION_KINDS:
            raise Refused("kind", repr(kind)[:80], f"one of {SESSION_KINDS}")
        try:
            frames.reader(hello.schema, hello.attributes, self._policy.contract)
        except ContractMismatch as error:
            raise Refused(error.field, error.got, error.expected) from error
        lossy = frames.JPEG in hello.attributes
        attributes = {
            "kind": kind,
            "deterministic": messages.is_deterministic(self._policy.info) and not lossy,
            "contract": messages.contract_hash(self._policy.contract),
        }
        return Welcome(schema=self._reply_schema, attributes=attributes)

    def _drain(self, session: ServerSession) -> None:
        """Take everything the session has sent; keep the newest observation."""
        if session.attachment is None and not self._begin(session):
            return
        state: _State = session.attachment
        try:
            channel = session.channel
            while (message := channel.poll()) is not None:
                if message.kind is Kind.DATA:
                    if state.waiting is not None:
                        self._pass_over(session, state.waiting, message.request_id)
                    state.waiting, state.since_ns = message, time.monotonic_ns()
                    continue
                with message:
                    if message.kind is Kind.RESET:
                        if state.waiting is not None:
                            self._pass_over(session, state.waiting, message.request_id)
                            state.waiting = None
                        self._counts["resets"] += 1
                        if not self._reset(session, state.policy):
                            return
        except PeerGone as error:
            logger.debug("session %d: %s", session.id, error)

    def _begin(self, session: ServerSession) -> bool:
        """Give the session a policy of its own; whether it has one now."""
        logger.info(
            "session %d: %s (%s) over %s: %s",
            session.id,
            session.hello.client,
            session.hello.attributes.get("kind", "sim"),
            session.channel.transport,
            session.transport_reason,
        )
        try:
            policy = self._policy if self._exclusive else self._policy.fork()
        except Exception as error:
            logger.exception("session %d: the policy could not be forked", session.id)
            session.channel.close(f"the policy could not be forked: {error!r}")
            return False
        read = frames.reader(session.hello.schema, session.hello.attributes, self._policy.contract)
        session.attachment = _State(
            policy, read, trace_key=trace.read_key(session.hello.attributes.get("trace"))
        )
        return self._reset(session, policy)

    def _reset(self, session: ServerSession, policy: Policy) -> bool:
        """Start an episode; a policy that fails to costs its session only."""
        try:
            policy.reset()
        except Exception as error:
            logger.exception("session %d: the policy failed to reset", session.id)
            session.channel.close(f"the policy failed to reset: {error!r}")
            self._end(session)
            return False
        return True

    def _pass_over(self, session: ServerSession, message: Message, by: int) -> None:
        self._counts["superseded"] += 1
        with message:
            body = str(by).encode()
            self._send(
                session,
                lambda: session.channel.send_body(Kind.SUPERSEDED, message.request_id, body),
            )

    def _answer(self, session: ServerSession) -> None:
        state: _State = session.attachment
        message, state.waiting = state.waiting, None
        if message is None:
            return
        waited_ns = time.monotonic_ns() - state.since_ns
        try:
            with message:
                self._serve_one(session, message, waited_ns)
        except ViewsHeld as error:
            # Its next observations could not be sent. Better now, with the reason, than silence.
            logger.error("session %d: the policy keeps what it was given: %s", session.id, error)
            session.channel.close(f"the policy keeps what it was given: {error}")
            self._end(session)

    def _serve_one(self, session: ServerSession, message: Message, waited_ns: int) -> None:
        if 0 < message.budget_ns < waited_ns:
            self._fail(session, message, InferenceError("the request's time was up"))
            return
        try:
            chunk = self._infer(session.attachment, message)
        except PolicyError as error:
            self._fail(session, message, error)
        except Exception as error:
            # Anyone's policy runs here. Its bug costs this request, not the other robots.
            logger.exception("session %d: the policy failed", session.id)
            self._fail(session, message, InferenceError(f"the policy failed: {error!r}"))
        else:
            self._reply(session, message, chunk, waited_ns)

    def _infer(self, state: _State, message: Message) -> ActionChunk:
        """A call of its own, so that the observation's views end with it, before the release."""
        obs = state.read(message.arrays)
        chunk = state.policy.infer(obs)
        messages.check_chunk(chunk, self._policy.contract)
        if chunk.obs_timestep != obs.timestep:
            raise InferenceError(
                f"the policy answered for tick {chunk.obs_timestep}, asked for "
                f"{obs.timestep}: it must pass obs.timestep on"
            )
        return chunk

    def _reply(
        self, session: ServerSession, message: Message, chunk: ActionChunk, waited_ns: int
    ) -> None:
        try:
            loan = session.channel.loan()
        except TransportError as error:
            logger.warning("session %d: the answer was not sent: %s", session.id, error)
            return
        state: _State = session.attachment
        inferred_ns = time.monotonic_ns() if trace.on else 0
        messages.write_chunk(chunk, waited_ns, loan.arrays)
        self._send(session, lambda: loan.publish(message.request_id))
        self._counts["answered"] += 1
        state.counts["answered"] += 1
        if trace.on:
            flow, arrived_ns = trace.flow(state.trace_key, message.request_id), state.since_ns
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

    def _end(self, session: ServerSession) -> None:
        state: _State | None = session.attachment
        if state is None:
            return
        session.attachment = None
        if state.waiting is not None:
            state.waiting.release()
        if state.policy is not self._policy:
            try:
                state.policy.close()
            except Exception:
                logger.exception("session %d: the policy failed to close", session.id)
        logger.info("session %d ended: %s; %s", session.id, session.ended, state.counts)


def _can_fork(policy: Policy) -> bool:
    try:
        fork = policy.fork()
    except PolicyError as error:
        logger.warning("one session at a time: %s", error)
        return False
    if fork is not policy:
        fork.close()
    return True


if __name__ == "__main__":
    # `python -m runtime.server` is the documented command; the command line is a noun of its own.
    from runtime.serve import main

    raise SystemExit(main())
