"""The policy server: one process, one model, many isolated sessions.

Guaranteed:

* Each session has its own episode state (``Policy.fork``). A reset or a failure in one session
  has no effect on another.
* Within a session the newest observation is served. An older one that waited gets the reply
  SUPERSEDED, so every request has a reply. ``runtime.server.scheduler`` orders the sessions.
* The server survives whatever a client sends and whatever the policy raises, and logs the reason.
  ``DeviceLost`` alone ends it: no later request could succeed.
* The model can be replaced between two inferences (``swap``); no request is lost.

One thread waits for all sessions at once, chooses a request or a batch, infers, replies, and
repeats. Only inference takes significant time, and a second thread could not make it faster.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from policies.errors import DeviceLost, PolicyError
from policies.types import Policy
from policies.weights_hash import info_with_hash
from runtime.server.admission import SessionLimits
from runtime.server.cost_model import InferenceCostModel
from runtime.server.loaded_model import LoadedModel
from runtime.server.policy_closer import PolicyCloser
from runtime.server.request_handler import RequestHandler
from runtime.server.scheduler import Scheduler
from runtime.server.segment_registrar import SegmentRegistrar
from runtime.server.session_manager import SessionManager
from runtime.server.state import AdminCommand, ServerState, ServerStatistics
from transport.address import format_address
from transport.errors import Refused
from transport.handshake_messages import Peer
from transport.server.listener import Listener
from transport.server.listener_records import ServerSession
from transport.shm.adaptive_spin import DEFAULT_SPIN_US
from transport.zeromq.curve import ServerKeys

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

CLOSE_S = 5.0
"""How long ``close`` waits for segments, and for replaced policies, to be released."""
SERVING_THREAD_TIMEOUT_S = 10.0
"""How long another thread waits for the serving thread, which may be in an inference."""


class PolicyServer:
    """Serves ``policy`` on ``host:port`` until ``stop``.

    Args:
        policy: Already warm. The server closes it only after a replacement, in another thread.
        host, port: The address to listen on; port 0 takes a free one, see ``port``.
        transports: The transports that clients may use.
        max_sessions: Sessions open at a time.
        limits: The limits on each session.
        max_batch: The largest batch; None for the largest that the policy is prepared for.
        batch_wait_ms: How long a simulation's request may wait for others to share its batch; a
            robot's request never waits.
        session_timeout_s: End a session that has sent nothing for this long; 0 for never, because
            a paused robot sends nothing.
        costs: Inference durations from the warm-up; measured while serving otherwise.
        curve: The server's keys and the accepted clients' keys; None accepts every client.
        spin_us: How long to poll for the next request of a client that sends at once after each
            reply, before the thread sleeps; 0 to 200.

    Raises:
        AddressInUse, TransportError: The address cannot be listened on.
        DeviceLost: The policy lost its device while it was forked.
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
        self._closer = PolicyCloser()
        self._segment_registrar = SegmentRegistrar()
        self._session_manager = SessionManager(
            self._state,
            self._request_handler,
            self._segment_registrar,
            limits,
            self._closer,
            hellos=lambda: self._listener.hellos,
            timeout_s=session_timeout_s,
        )
        self._admin_commands: dict[str, AdminCommand] = {"status": lambda *_: self.status()}
        self._tasks: deque[Callable[[], None]] = deque()
        self._stopping: str | None = None
        self._began_s = time.monotonic()
        self._listener = Listener(
            host,
            port,
            describe=self._describe,
            accept=self._session_manager.accept,
            admin_handler=self._run_admin_command,
            curve=curve,
            transports=transports,
            max_message_bytes=limits.message_bytes,
            max_sessions=1 if model.exclusive else max_sessions,
            spin_us=spin_us,
        )

    @property
    def host(self) -> str:
        """The host it listens on."""
        return self._listener.host

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._listener.port

    @property
    def address(self) -> str:
        """The address for clients: ``HOST:PORT``, or ``[V6]:PORT``."""
        return format_address(self.host, self.port)

    @property
    def model(self) -> LoadedModel:
        """The model that is served now."""
        return self._state.model

    def statistics(self) -> ServerStatistics:
        """Counts since the server was made, and the number of open sessions."""
        return ServerStatistics(**{**self._state.counts, "sessions": len(self._listener.sessions)})

    def status(self) -> dict[str, Any]:
        """Policy, costs, counts and sessions, as JSON values.

        Only for the serving thread; other threads use ``call_in_serving_thread``.
        """
        state, info = self._state, info_with_hash(self._state.model.policy)
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
                "weights_hash": info.weights_hash,
            },
            "batch_sizes": list(state.model.sizes),
            "costs_ms": {str(size): cost for size, cost in state.costs.as_dict().items()},
            "counts": {name: getattr(statistics, name) for name in ServerStatistics.__slots__},
            "sessions": self._session_manager.status(),
        }

    def call_in_serving_thread(
        self, task: Callable[[], Result], timeout_s: float = SERVING_THREAD_TIMEOUT_S
    ) -> Result:
        """Run ``task`` in the serving thread between two inferences; return its result.

        For other threads.

        Raises:
            TimeoutError: ``task`` did not start within ``timeout_s``: the server is not serving,
                or an inference takes longer.
            Exception: Whatever ``task`` raises.
        """
        future: Future[Result] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(task())
                except Exception as error:
                    future.set_exception(error)

        self._tasks.append(run)
        self._listener.wake()
        try:
            return future.result(timeout_s)
        except TimeoutError:
            if future.cancel():
                raise TimeoutError(f"the server was busy for {timeout_s:g} s") from None
            return future.result()  # it has started, and is short

    def add_admin_commands(self, commands: Mapping[str, AdminCommand]) -> None:
        """Add commands by name to ``status``. Call it before ``serve``."""
        self._admin_commands.update(commands)

    def check_successor(self, policy: Policy) -> None:
        """Check that ``policy`` may replace the served one; for any thread.

        Its normalizers may differ, because the server applies them and clients do not see them.

        Raises:
            ContractMismatch: Its contract differs; names the field.
        """
        policy.contract.require(self._state.model.policy.contract, but=("normalizer_hash",))

    def swap(self, policy: Policy, costs: InferenceCostModel | None = None) -> int:
        """Serve ``policy``, already warm, from the next inference on; return its id.

        Only for the serving thread; other threads use ``call_in_serving_thread``.

        If neither policy has state between observations, open sessions use the new one at once.
        Otherwise a session keeps its old fork until its next reset. The old policy is closed when
        no session uses it, in a thread of the server's: closing waits for the device.

        Raises:
            ContractMismatch: Its contract differs; nothing has changed.
            PolicyError: The old or the new policy cannot be forked; nothing has changed.
        """
        state = self._state
        self.check_successor(policy)
        new = LoadedModel.of(policy, state.model.generation + 1, self._max_batch)
        new = new.replace(state.model)
        if new.exclusive or state.model.exclusive:
            raise PolicyError("a policy that cannot be forked serves one session until it ends")
        state.costs = state.scheduler.costs = costs or InferenceCostModel()
        state.scheduler.sizes = tuple(sorted({1, *new.sizes}))
        state.counts["swaps"] += 1
        self._session_manager.switch_model(new)
        logger.info("policy %d: %s", new.generation, policy.info.checkpoint)
        return new.generation

    def serve(self) -> None:
        """Serve requests until ``stop``.

        Raises:
            DeviceLost: The device is lost. All sessions have ended with that reason, and the
                address is free. The process cannot use the device again, and must not close the
                policy: that may wait for the device for ever.
        """
        state, session_manager, request_handler = (
            self._state,
            self._session_manager,
            self._request_handler,
        )
        scheduler, wait = state.scheduler, self._listener.wait
        wait_timeout_s: float | None = None
        while self._stopping is None and state.device_lost is None:
            for session in wait(wait_timeout_s):
                session_manager.drain(session)
            while self._tasks:
                self._tasks.popleft()()
            decision = scheduler.next(time.monotonic_ns())
            for request in decision.expired:
                request_handler.reply_expired(request)
            if len(decision.batch) == 1:
                request_handler.handle(decision.batch[0])
            elif decision.batch:
                request_handler.handle_batch(decision.batch)
            wait_timeout_s = self._wait_timeout_s(decision.wait_until_ns)
        if state.device_lost is not None:
            self.close()
            raise state.device_lost

    def report_device_lost(self, error: DeviceLost) -> None:
        """Make ``serve`` end its sessions and raise ``DeviceLost`` with the reason of ``error``.

        For other threads that use the same device.
        """
        copy = DeviceLost(str(error))  # without a traceback, which would keep the thread's objects

        def lose_device() -> None:
            self._state.lose_device(copy)

        self._tasks.append(lose_device)
        self._listener.wake()

    def stop(self, reason: str = "the server was stopped") -> None:
        """Make ``serve`` return; ``close`` sends ``reason`` to every client.

        Safe from a signal handler or another thread.
        """
        self._stopping = reason
        self._listener.wake()

    def close(self) -> None:
        """End every session, send its client the reason, and free the address. Idempotent.

        Waits at most twice ``CLOSE_S`` for segments and replaced policies to be released.
        """
        lost = self._state.device_lost
        self._session_manager.close()
        self._listener.close(str(lost) if lost else self._stopping or "the server was closed")
        # Last: these may take seconds, and clients know by now.
        timeout_s = 0.0 if lost else CLOSE_S
        self._segment_registrar.close(timeout_s)
        self._closer.close(timeout_s)

    def __enter__(self) -> PolicyServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _describe(self) -> dict[str, Any]:
        return self._state.model.describe()

    def _end(self, session: ServerSession) -> None:
        self._session_manager.end(session)

    def _wait_timeout_s(self, wait_until_ns: int | None) -> float | None:
        """The timeout of the next wait, seconds; None for no timeout."""
        idle_check_s = self._session_manager.end_idle()
        if wait_until_ns is None:
            return 0.0 if len(self._state.scheduler) else idle_check_s
        due_s = max(0.0, (wait_until_ns - time.monotonic_ns()) / 1e9)
        return due_s if idle_check_s is None else min(due_s, idle_check_s)

    def _run_admin_command(
        self, command: str, arguments: Mapping[str, Any], peer: Peer
    ) -> dict[str, Any]:
        handler = self._admin_commands.get(command)
        if handler is None:
            raise Refused("command", repr(command)[:80], f"one of {sorted(self._admin_commands)}")
        return handler(arguments, peer)
