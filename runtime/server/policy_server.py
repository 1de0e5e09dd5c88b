"""The policy server: one process, one model, many isolated sessions.

Guaranteed:

* A session's episode state is its own (``Policy.fork``); a reset or a failure in one is not seen
  in another.
* Within a session the newest observation is served; one that was passed over is answered
  SUPERSEDED, so nothing is lost without a word. Between sessions: ``runtime.server.scheduler``.
* Whatever a client sends, and whatever the policy raises, the server lives on and says why.
* The model can be replaced between two inferences (``swap``); no request is lost by it.

One thread: it waits for all sessions at once, chooses a request or a batch, infers, answers, looks
again. Inference is the only thing that takes time, and a second thread could not make it faster.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from policies.errors import PolicyError
from policies.types import Policy
from runtime.server.admission import SessionLimits
from runtime.server.cost_model import InferenceCostModel
from runtime.server.model import LoadedModel
from runtime.server.request_handler import RequestHandler
from runtime.server.scheduler import Scheduler
from runtime.server.sessions import SessionManager
from runtime.server.state import Order, ServerState, ServerStatistics
from transport.address import format_address
from transport.errors import Refused
from transport.handshake_messages import Peer
from transport.server.listener import Listener
from transport.server.sessions import ServerSession
from transport.shm.adaptive_spin import DEFAULT_SPIN_US
from transport.zeromq.curve import ServerKeys

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

ERRAND_S = 10.0
"""How long another thread waits for the serving one, which may be inferring."""


class PolicyServer:
    """Serves ``policy`` on ``host:port`` until ``stop``.

    Args:
        policy: Already warm. The server closes it only when another takes its place.
        host, port: Where to listen; port 0 takes a free one (``port`` says which).
        transports: What may be offered to clients.
        max_sessions: Sessions open at a time.
        limits: On what a session may ask for.
        max_batch: Observations computed together at most; None for all the policy can.
        batch_wait_ms: How long a simulation's request may wait for partners; a robot's never does.
        session_timeout_s: End a session that has said nothing for so long; 0 for never, since a
            robot that is paused says nothing either.
        costs: What an inference takes, from the warm-up; learned otherwise.
        curve: Keys, and whose are let in; without, everybody who reaches the port is.
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
        limits: SessionLimits | None = None,
        max_batch: int | None = None,
        batch_wait_ms: float = 0.0,
        session_timeout_s: float = 0.0,
        costs: InferenceCostModel | None = None,
        curve: ServerKeys | None = None,
        spin_us: float = DEFAULT_SPIN_US,
    ) -> None:
        model = LoadedModel.of(policy, max_batch=max_batch)
        costs, limits = costs or InferenceCostModel(), limits or SessionLimits()
        scheduler = Scheduler(costs, model.sizes, max_wait_ns=round(batch_wait_ms * 1e6))
        self._max_batch = max_batch
        self._state = ServerState(model, costs, scheduler)
        self._request_handler = RequestHandler(self._state, self._end)
        self._session_manager = SessionManager(
            self._state,
            self._request_handler,
            limits,
            hellos=lambda: self._listener.hellos,
            timeout_s=session_timeout_s,
        )
        self._orders: dict[str, Order] = {"status": lambda *_: self.status()}
        self._errands: deque[Callable[[], None]] = deque()
        self._stopping: str | None = None
        self._began_s = time.monotonic()
        self._listener = Listener(
            host,
            port,
            describe=self._describe,
            accept=self._session_manager.welcome,
            ask=self._ask,
            curve=curve,
            transports=transports,
            max_message_bytes=limits.message_bytes,
            max_sessions=1 if model.exclusive else max_sessions,
            spin_us=spin_us,
        )

    @property
    def host(self) -> str:
        return self._listener.host

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def address(self) -> str:
        """What clients dial: ``HOST:PORT``, or ``[V6]:PORT``."""
        return format_address(self.host, self.port)

    @property
    def model(self) -> LoadedModel:
        """What is being served."""
        return self._state.model

    def statistics(self) -> ServerStatistics:
        return ServerStatistics(**{**self._state.counts, "sessions": len(self._listener.sessions)})

    def status(self) -> dict[str, Any]:
        """Everything an operator may want to see; JSON values. For the serving thread: others use
        ``between``."""
        state, info = self._state, self._state.model.policy.info
        statistics = self.statistics()
        return {
            "address": self.address,
            "up_s": round(time.monotonic() - self._began_s, 1),
            "policy": {
                "id": state.model.generation,
                "checkpoint": info.checkpoint,
                "device": info.device,
                "engine": info.engine,
                "precision": info.precision,
            },
            "batch_sizes": list(state.model.sizes),
            "costs_ms": {str(size): cost for size, cost in state.costs.as_dict().items()},
            "counts": {name: getattr(statistics, name) for name in ServerStatistics.__slots__},
            "sessions": self._session_manager.status(),
        }

    def between(self, errand: Callable[[], Result], timeout_s: float = ERRAND_S) -> Result:
        """Run ``errand`` in the serving thread between two inferences; for other threads.

        Raises:
            TimeoutError: The server is not serving, or infers for longer; says how long it was.
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
        except TimeoutError:
            if future.cancel():
                raise TimeoutError(f"the server was busy for {timeout_s:g} s") from None
            return future.result()  # it has begun, and is short

    def add_orders(self, orders: Mapping[str, Order]) -> None:
        """Let operators ask for these by name, beside ``status``. Before ``serve``."""
        self._orders.update(orders)

    def check_successor(self, policy: Policy) -> None:
        """Whether ``policy`` could take the place of what is served; for any thread.

        Its normalizers may be others: they are applied here, and no client sees them.

        Raises:
            ContractMismatch: Its contract is another one; says in which field.
        """
        policy.contract.require(self._state.model.policy.contract, but=("normalizer_hash",))

    def swap(self, policy: Policy, costs: InferenceCostModel | None = None) -> int:
        """Serve ``policy``, already warm, from the next inference on; its id. For the serving
        thread (``between``).

        Sessions of a policy that keeps nothing between observations go on with the new one at once;
        one with episode state keeps its old fork until its next reset. The old policy is closed as
        soon as nobody needs it.

        Raises:
            ContractMismatch: Its contract is another one; nothing has changed.
            PolicyError: It cannot be forked, where the old one could.
        """
        state = self._state
        self.check_successor(policy)
        new = LoadedModel.of(policy, state.model.generation + 1, self._max_batch)
        if new.exclusive or state.model.exclusive:
            raise PolicyError("a policy that cannot be forked serves one session until it ends")
        state.costs = state.scheduler.costs = costs or InferenceCostModel()
        state.scheduler.sizes = tuple(sorted({1, *new.sizes}))
        state.counts["swaps"] += 1
        self._session_manager.move_to(new)
        logger.info("policy %d: %s", new.generation, policy.info.checkpoint)
        return new.generation

    def serve(self) -> None:
        """Answer requests until ``stop``. Every client is then told the reason."""
        state, session_manager, request_handler = (
            self._state,
            self._session_manager,
            self._request_handler,
        )
        scheduler, wait = state.scheduler, self._listener.wait
        patience_s: float | None = None
        while self._stopping is None:
            for session in wait(patience_s):
                session_manager.drain(session)
            while self._errands:
                self._errands.popleft()()
            turn = scheduler.next(time.monotonic_ns())
            for request in turn.late:
                request_handler.reply_expired(request)
            if len(turn.batch) == 1:
                request_handler.answer(turn.batch[0])
            elif turn.batch:
                request_handler.answer_batch(turn.batch)
            patience_s = self._patience(turn.wait_until_ns)

    def stop(self, reason: str = "the server was stopped") -> None:
        """Make ``serve`` return. Safe from a signal handler or another thread."""
        self._stopping = reason
        self._listener.wake()

    def close(self) -> None:
        """End every session and give the address back. Idempotent."""
        self._session_manager.close()
        self._listener.close(self._stopping or "the server was closed")

    def __enter__(self) -> PolicyServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _describe(self) -> dict[str, Any]:
        return self._state.model.describe()

    def _end(self, session: ServerSession) -> None:
        self._session_manager.end(session)

    def _patience(self, wait_until_ns: int | None) -> float | None:
        """How long the next wait may take; None for as long as it likes."""
        look_s = self._session_manager.end_idle()
        if wait_until_ns is None:
            return 0.0 if len(self._state.scheduler) else look_s
        due_s = max(0.0, (wait_until_ns - time.monotonic_ns()) / 1e9)
        return due_s if look_s is None else min(due_s, look_s)

    def _ask(self, command: str, arguments: Mapping[str, Any], peer: Peer) -> dict[str, Any]:
        order = self._orders.get(command)
        if order is None:
            raise Refused("command", repr(command)[:80], f"one of {sorted(self._orders)}")
        return order(arguments, peer)
