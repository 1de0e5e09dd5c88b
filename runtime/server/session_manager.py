"""The lifecycle of a server's sessions: admission, policy fork, reset, end."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from policies.errors import ContractMismatch, DeviceLost
from policies.types import Policy, SamplingPolicy
from runtime.protocol import image_codec, messages
from runtime.server.admission import Demand, SessionLimits, admit
from runtime.server.loaded_model import LoadedModel, close_policy
from runtime.server.policy_closer import PolicyCloser
from runtime.server.request_handler import RequestHandler
from runtime.server.segment_registrar import SegmentRegistrar
from runtime.server.session_state import SessionState
from runtime.server.state import ServerState
from runtime.trace import recorder as trace
from transport.base_channel import SLOTS
from transport.channel import Kind, Message
from transport.errors import PeerGone, Refused, ViewsHeld
from transport.handshake_messages import Hello, Welcome
from transport.server.listener_records import ServerSession

logger = logging.getLogger(__name__)

IDLE_CHECK_EVERY_S = 1.0
"""How often a server with a session timeout checks for idle sessions."""


class SessionManager:
    """Manages the sessions of a server, from the handshake to the end.

    Args:
        state: The server's state.
        request_handler: Replies to requests that are not computed.
        segment_registrar: Registers the sessions' memory where their policies want that.
        limits: The limits on each session.
        closer: Closes replaced policies and their forks.
        hellos: Returns the handshakes of all sessions, including those accepted and not yet open.
        timeout_s: End a session that has sent nothing for this long; 0 for never.
    """

    def __init__(
        self,
        state: ServerState,
        request_handler: RequestHandler,
        segment_registrar: SegmentRegistrar,
        limits: SessionLimits,
        closer: PolicyCloser,
        *,
        hellos: Callable[[], list[Hello]],
        timeout_s: float,
    ) -> None:
        self._state, self._request_handler, self._hellos = state, request_handler, hellos
        self._segment_registrar = segment_registrar
        self._limits, self._timeout_s = limits, timeout_s
        self._reply_schema = messages.reply_schema(state.model.policy.contract)
        self._next_idle_check_s = 0.0
        self._closer = closer
        self._replaced_policies: dict[int, Policy] = {}
        self._policies_on_lost_device: list[Policy] = []

    def accept(self, hello: Hello) -> Welcome:
        """Accept a session, or refuse it.

        Raises:
            Refused: The observations do not fit the policy, a limit is exceeded, or the server has
                no capacity; has the numbers.
        """
        try:
            return self._accept(hello)
        except Refused:
            self._state.counts["refused"] += 1
            raise

    def _accept(self, hello: Hello) -> Welcome:
        policy = self._state.model.policy
        try:
            image_codec.observation_reader(hello.schema, hello.attributes, policy.contract)
        except ContractMismatch as error:
            raise Refused(error.field, error.got, error.expected) from error
        if hello.schema.nbytes > self._limits.message_bytes:
            most = f"at most {self._limits.message_bytes}"
            raise Refused("message", f"{hello.schema.nbytes} bytes", most)
        demand = self._read_demand(hello)
        present = [self._read_demand(other) for other in self._hellos()]
        admit(demand, present, self._limits, self._state.costs)
        lossy = image_codec.JPEG in hello.attributes
        attributes = {
            "kind": demand.kind,
            "deterministic": messages.is_deterministic(policy.info) and not lossy,
            "contract": messages.contract_hash(policy.contract),
        }
        return Welcome(schema=self._reply_schema, attributes=attributes)

    def _read_demand(self, hello: Hello) -> Demand:
        both_ways = hello.schema.nbytes + self._reply_schema.nbytes
        return Demand.from_attributes(hello.attributes, SLOTS * both_ways)

    def drain(self, session: ServerSession) -> None:
        """Read what a session has sent; start a new session, end one that has ended."""
        if session.ended is None or session.id in self._state.sessions:
            try:
                self._drain(session)
            except ViewsHeld as error:
                self._request_handler.end_for_kept_views(session, error)
        if session.ended is not None:
            self.end(session)

    def _drain(self, session: ServerSession) -> None:
        """Read what the session has sent; keep the newest observation.

        Reads at most as many messages as the ring has slots. The client refills slots meanwhile,
        and a client that only sends would otherwise occupy the server. The listener returns the
        session again if messages are left.
        """
        session_state = self._state.sessions.get(session.id) or self._start_session(session)
        if session_state is None:
            return
        channel = session.channel
        try:
            for _ in range(SLOTS):
                message = channel.poll()
                if message is None:
                    return
                if message.kind is Kind.DATA:
                    self._enqueue(session_state, message)
                else:
                    with message:
                        if message.kind is Kind.RESET and not self._reset(session_state, message):
                            return
                if not channel.unread:
                    return
        except PeerGone as error:
            logger.debug("session %d: %s", session.id, error)

    def _enqueue(self, session_state: SessionState, message: Message) -> None:
        model = self._state.model
        # A session that finishes its episode on an older model cannot share a batch of the new one.
        alone = session_state.generation != model.generation or (
            session_state.exact and not model.exact
        )
        request = session_state.request(message, alone=alone)
        if session_state.rate_limiter is not None and not session_state.rate_limiter.allows(
            request.arrived_ns
        ):
            self._request_handler.reply_rate_limited(
                session_state, message, session_state.rate_limiter
            )
            return
        older = self._state.scheduler.enqueue(request)
        if older is not None:
            self._request_handler.reply_superseded(session_state, older.content, message.request_id)

    def _start_session(self, session: ServerSession) -> SessionState | None:
        """Fork the policy for a new session; None if that failed."""
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
        except DeviceLost as error:
            self._state.lose_device(error)
            return None
        except Exception as error:
            logger.exception("session %d: the policy could not be forked", session.id)
            session.channel.close(f"the policy could not be forked: {error!r}")
            return None
        session_state = self._state.sessions[session.id] = SessionState(
            session,
            policy,
            policy is not model.policy,
            image_codec.observation_reader(hello.schema, hello.attributes, model.policy.contract),
            self._read_demand(hello),
            exact=hello.attributes.get("deterministic") is True,
            rate_limiter=self._limits.rate_limiter(),
            trace_key=trace.read_key(hello.attributes.get("trace")),
            generation=model.generation,
        )
        robot, budget_ns = session_state.demand.is_robot, session_state.budget_ns
        self._state.scheduler.add_session(session.id, robot=robot, budget_ns=budget_ns)
        self._register_memory(session, model)
        return session_state if self._start_episode(session_state) else None

    def _reset(self, session_state: SessionState, message: Message) -> bool:
        """Start a new episode; a waiting request belongs to the old one and is superseded."""
        waiting = self._state.scheduler.withdraw(session_state.session.id)
        if waiting is not None:
            self._request_handler.reply_superseded(
                session_state, waiting.content, message.request_id
            )
        self._state.counts["resets"] += 1
        session_state.last_message_ns = time.monotonic_ns()
        return self._start_episode(session_state, messages.decode_reset(message.body))

    def _fork_current_model(self, session_state: SessionState) -> None:
        """Replace the session's policy by a fork of the current model."""
        model = self._state.model
        fork = model.policy.fork()
        if session_state.owns_policy:
            self._closer.add(session_state.policy)
        session_state.policy, session_state.owns_policy = fork, fork is not model.policy
        session_state.generation = model.generation
        self._register_memory(session_state.session, model)
        self._close_unused_policies()

    def _register_memory(self, session: ServerSession, model: LoadedModel) -> None:
        """Have images that the client writes read directly by ``model``, where it can."""
        self._segment_registrar.register(
            session.id, session.channel.peer_memory, model.registered_memory
        )

    def _start_episode(self, session_state: SessionState, seed: int | None = None) -> bool:
        """Reset the session's policy, and seed it where it draws random numbers.

        If that fails, end this session only and return False.
        """
        try:
            if session_state.generation != self._state.model.generation:
                self._fork_current_model(session_state)
            session_state.policy.reset()
            if seed is not None and isinstance(session_state.policy, SamplingPolicy):
                session_state.policy.seed(seed)
        except DeviceLost as error:
            self._state.lose_device(error)
            return False
        except Exception as error:
            session = session_state.session
            logger.exception("session %d: the policy failed to reset", session.id)
            session.channel.close(f"the policy failed to reset: {error!r}")
            self.end(session)
            return False
        return True

    def end(self, session: ServerSession) -> None:
        """Remove a session and close its policy. Idempotent.

        After the loss of the device nothing is closed or freed: that could hang.
        """
        session_state = self._state.sessions.pop(session.id, None)
        if session_state is None:
            return
        self._segment_registrar.release(session.id)
        waiting = self._state.scheduler.remove_session(session.id)
        if waiting is not None:
            with contextlib.suppress(ViewsHeld):  # the session ends in any case
                waiting.content.release()
        if self._state.device_lost is not None:
            self._policies_on_lost_device.append(session_state.policy)
        elif session_state.owns_policy:
            if session_state.generation == self._state.model.generation:
                close_policy(session_state.policy)
            else:
                self._closer.add(session_state.policy)
        self._close_unused_policies()
        why = session.ended or "by the server"
        logger.info("session %d ended: %s; %s", session.id, why, session_state.counts)

    def end_idle(self) -> float | None:
        """End idle sessions; return the seconds until the next check, None without a timeout."""
        if not self._timeout_s:
            return None
        now_s = time.monotonic()
        if now_s >= self._next_idle_check_s:
            self._next_idle_check_s = now_s + IDLE_CHECK_EVERY_S
            for session_state in list(self._state.sessions.values()):
                if now_s - session_state.last_message_ns / 1e9 > self._timeout_s:
                    session_state.session.channel.close(
                        f"the session was idle for {self._timeout_s:g} s"
                    )
                    self.end(session_state.session)
        return IDLE_CHECK_EVERY_S

    # Model replacement

    def switch_model(self, new: LoadedModel) -> None:
        """Serve ``new`` from now on.

        If neither model has state between observations, open sessions use the new one at once.
        Otherwise a session keeps its old fork until its next reset. The old policy is closed when
        no session uses it, in another thread.
        """
        state = self._state
        # No variable refers to the old model, so that the thread that closes it also frees it.
        at_once = state.model.shared and new.shared
        self._replaced_policies[state.model.generation] = state.model.policy
        state.model = new
        for session_state in state.sessions.values():
            if at_once and not session_state.owns_policy:
                session_state.policy, session_state.generation = new.policy, new.generation
                self._register_memory(session_state.session, new)
        self._close_unused_policies()

    def _close_unused_policies(self) -> None:
        if self._replaced_policies and self._state.device_lost is None:
            needed = {session_state.generation for session_state in self._state.sessions.values()}
            for generation in [g for g in self._replaced_policies if g not in needed]:
                self._closer.add(self._replaced_policies.pop(generation))

    def status(self) -> list[dict[str, Any]]:
        """The status of every session, JSON values."""
        return [
            {
                "id": session_state.session.id,
                "client": session_state.session.hello.client,
                "peer": str(session_state.session.peer),
                "transport": session_state.session.channel.transport,
                **session_state.status(),
            }
            for session_state in self._state.sessions.values()
        ]

    def close(self) -> None:
        """End every session."""
        for session_state in list(self._state.sessions.values()):
            self.end(session_state.session)
