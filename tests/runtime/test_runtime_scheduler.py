"""The scheduler's guarantees, over thousands of arrival patterns on a simulated clock."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from runtime.server.cost_model import InferenceCostModel
from runtime.server.scheduler import NEVER, Decision, QueuedRequest, Scheduler

MS = 1_000_000
COST = {1: 10 * MS, 2: 14 * MS, 4: 22 * MS}
PATTERNS = 1500


def costs() -> InferenceCostModel:
    return InferenceCostModel(COST)


@dataclass
class ServedRequest:
    """A computed request: when the inference began and ended, and its batch."""

    request: QueuedRequest
    began_ns: int
    ended_ns: int
    together: list[QueuedRequest]


@dataclass
class World:
    """A simulation: sessions with random requests, one server, and a clock."""

    seed: int
    robots: int
    simulations: int
    robot_budget_ns: int = NEVER
    sim_budget_ns: int = NEVER
    max_wait_ns: int = 0
    alone: frozenset[int] = frozenset()
    span_ns: int = 800 * MS
    served: list[ServedRequest] = field(default_factory=list)
    late: list[tuple[QueuedRequest, int]] = field(default_factory=list)
    superseded: list[QueuedRequest] = field(default_factory=list)
    requests: list[QueuedRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.scheduler = Scheduler(costs(), tuple(COST), max_wait_ns=self.max_wait_ns)
        for number in range(self.robots + self.simulations):
            robot = self.is_robot(number)
            budget_ns = self.robot_budget_ns if robot else self.sim_budget_ns
            self.scheduler.add_session(number, robot=robot, budget_ns=budget_ns)

    def is_robot(self, session: int) -> bool:
        return session < self.robots

    def arrivals(self) -> Iterator[tuple[int, int]]:
        """(time in ns, session) of every request, in order."""
        found = []
        for number in range(self.robots + self.simulations):
            at = self.random.randrange(40 * MS)
            gap = self.random.choice((15, 40, 120)) * MS
            while at < self.span_ns:
                found.append((at, number))
                at += self.random.randrange(1, 2 * gap)
        yield from sorted(found)

    def run(self) -> World:
        now, coming = 0, list(self.arrivals())
        while coming or len(self.scheduler):
            while coming and coming[0][0] <= now:
                self._arrive(*coming.pop(0))
            decision = self.scheduler.next(now)
            self.late += [(request, now) for request in decision.expired]
            if decision.batch:
                self._check(decision, now)
                size = next(n for n in sorted(COST) if n >= len(decision.batch))
                ended = now + COST[size]
                self.served += [
                    ServedRequest(r, now, ended, decision.batch) for r in decision.batch
                ]
                now = ended
            elif coming or decision.wait_until_ns is not None:
                times = [coming[0][0]] if coming else []
                times += [decision.wait_until_ns] if decision.wait_until_ns is not None else []
                assert min(times) > now, "the time to decide again is in the past"
                now = min(times)
            elif len(self.scheduler):
                raise AssertionError("a request waits and no time is given to compute it")
        return self

    def _arrive(self, at: int, session: int) -> None:
        budget = self.robot_budget_ns if self.is_robot(session) else self.sim_budget_ns
        deadline = NEVER if budget == NEVER else at + budget
        request = QueuedRequest(session, at, deadline, session in self.alone)
        self.requests.append(request)
        older = self.scheduler.enqueue(request)
        if older is not None:
            self.superseded.append(older)

    def _check(self, decision: Decision, now: int) -> None:
        """Check what holds for every batch."""
        batch = decision.batch
        assert len(batch) <= max(COST)
        assert len({self.is_robot(request.session) for request in batch}) == 1
        assert len({request.session for request in batch}) == len(batch)
        if any(request.alone for request in batch):
            assert len(batch) == 1
        if len(batch) > 1:
            size = next(n for n in sorted(COST) if n >= len(batch))
            assert all(now + COST[size] <= request.deadline_ns for request in batch)
        if not self.is_robot(batch[0].session) and self.robots:
            size = next(n for n in sorted(COST) if n >= len(batch))
            needed = COST[size] + self.robots * COST[1]
            assert len(batch) == 1 or needed <= self.robot_budget_ns


def worlds() -> Iterator[World]:
    pick = random.Random(7)
    for seed in range(PATTERNS):
        robots, simulations = pick.randrange(3), pick.randrange(9)
        if robots + simulations:
            yield World(
                seed,
                robots,
                simulations,
                robot_budget_ns=pick.choice((25, 33, 60, 200)) * MS
                if pick.random() < 0.7
                else NEVER,
                sim_budget_ns=pick.choice((30, 80, 400)) * MS if pick.random() < 0.5 else NEVER,
                max_wait_ns=pick.choice((0, 3, 20)) * MS,
                alone=frozenset(pick.sample(range(12), pick.randrange(4))),
            )


@pytest.fixture(scope="module")
def runs() -> list[World]:
    return [world.run() for world in worlds()]


def test_every_request_is_computed_expired_or_superseded_once(runs: list[World]) -> None:
    for world in runs:
        ends = [s.request for s in world.served] + [r for r, _ in world.late] + world.superseded
        assert sorted(map(id, ends)) == sorted(map(id, world.requests))


def test_requests_of_a_session_are_served_in_order(runs: list[World]) -> None:
    for world in runs:
        newest: dict[int, int] = {}
        for served in world.served:
            session = served.request.session
            assert served.request.arrived_ns > newest.get(session, -1)
            newest[session] = served.request.arrived_ns


def test_only_requests_that_cannot_meet_their_deadline_expire(
    runs: list[World],
) -> None:
    for world in runs:
        for request, at in world.late:
            assert at + COST[1] > request.deadline_ns
        for served in world.served:
            assert served.ended_ns <= served.request.deadline_ns


def test_no_simulation_goes_before_a_waiting_robot(runs: list[World]) -> None:
    for world in runs:
        gone = {id(s.request): s.began_ns for s in world.served}
        gone |= {id(request): at for request, at in world.late}
        robots = [r for r in world.requests if world.is_robot(r.session) and id(r) in gone]
        for served in world.served:
            if world.is_robot(served.request.session):
                continue
            before = [r for r in robots if r.arrived_ns <= served.began_ns < gone[id(r)]]
            waited = served.began_ns - served.request.arrived_ns
            assert not before or waited >= 1000 * MS


def test_robot_never_waits_to_share_a_batch(runs: list[World]) -> None:
    for world in runs:
        busy = sorted({(s.began_ns, s.ended_ns) for s in world.served})
        for served in world.served:
            request = served.request
            if world.is_robot(request.session) and request.arrived_ns < served.began_ns:
                # The server was busy from its arrival until it was served.
                at = request.arrived_ns
                for began, ended in busy:
                    if began <= at < ended:
                        at = ended
                assert at == served.began_ns or served.began_ns in {b for b, _ in busy if b <= at}


def test_simulation_waits_to_share_a_batch_at_most_max_wait(runs: list[World]) -> None:
    for world in runs:
        busy = sorted({(s.began_ns, s.ended_ns) for s in world.served})
        for served in world.served:
            # The time in which the server was idle, it waited to share a batch.
            idle, at = 0, served.request.arrived_ns
            for began, ended in busy:
                if began >= served.began_ns:
                    break
                if ended > at:
                    idle += max(0, began - at)
                    at = max(at, ended)
            idle += max(0, served.began_ns - at)
            assert idle <= world.max_wait_ns


def test_simulation_does_not_starve_behind_robots() -> None:
    """Two robots that send continuously without deadlines, and one simulation."""
    scheduler = Scheduler(costs(), tuple(COST), starvation_ns=100 * MS)
    for number in (0, 1):
        scheduler.add_session(number, robot=True)
    scheduler.add_session(2, robot=False)
    scheduler.enqueue(QueuedRequest(2, 0))
    now = 0
    while now < 200 * MS:
        for number in (0, 1):
            scheduler.enqueue(QueuedRequest(number, now))
        (batch,) = [scheduler.next(now).batch]
        if batch[0].session == 2:
            assert now >= 100 * MS
            assert len(batch) == 1
            return
        now += COST[2]
    raise AssertionError("the simulation starved")


def test_starving_simulation_breaks_no_robots_deadline() -> None:
    scheduler = Scheduler(costs(), (1,), starvation_ns=100 * MS)
    scheduler.add_session(0, robot=True, budget_ns=25 * MS)
    scheduler.add_session(1, robot=False)
    scheduler.enqueue(QueuedRequest(1, 0))
    scheduler.enqueue(QueuedRequest(0, 190 * MS, 215 * MS))
    (first,) = scheduler.next(200 * MS).batch  # 10 for the other, 10 for it: 220
    assert first.session == 0
    scheduler.enqueue(QueuedRequest(0, 200 * MS, 225 * MS))
    (first,) = scheduler.next(200 * MS).batch
    assert first.session == 1


def test_equal_sessions_take_turns() -> None:
    scheduler = Scheduler(costs(), (1,))
    for number in range(5):
        scheduler.add_session(number, robot=False)
    order = []
    for decision in range(20):
        for number in range(5):
            scheduler.enqueue(QueuedRequest(number, decision))
        order.append(scheduler.next(decision).batch[0].session)
    assert order == [0, 1, 2, 3, 4] * 4


def feasible(requests: list[QueuedRequest], now: int) -> bool:
    """Whether earliest deadline first, one at a time, meets all deadlines.

    If it does not, no order does (Jackson 1955).
    """
    for request in sorted(requests, key=lambda r: r.deadline_ns):
        now += COST[1]
        if now > request.deadline_ns:
            return False
    return True


def test_deadlines_are_met_whenever_that_is_possible() -> None:
    """Batches may meet more deadlines than single inferences, never fewer."""
    pick, kept = random.Random(3), 0
    for _ in range(PATTERNS):
        scheduler = Scheduler(costs(), tuple(COST))
        requests = []
        for number in range(pick.randrange(1, 9)):
            scheduler.add_session(number, robot=False)
            deadline = pick.choice((pick.randrange(10, 90) * MS, NEVER))
            requests.append(QueuedRequest(number, 0, deadline))
            scheduler.enqueue(requests[-1])
        if not feasible(requests, 0):
            continue
        kept, now = kept + 1, 0
        while len(scheduler):
            decision = scheduler.next(now)
            assert not decision.expired
            now += COST[next(n for n in sorted(COST) if n >= len(decision.batch))]
            assert all(now <= request.deadline_ns for request in decision.batch)
    assert kept > 300


def test_robots_deadline_limits_simulation_batches() -> None:
    scheduler = Scheduler(costs(), tuple(COST))
    for number in range(4):
        scheduler.add_session(number, robot=False)
    assert scheduler.max_simulation_batch() == 4
    for budget, longest in ((40, 4), (31, 2), (23, 1), (12, 1)):
        scheduler.add_session(9, robot=True, budget_ns=budget * MS)
        assert scheduler.max_simulation_batch() == longest
    scheduler.remove_session(9)
    assert scheduler.max_simulation_batch() == 4


def test_batch_slower_than_single_inferences_is_not_made() -> None:
    scheduler = Scheduler(InferenceCostModel({1: 10 * MS, 2: 21 * MS}), (1, 2))
    for number in (0, 1):
        scheduler.add_session(number, robot=False)
        scheduler.enqueue(QueuedRequest(number, 0))
    assert len(scheduler.next(0).batch) == 1


def test_request_of_the_only_session_is_served_or_expires_at_once() -> None:
    scheduler = Scheduler(costs(), tuple(COST), max_wait_ns=50 * MS)
    scheduler.add_session(0, robot=False)
    scheduler.enqueue(QueuedRequest(0, 0))
    assert len(scheduler.next(0).batch) == 1
    scheduler.enqueue(QueuedRequest(0, 0, 9 * MS))
    decision = scheduler.next(0)
    assert (len(decision.batch), len(decision.expired), len(scheduler)) == (0, 1, 0)
    assert scheduler.next(0).wait_until_ns is None


def test_one_slow_inference_expires_no_request() -> None:
    known = costs()
    known.add(1, 5_000 * MS)
    scheduler = Scheduler(known)
    for number in (0, 1):
        scheduler.add_session(number, robot=True)
        scheduler.enqueue(QueuedRequest(number, 0, 50 * MS))
    assert scheduler.next(0).expired == []


def test_cost_model_ignores_one_outlier_and_follows_a_change() -> None:
    known = InferenceCostModel()
    assert known.near_max(4) == 0
    for _ in range(20):
        known.add(1, 10)
    known.add(1, 500)
    assert (known.min(), known.median(), known.near_max()) == (10, 10, 10)
    assert known.median(4) == 40
    for _ in range(100):
        known.add(1, 30)
    assert (known.min(), known.median(), known.near_max()) == (30, 30, 30)


def test_wait_to_share_a_batch_ends_in_time_for_the_deadline() -> None:
    scheduler = Scheduler(costs(), tuple(COST), max_wait_ns=50 * MS)
    for number in (0, 1):
        scheduler.add_session(number, robot=False)
    scheduler.enqueue(QueuedRequest(0, 0, 30 * MS))
    assert scheduler.next(0).wait_until_ns == 30 * MS - COST[2]
    assert len(scheduler.next(30 * MS - COST[2]).batch) == 1


@pytest.mark.parametrize("robot", [True, False])
def test_no_session_starves_in_its_own_class(robot: bool) -> None:
    """Two sessions that send continuously with deadlines, and one of their class without."""
    scheduler = Scheduler(costs(), (1,))
    for number in range(3):
        scheduler.add_session(number, robot=robot)
    answers = {number: 0 for number in range(3)}
    now = 0
    waiting: set[int] = set()
    while now < 20_000 * MS:
        for number in set(answers) - waiting:
            scheduler.enqueue(QueuedRequest(number, now, NEVER if number == 2 else now + 5000 * MS))
            waiting.add(number)
        (request,) = scheduler.next(now).batch
        waiting.discard(request.session)
        answers[request.session] += 1
        now += COST[1]
    assert answers[2] >= 10
    assert min(answers[0], answers[1]) > 500


def test_declared_deadline_orders_requests_without_a_budget() -> None:
    scheduler = Scheduler(costs(), (1,))
    for number in range(2):
        scheduler.add_session(number, robot=True)
    scheduler.enqueue(QueuedRequest(0, 0, due_ns=90 * MS))
    scheduler.enqueue(QueuedRequest(1, 0, due_ns=30 * MS))
    assert [scheduler.next(0).batch[0].session for _ in range(2)] == [1, 0]


def test_overdue_request_without_a_budget_is_computed() -> None:
    scheduler = Scheduler(costs(), (1,))
    for number in range(2):
        scheduler.add_session(number, robot=True)
        scheduler.enqueue(QueuedRequest(number, 0, due_ns=5 * MS))
    decision = scheduler.next(50 * MS)
    assert (len(decision.batch), len(decision.expired)) == (1, 0)


def test_overdue_requests_may_share_a_batch() -> None:
    scheduler = Scheduler(costs(), tuple(COST))
    for number in range(2):
        scheduler.add_session(number, robot=False)
        scheduler.enqueue(QueuedRequest(number, 0, due_ns=5 * MS))
    assert len(scheduler.next(50 * MS).batch) == 2


def test_batch_limit_leaves_time_for_every_robot() -> None:
    scheduler = Scheduler(costs(), tuple(COST))
    for number, longest in enumerate((4, 2, 1)):
        scheduler.add_session(number, robot=True, budget_ns=35 * MS)
        assert scheduler.max_simulation_batch() == longest
