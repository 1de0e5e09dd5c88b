"""Whose turn it is: pure logic over requests that wait, with the time handed in.

Guaranteed, and simulated over thousands of arrival patterns in the tests:

* Robots before simulations. Within a class the earliest deadline first; among equals, whoever was
  served longest ago. A session has one request waiting, its newest.
* What cannot be answered in time is given back at once, never computed.
* A batch is of one class and at most the largest size prepared, and it is only made where it breaks
  no deadline of its members and takes no longer than its members one by one.
* A robot's request never waits for partners. A simulation's may, for at most ``max_wait_ns``, and
  never beyond the last moment at which the oldest deadline can be kept.
* While a robot's session lives, a simulation's batch is capped so that one batch in progress plus
  the robots' own inferences fit their deadlines. (One is always allowed: what is in progress
  cannot be interrupted, and admission has made sure that one fits.)
* Nobody starves: whoever has waited for ``patience_ns`` is next in its class; a simulation also
  before robots, alone. Neither where a waiting robot would be late by it.

Rejected: preemption (an inference cannot be stopped); a queue per session with more than the newest
observation (an answer to an old one is worth nothing to a controller); sharing a batch between
classes (the robot would pay for the simulations' pixels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.server.cost_model import InferenceCostModel

PATIENCE_NS = 1_000_000_000
NEVER = 2**63 - 1


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """One observation that waits.

    Attributes:
        session: Whose.
        arrived_ns: When it came.
        deadline_ns: When its answer is worth nothing any more; ``NEVER``.
        alone: It must not share a batch: its answer has to be bit-equal wherever it is computed.
        content: The caller's.
        due_ns: When its session needs the answer, as it declared; its deadline where that is sooner
            or nothing was declared. What is overdue is still computed.
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
class Turn:
    """What to do now.

    Attributes:
        batch: To be computed together; empty where nothing is due.
        late: To be answered at once that their time is up.
        wait_until_ns: When to ask again, if nothing comes before; None where nothing waits.
    """

    batch: list[QueuedRequest] = field(default_factory=list)
    late: list[QueuedRequest] = field(default_factory=list)
    wait_until_ns: int | None = None


@dataclass(slots=True, eq=False)
class _Session:
    robot: bool
    budget_ns: int
    served_at: int = 0
    waiting: QueuedRequest | None = None


