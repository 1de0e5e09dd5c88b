"""Decides which waiting requests to compute next. Pure logic: the caller passes the time.

There are two classes of sessions, robots and simulations. Guaranteed, and simulated over thousands
of arrival patterns in the tests:

* Robots are served before simulations. Within a class the earliest deadline is first; among equal
  deadlines, the session that was served longest ago. A session has one waiting request, its newest.
* A request that cannot be computed in time is returned at once as expired, never computed.
* A batch has requests of one class, and at most the largest prepared size. It is made only if it
  breaks no deadline of its requests and takes no longer than computing them one by one.
* A robot's request never waits for others to share its batch. A simulation's may wait for at most
  ``max_wait_ns``, and never beyond the last time at which the earliest deadline can be met.
* While a robot has a session, the size of simulations' batches is limited, so that one batch in
  progress and the robots' own inferences fit the robots' deadlines. Size 1 is always allowed: an
  inference in progress cannot be interrupted, and admission has checked that one fits.
* No session starves. A request that has waited for ``starvation_ns`` is next in its class; a
  simulation's is then computed before robots' requests, alone. Neither applies if a waiting robot
  would miss its deadline because of it.

Rejected: preemption (an inference cannot be stopped); a queue of several observations per session
(a reply to an old observation is useless to a controller); batches of both classes (the robot would
wait for the simulations' images).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.server.cost_model import InferenceCostModel

STARVATION_NS = 1_000_000_000
"""How long a request waits before it goes first, unless told otherwise."""
NEVER = 2**63 - 1


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """One observation that waits; times are ns of the monotonic clock.

    Attributes:
        session: The id of its session.
        arrived_ns: When it arrived.
        deadline_ns: After this time it is not computed any more; ``NEVER`` for no limit.
        alone: It must not share a batch, e.g. because its reply has to be bit-equal to one that is
            computed alone.
        content: Not used by the scheduler.
        due_ns: When the session needs the reply, from its declared deadline; at most
            ``deadline_ns``. A request past this time is still computed.
    """

    session: int
    arrived_ns: int
    deadline_ns: int = NEVER
    alone: bool = False
    content: Any = None
    due_ns: int = NEVER

    def __post_init__(self) -> None:
        self.due_ns = min(self.due_ns, self.deadline_ns)


@dataclass(slots=True, eq=False)
class Decision:
    """What the server does next.

    Attributes:
        batch: Requests to compute together; empty if none is due.
        expired: Requests whose deadline cannot be met, to be refused at once.
        wait_until_ns: When to decide again if no request arrives before; None for no such time.
    """

    batch: list[QueuedRequest] = field(default_factory=list)
    expired: list[QueuedRequest] = field(default_factory=list)
    wait_until_ns: int | None = None


@dataclass(slots=True, eq=False)
class _SessionEntry:
    robot: bool
    budget_ns: int
    served_at: int = 0
    waiting: QueuedRequest | None = None


class Scheduler:
    """Chooses which of the waiting requests are computed next.

    Args:
        costs: Inference durations by batch size; the caller keeps them up to date.
        sizes: Batch sizes that the model is prepared for.
        max_wait_ns: How long a simulation's request waits for others to share its batch.
        starvation_ns: After this time a request goes first in its class, and a simulation's before
            robots whose deadlines allow it.
    """

    def __init__(
        self,
        costs: InferenceCostModel,
        sizes: Sequence[int] = (1,),
        *,
        max_wait_ns: int = 0,
        starvation_ns: int = STARVATION_NS,
    ) -> None:
        self.costs, self.sizes = costs, tuple(sorted({1, *sizes}))
        self._max_wait_ns, self._starvation_ns = max_wait_ns, starvation_ns
        self._sessions: dict[int, _SessionEntry] = {}
        self._waiting = 0
        self._rounds = 0

    def __len__(self) -> int:
        """The number of waiting requests."""
        return self._waiting

    def add_session(self, session: int, *, robot: bool, budget_ns: int = NEVER) -> None:
        """Add a session.

        Args:
            session: Its id.
            robot: Whether it is a robot's or a simulation's.
            budget_ns: How soon after a request it needs the reply; ``NEVER`` if not declared.
        """
        self._sessions[session] = _SessionEntry(robot, budget_ns, self._rounds)

    def remove_session(self, session: int) -> QueuedRequest | None:
        """Remove a session; return its waiting request."""
        waiting = self.withdraw(session)
        self._sessions.pop(session, None)
        return waiting

    def enqueue(self, request: QueuedRequest) -> QueuedRequest | None:
        """Add a request; return the older request of its session that it replaces."""
        session = self._sessions[request.session]
        older, session.waiting = session.waiting, request
        self._waiting += older is None
        return older

    def withdraw(self, session: int) -> QueuedRequest | None:
        """Remove a session's waiting request and return it; None if it has none."""
        entry = self._sessions.get(session)
        if entry is None or entry.waiting is None:
            return None
        request, entry.waiting = entry.waiting, None
        self._waiting -= 1
        return request

    def max_simulation_batch(self) -> int:
        """The largest batch size that simulations may have, given the robots' deadlines."""
        budgets_ns = [s.budget_ns for s in self._sessions.values() if s.robot]
        budget_ns = min(budgets_ns, default=NEVER)
        if budget_ns == NEVER:
            return self.sizes[-1]
        spare_ns = budget_ns - len(budgets_ns) * self.costs.near_max(1)
        return max((n for n in self.sizes if self.costs.near_max(n) <= spare_ns), default=1)

    def next(self, now_ns: int) -> Decision:
        """Decide what to do at ``now_ns``; the returned requests no longer wait."""
        decision = Decision()
        if not self._waiting:
            return decision
        if len(self._sessions) == 1:
            # Fast path for the most common case: a robot with its own server.
            (entry,) = self._sessions.values()
            request = self.withdraw(next(iter(self._sessions)))
            if request is not None:
                expired = now_ns + self.costs.min(1) > request.deadline_ns
                (decision.expired if expired else decision.batch).append(request)
            return decision
        robots, simulations = self._sorted(now_ns, decision)
        chosen = self._choose(robots, simulations, now_ns, decision)
        self._rounds += 1
        for request in chosen:
            entry = self._sessions[request.session]
            entry.waiting, entry.served_at = None, self._rounds
        self._waiting -= len(chosen)
        decision.batch = chosen
        return decision

    def _sorted(
        self, now_ns: int, decision: Decision
    ) -> tuple[list[QueuedRequest], list[QueuedRequest]]:
        """Robots' and simulations' requests in order; expired ones go to ``decision``."""
        soonest_ns = now_ns + self.costs.min(1)
        classes: tuple[list[tuple[int, int, int, QueuedRequest]], ...] = ([], [])
        for number, entry in self._sessions.items():
            request = entry.waiting
            if request is None:
                continue
            if soonest_ns > request.deadline_ns:
                entry.waiting = None
                self._waiting -= 1
                decision.expired.append(request)
                continue
            key = (request.due_ns, entry.served_at, number)
            classes[not entry.robot].append((*key, request))
        robots, simulations = (
            [request for *_, request in sorted(group, key=lambda entry: entry[:3])]
            for group in classes
        )
        return robots, simulations

    def _choose(
        self,
        robots: list[QueuedRequest],
        simulations: list[QueuedRequest],
        now_ns: int,
        decision: Decision,
    ) -> list[QueuedRequest]:
        if robots:
            starved = self._starved(robots, robots, now_ns) or self._starved(
                simulations, robots, now_ns
            )
            return [starved] if starved else self._batch(robots, self.sizes[-1], now_ns)
        if not simulations:
            return []
        starved = self._starved(simulations, [], now_ns)
        if starved is not None:
            simulations = [starved, *(request for request in simulations if request is not starved)]
        cap = self.max_simulation_batch()
        batch = self._batch(simulations, cap, now_ns)
        until_ns = self._latest_start(simulations, batch, cap, now_ns)
        if until_ns > now_ns:
            decision.wait_until_ns = until_ns
            return []
        return batch

    def _starved(
        self, candidates: list[QueuedRequest], robots: list[QueuedRequest], now_ns: int
    ) -> QueuedRequest | None:
        """The oldest candidate, if it starves and ``robots`` after it still meet their times."""
        oldest = min(candidates, key=lambda request: request.arrived_ns, default=None)
        if oldest is None or now_ns - oldest.arrived_ns < self._starvation_ns:
            return None
        done_ns = now_ns + self.costs.near_max(1)
        for robot in robots:
            if robot is not oldest:
                done_ns += self.costs.near_max(1)
                if done_ns > robot.due_ns:
                    return None
        return oldest

    def _batch(self, requests: list[QueuedRequest], cap: int, now_ns: int) -> list[QueuedRequest]:
        """The first request, and those that share its batch."""
        if requests[0].alone:
            return requests[:1]
        together = [request for request in requests if not request.alone][:cap]
        for count in range(len(together), 1, -1):
            size = next(n for n in self.sizes if n >= count)  # a smaller batch is padded
            # A request that is overdue even when computed alone does not limit the batch.
            alone_ns = now_ns + self.costs.near_max(1)
            due = (r.due_ns for r in together[:count] if r.due_ns >= alone_ns)
            soonest_ns = min(*(r.deadline_ns for r in together[:count]), min(due, default=NEVER))
            if (
                size <= cap
                and self.costs.median(size) <= count * self.costs.median(1)
                and now_ns + self.costs.near_max(size) <= soonest_ns
            ):
                return together[:count]
        return together[:1]

    def _latest_start(
        self, waiting: list[QueuedRequest], batch: list[QueuedRequest], cap: int, now_ns: int
    ) -> int:
        """The latest start of this batch of simulations; ``now_ns`` for at once."""
        if not self._max_wait_ns or len(batch) >= cap or batch[0].alone:
            return now_ns
        absent = sum(not s.robot and s.waiting is None for s in self._sessions.values())
        if not absent:
            return now_ns
        next_size = next((n for n in self.sizes if n > len(batch)), self.sizes[-1])
        oldest_ns = min(request.arrived_ns for request in waiting)
        latest_ns = min(request.due_ns for request in waiting) - self.costs.near_max(next_size)
        return min(oldest_ns + self._max_wait_ns, latest_ns)
