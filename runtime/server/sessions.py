"""Who has a session with a policy server: let in, given a policy, reset, ended."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from policies.errors import ContractMismatch
from policies.types import Policy
from runtime.protocol import image_codec, messages
from runtime.server.admission import Demand, SessionLimits, admit
from runtime.server.model import LoadedModel, close
from runtime.server.request_handler import RequestHandler
from runtime.server.session import SessionState
from runtime.server.state import ServerState
from runtime.trace import recorder as trace
from transport.base import SLOTS
from transport.channel import Kind, Message
from transport.errors import PeerGone, Refused, ViewsHeld
from transport.handshake_messages import Hello, Welcome
from transport.server.sessions import ServerSession

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""How often a server with a session timeout looks for sessions that have said nothing."""


class SessionManager:
    """The sessions of a server, from their greeting to their end.

    Args:
        answering: Tells a client what became of a request that is not computed.
        limits: On what a session may ask for.
        hellos: Of every session there is, and of those that were granted and may come.
        timeout_s: End a session that has said nothing for so long; 0 for never.
    """

    def __init__(
        self,
        state: ServerState,
        request_handler: RequestHandler,
        limits: SessionLimits,
        *,
        hellos: Callable[[], list[Hello]],
        timeout_s: float,
    ) -> None:
        self._state, self._request_handler, self._hellos = state, request_handler, hellos
        self._limits, self._timeout_s = limits, timeout_s
        self._reply_schema = messages.reply_schema(state.model.policy.contract)
        self._look_at_s = 0.0
        self._retired: dict[int, Policy] = {}

    def welcome(self, hello: Hello) -> Welcome:
        """What a client is granted.

        Raises:
            Refused: Why not.
        """
        try:
            return self._welcome(hello)
        except Refused:
            self._state.counts["refused"] += 1
            raise

    def _welcome(self, hello: Hello) -> Welcome:
        policy = self._state.model.policy
        try:
            image_codec.reader(hello.schema, hello.attributes, policy.contract)
        except ContractMismatch as error:
            raise Refused(error.field, error.got, error.expected) from error
        if hello.schema.nbytes > self._limits.message_bytes:
            most = f"at most {self._limits.message_bytes}"
            raise Refused("message", f"{hello.schema.nbytes} bytes", most)
        demand = self._demand(hello)
        present = [self._demand(other) for other in self._hellos()]
        admit(demand, present, self._limits, self._state.costs)
        lossy = image_codec.JPEG in hello.attributes
        attributes = {
            "kind": demand.kind,
            "deterministic": messages.is_deterministic(policy.info) and not lossy,
            "contract": messages.contract_hash(policy.contract),
        }
        return Welcome(schema=self._reply_schema, attributes=attributes)

    def _demand(self, hello: Hello) -> Demand:
        both_ways = hello.schema.nbytes + self._reply_schema.nbytes
        return Demand.read(hello.attributes, SLOTS * both_ways)

    def drain(self, session: ServerSession) -> None:
        """Take what a session has sent, its beginning, or its end."""
        if session.ended is None or session.id in self._state.sessions:
            try:
                self._drain(session)
            except ViewsHeld as error:
                self._request_handler.end_for_kept_views(session, error)
        if session.ended is not None:
            self.end(session)

    def _drain(self, session: ServerSession) -> None:
        """Take what the session has sent; keep the newest observation.

        At most what fits its slots: they are refilled while they are emptied, and somebody who
        does nothing else would keep the server. What is left is handed out again.
        """
        served = self._state.sessions.get(session.id) or self._begin(session)
        if served is None:
            return
        channel = session.channel
        try:
            for _ in range(SLOTS):
                message = channel.poll()
                if message is None:
                    return
                if message.kind is Kind.DATA:
                    self._take(served, message)
                else:
                    with message:
                        if message.kind is Kind.RESET and not self._reset(served, message):
                            return
                if not channel.unread:
                    return
        except PeerGone as error:
            logger.debug("session %d: %s", session.id, error)

    def _take(self, served: SessionState, message: Message) -> None:
        model = self._state.model
        # Of an older model, which finishes its episode: not to be computed together with others.
        alone = served.generation != model.generation or (served.exact and not model.exact)
        request = served.request(message, alone=alone)
        if served.pace is not None and not served.pace.allows(request.arrived_ns):
            self._request_handler.reply_rate_limited(served, message, served.pace)
            return
        older = self._state.scheduler.offer(request)
        if older is not None:
            self._request_handler.reply_superseded(served, older.content, message.request_id)

    def _begin(self, session: ServerSession) -> SessionState | None:
        """Give the session a policy of its own; None where that failed."""
        hello, model = session.hello, self._state.model
        logger.info(
            "session %d: %s (%s) from %s over %s: %s",
            session.id,
            hello.client,
            hello.attributes.get("kind", "sim"),
            session.peer,
            session.channel.transport,
            session.transport_reason,
        )
        try:
            policy = model.policy if model.exclusive else model.policy.fork()
        except Exception as error:
            logger.exception("session %d: the policy could not be forked", session.id)
            session.channel.close(f"the policy could not be forked: {error!r}")
            return None
        served = self._state.sessions[session.id] = SessionState(
            session,
            policy,
            policy is not model.policy,
            image_codec.reader(hello.schema, hello.attributes, model.policy.contract),
            self._demand(hello),
            exact=hello.attributes.get("deterministic") is True,
            pace=self._limits.pace(),
            trace_key=trace.read_key(hello.attributes.get("trace")),
            generation=model.generation,
        )
        robot, budget_ns = served.demand.robot, served.budget_ns
        self._state.scheduler.join(session.id, robot=robot, budget_ns=budget_ns)
        return served if self._start_episode(served) else None

    def _reset(self, served: SessionState, message: Message) -> bool:
        """A new episode, which nothing that still waits belongs to."""
        waiting = self._state.scheduler.withdraw(served.session.id)
        if waiting is not None:
            self._request_handler.reply_superseded(served, waiting.content, message.request_id)
        self._state.counts["resets"] += 1
        served.heard_ns = time.monotonic_ns()
        return self._start_episode(served)

    def _renew(self, served: SessionState) -> None:
        """A fork of the model that is served now."""
        model = self._state.model
        fork = model.policy.fork()
        if served.own:
            close(served.policy)
        served.policy, served.own = fork, fork is not model.policy
        served.generation = model.generation
        self._close_retired()

    def _start_episode(self, served: SessionState) -> bool:
        """A policy that fails to costs its session only."""
        try:
            if served.generation != self._state.model.generation:
                self._renew(served)
            served.policy.reset()
        except Exception as error:
            session = served.session
            logger.exception("session %d: the policy failed to reset", session.id)
            session.channel.close(f"the policy failed to reset: {error!r}")
            self.end(session)
            return False
        return True

    def end(self, session: ServerSession) -> None:
        """Forget it. Idempotent."""
        served = self._state.sessions.pop(session.id, None)
        if served is None:
            return
        waiting = self._state.scheduler.leave(session.id)
        if waiting is not None:
            with contextlib.suppress(ViewsHeld):  # it ends, with whatever is held
                waiting.content.release()
        if served.own:
            close(served.policy)
        self._close_retired()
        why = session.ended or "by the server"
        logger.info("session %d ended: %s; %s", session.id, why, served.counts)

    def end_idle(self) -> float | None:
        """End those who have said nothing for too long; when to look again, seconds from now."""
        if not self._timeout_s:
            return None
        now_s = time.monotonic()
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + LOOK_EVERY_S
            for served in list(self._state.sessions.values()):
                if now_s - served.heard_ns / 1e9 > self._timeout_s:
                    served.session.channel.close(f"nothing was said for {self._timeout_s:g} s")
                    self.end(served.session)
        return LOOK_EVERY_S

    # Another model

    def move_to(self, new: LoadedModel) -> None:
        """``new`` is served from now on. Sessions of a policy that keeps nothing go on with it at
        once; one with episode state keeps its old fork until its next reset. The old policy is
        closed when nobody needs it."""
        state = self._state
        old, state.model = state.model, new
        self._retired[old.generation] = old.policy
        for served in state.sessions.values():
            if old.shared and new.shared and not served.own:
                served.policy, served.generation = new.policy, new.generation
        self._close_retired()

    def _close_retired(self) -> None:
        if self._retired:
            needed = {served.generation for served in self._state.sessions.values()}
            for generation in [g for g in self._retired if g not in needed]:
                close(self._retired.pop(generation))

    def status(self) -> list[dict[str, Any]]:
        """For those who look; JSON values."""
        return [
            {
                "id": served.session.id,
                "client": served.session.hello.client,
                "peer": str(served.session.peer),
                "transport": served.session.channel.transport,
                **served.status(),
            }
            for served in self._state.sessions.values()
        ]

    def close(self) -> None:
        """End every session, and whatever waits for them."""
        for served in list(self._state.sessions.values()):
            self.end(served.session)