class Scheduler:
    """Chooses among the requests that wait.

    Args:
        sizes: Batch sizes that the model is prepared for.
        costs: What they take; kept up to date by whoever computes.
        max_wait_ns: For a simulation's partners; 0 for none.
        patience_ns: After which a simulation goes before robots that can afford it.
    """

    def __init__(
        self,
        costs: InferenceCostModel,
        sizes: Sequence[int] = (1,),
        *,
        max_wait_ns: int = 0,
        patience_ns: int = PATIENCE_NS,
    ) -> None:
        self.costs, self.sizes = costs, tuple(sorted({1, *sizes}))
        self._max_wait_ns, self._patience_ns = max_wait_ns, patience_ns
        self._sessions: dict[int, _Session] = {}
        self._waiting = 0
        self._turn = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return self._waiting

    def join(self, session: int, *, robot: bool, budget_ns: int = NEVER) -> None:
        """A session begins.

        Args:
            budget_ns: How soon it needs its answers.
        """
        self._sessions[session] = _Session(robot, budget_ns, self._turn)

    def leave(self, session: int) -> QueuedRequest | None:
        """A session is over; what it had waiting."""
        waiting = self.withdraw(session)
        self._sessions.pop(session, None)
        return waiting

    def offer(self, request: QueuedRequest) -> QueuedRequest | None:
        """Take a request; the older one of its session, which nobody needs any more."""
        session = self._sessions[request.session]
        older, session.waiting = session.waiting, request
        self._waiting += older is None
        return older

    def withdraw(self, session: int) -> QueuedRequest | None:
        """Forget what a session has waiting; that."""
        entry = self._sessions.get(session)
        if entry is None or entry.waiting is None:
            return None
        request, entry.waiting = entry.waiting, None
        self._waiting -= 1
        return request

    def longest_permitted(self) -> int:
        """The largest batch that simulations may have now."""
        budgets_ns = [s.budget_ns for s in self._sessions.values() if s.robot]
        budget_ns = min(budgets_ns, default=NEVER)
        if budget_ns == NEVER:
            return self.sizes[-1]
        spare_ns = budget_ns - len(budgets_ns) * self.costs.most(1)
        return max((n for n in self.sizes if self.costs.most(n) <= spare_ns), default=1)

    def next(self, now_ns: int) -> Turn:
        """What to do at ``now_ns``. What it gives out does not wait any more."""
        turn = Turn()
        if not self._waiting:
            return turn
        if len(self._sessions) == 1:
            # The usual case by far, a robot with a server of its own, pays for nothing else.
            (entry,) = self._sessions.values()
            request = self.withdraw(next(iter(self._sessions)))
            if request is not None:
                late = now_ns + self.costs.least(1) > request.deadline_ns
                (turn.late if late else turn.batch).append(request)
            return turn
        robots, simulations = self._sorted(now_ns, turn)
        chosen = self._choose(robots, simulations, now_ns, turn)
        self._turn += 1
        for request in chosen:
            entry = self._sessions[request.session]
            entry.waiting, entry.served_at = None, self._turn
        self._waiting -= len(chosen)
        turn.batch = chosen
        return turn

    def _sorted(self, now_ns: int, turn: Turn) -> tuple[list[QueuedRequest], list[QueuedRequest]]:
        """Robots' and simulations' requests in their order; the late ones go to ``turn``."""
        soonest_ns = now_ns + self.costs.least(1)
        classes: tuple[list[tuple[int, int, int, QueuedRequest]], ...] = ([], [])
        for number, entry in self._sessions.items():
            request = entry.waiting
            if request is None:
                continue
            if soonest_ns > request.deadline_ns:
                entry.waiting = None
                self._waiting -= 1
                turn.late.append(request)
                continue
            key = (request.due_ns, entry.served_at, number)
            classes[not entry.robot].append((*key, request))
        robots, simulations = (
            [request for *_, request in sorted(group, key=lambda entry: entry[:3])]
            for group in classes
        )
        return robots, simulations

    def _choose(
        self, robots: list[QueuedRequest], simulations: list[QueuedRequest], now_ns: int, turn: Turn
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
            simulations = [starved, *(one for one in simulations if one is not starved)]
        cap = self.longest_permitted()
        batch = self._batch(simulations, cap, now_ns)
        until_ns = self._worth_waiting_until(simulations, batch, cap, now_ns)
        if until_ns > now_ns:
            turn.wait_until_ns = until_ns
            return []
        return batch

    def _starved(
        self, candidates: list[QueuedRequest], robots: list[QueuedRequest], now_ns: int
    ) -> QueuedRequest | None:
        """Whoever has waited too long, if all of ``robots`` can come after it in time."""
        oldest = min(candidates, key=lambda request: request.arrived_ns, default=None)
        if oldest is None or now_ns - oldest.arrived_ns < self._patience_ns:
            return None
        done_ns = now_ns + self.costs.most(1)
        for robot in robots:
            if robot is not oldest:
                done_ns += self.costs.most(1)
                if done_ns > robot.due_ns:
                    return None
        return oldest

    def _batch(self, requests: list[QueuedRequest], cap: int, now_ns: int) -> list[QueuedRequest]:
        """The first of them, and those that may share its batch."""
        if requests[0].alone:
            return requests[:1]
        together = [request for request in requests if not request.alone][:cap]
        for count in range(len(together), 1, -1):
            size = next(n for n in self.sizes if n >= count)  # not filled, it is padded
            # Who is overdue already is not made more so by company.
            alone_ns = now_ns + self.costs.most(1)
            due = (r.due_ns for r in together[:count] if r.due_ns >= alone_ns)
            soonest_ns = min(*(r.deadline_ns for r in together[:count]), min(due, default=NEVER))
            if (
                size <= cap
                and self.costs.usual(size) <= count * self.costs.usual(1)
                and now_ns + self.costs.most(size) <= soonest_ns
            ):
                return together[:count]
        return together[:1]

    def _worth_waiting_until(
        self, waiting: list[QueuedRequest], batch: list[QueuedRequest], cap: int, now_ns: int
    ) -> int:
        """When this batch of simulations must start, partners or none; ``now_ns`` for at once."""
        if not self._max_wait_ns or len(batch) >= cap or batch[0].alone:
            return now_ns
        absent = sum(not s.robot and s.waiting is None for s in self._sessions.values())
        if not absent:
            return now_ns
        larger = next((n for n in self.sizes if n > len(batch)), self.sizes[-1])
        oldest_ns = min(request.arrived_ns for request in waiting)
        last_ns = min(request.due_ns for request in waiting) - self.costs.most(larger)
        return min(oldest_ns + self._max_wait_ns, last_ns)
