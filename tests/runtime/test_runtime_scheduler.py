"""The scheduler's laws, over thousands of arrival patterns on a clock of their own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from runtime.server.cost_model import InferenceCostModel
from runtime.server.scheduler import NEVER, QueuedRequest, Scheduler, Turn

MS = 1_000_000
COST = {1: 10 * MS, 2: 14 * MS, 4: 22 * MS}
PATTERNS = 1500


def costs() -> InferenceCostModel:
    return InferenceCostModel(COST)


@dataclass
class SessionState:
    """One answer: which, when its computation began and ended, with whom."""

    request: QueuedRequest
    began_ns: int
    ended_ns: int
    together: list[QueuedRequest]


@dataclass
class World:
    """Sessions that ask at random, one server that computes, and a clock."""

    seed: int
    robots: int
    simulations: int
    robot_budget_ns: int = NEVER
    sim_budget_ns: int = NEVER
    max_wait_ns: int = 0
    alone: frozenset[int] = frozenset()
    span_ns: int = 800 * MS
    served: list[SessionState] = field(default_factory=list)
    late: list[tuple[QueuedRequest, int]] = field(default_factory=list)
    passed_over: list[QueuedRequest] = field(default_factory=list)
    asked: list[QueuedRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.scheduler = Scheduler(costs(), tuple(COST), max_wait_ns=self.max_wait_ns)
        for number in range(self.robots + self.simulations):
            robot = self.is_robot(number)
            budget_ns = self.robot_budget_ns if robot else self.sim_budget_ns
            self.scheduler.join(number, robot=robot, budget_ns=budget_ns)

    def is_robot(self, session: int) -> bool:
        return session < self.robots

    def arrivals(self) -> Iterator[tuple[int, int]]:
        """(when, session), in order."""
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
            turn = self.scheduler.next(now)
            self.late += [(request, now) for request in turn.late]
            if turn.batch:
                self._check(turn, now)
                size = next(n for n in sorted(COST) if n >= len(turn.batch))
                ended = now + COST[size]
                self.served += [SessionState(r, now, ended, turn.batch) for r in turn.batch]
                now = ended
            elif coming or turn.wait_until_ns is not None:
                times = [coming[0][0]] if coming else []
                times += [turn.wait_until_ns] if turn.wait_until_ns is not None else []
                assert min(times) > now, "it would spin"
                now = min(times)
            elif len(self.scheduler):
                raise AssertionError("something waits and nothing is due, ever")
        return self

    def _arrive(self, at: int, session: int) -> None:
        budget = self.robot_budget_ns if self.is_robot(session) else self.sim_budget_ns
        deadline = NEVER if budget == NEVER else at + budget
        request = QueuedRequest(session, at, deadline, session in self.alone)
        self.asked.append(request)
        older = self.scheduler.offer(request)
        if older is not None:
            self.passed_over.append(older)

    def _check(self, turn: Turn, now: int) -> None:
        """What must hold of every batch, whatever came before."""
        batch = turn.batch
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


def test_every_request_is_answered_once_or_passed_over_for_a_newer_one(runs: list[World]) -> None:
    for world in runs:
        ends = [s.request for s in world.served] + [r for r, _ in world.late] + world.passed_over
        assert sorted(map(id, ends)) == sorted(map(id, world.asked))


def test_a_session_is_answered_in_order(runs: list[World]) -> None:
    for world in runs:
        newest: dict[int, int] = {}
        for served in world.served:
            session = served.request.session
            assert served.request.arrived_ns > newest.get(session, -1)
            newest[session] = served.request.arrived_ns


def test_what_cannot_be_in_time_is_never_computed_and_what_can_is_not_refused(
    runs: list[World],
) -> None:
    for world in runs:
        for request, at in world.late:
            assert at + COST[1] > request.deadline_ns
        for served in world.served:
            assert served.ended_ns <= served.request.deadline_ns


def test_no_simulation_goes_before_a_robot_that_waits(runs: list[World]) -> None:
    for world in runs:
        gone = {id(s.request): s.began_ns for s in world.served}
        gone |= {id(request): at for request, at in world.late}
        robots = [r for r in world.asked if world.is_robot(r.session) and id(r) in gone]
        for served in world.served:
            if world.is_robot(served.request.session):
                continue
            before = [r for r in robots if r.arrived_ns <= served.began_ns < gone[id(r)]]
            waited = served.began_ns - served.request.arrived_ns
            assert not before or waited >= 1000 * MS


def test_a_robot_waits_for_no_partner(runs: list[World]) -> None:
    for world in runs:
        busy = sorted({(s.began_ns, s.ended_ns) for s in world.served})
        for served in world.served:
            request = served.request
            if world.is_robot(request.session) and request.arrived_ns < served.began_ns:
                # From its arrival to its turn the server computed without a pause.
                at = request.arrived_ns
                for began, ended in busy:
                    if began <= at < ended:
                        at = ended
                assert at == served.began_ns or served.began_ns in {b for b, _ in busy if b <= at}


def test_a_simulation_waits_for_partners_only_so_long(runs: list[World]) -> None:
    for world in runs:
        busy = sorted({(s.began_ns, s.ended_ns) for s in world.served})
        for served in world.served:
            # What nobody computed through, it waited for partners.
            idle, at = 0, served.request.arrived_ns
            for began, ended in busy:
                if began >= served.began_ns:
                    break
                if ended > at:
                    idle += max(0, began - at)
                    at = max(at, ended)
            idle += max(0, served.began_ns - at)
            assert idle <= world.max_wait_ns


def test_nobody_starves() -> None:
    """Two robots that ask without a pause, without deadlines, and one simulation."""
    scheduler = Scheduler(costs(), tuple(COST), patience_ns=100 * MS)
    for number in (0, 1):
        scheduler.join(number, robot=True)
    scheduler.join(2, robot=False)
    scheduler.offer(QueuedRequest(2, 0))
    now = 0
    while now < 200 * MS:
        for number in (0, 1):
            scheduler.offer(QueuedRequest(number, now))
        (batch,) = [scheduler.next(now).batch]
        if batch[0].session == 2:
            assert now >= 100 * MS
            assert len(batch) == 1
            return
        now += COST[2]
    raise AssertionError("it starved")


def test_a_starving_simulation_breaks_no_robots_deadline() -> None:
    scheduler = Scheduler(costs(), (1,), patience_ns=100 * MS)
    scheduler.join(0, robot=True, budget_ns=25 * MS)
    scheduler.join(1, robot=False)
    scheduler.offer(QueuedRequest(1, 0))
    scheduler.offer(QueuedRequest(0, 190 * MS, 215 * MS))
    (first,) = scheduler.next(200 * MS).batch  # 10 for the other, 10 for it: 220
    assert first.session == 0
    scheduler.offer(QueuedRequest(0, 200 * MS, 225 * MS))
    (first,) = scheduler.next(200 * MS).batch
    assert first.session == 1


def test_equals_take_turns() -> None:
    scheduler = Scheduler(costs(), (1,))
    for number in range(5):
        scheduler.join(number, robot=False)
    order = []
    for turn in range(20):
        for number in range(5):
            scheduler.offer(QueuedRequest(number, turn))
        order.append(scheduler.next(turn).batch[0].session)
    assert order == [0, 1, 2, 3, 4] * 4


def feasible(requests: list[QueuedRequest], now: int) -> bool:
    """Whether one at a time, earliest deadline first, keeps all deadlines: then and only then can
    any order (Jackson 1955)."""
    for request in sorted(requests, key=lambda r: r.deadline_ns):
        now += COST[1]
        if now > request.deadline_ns:
            return False
    return True


def test_deadlines_are_kept_whenever_that_is_possible() -> None:
    """Of what waits: batches may make more possible, and must make nothing impossible."""
    pick, kept = random.Random(3), 0
    for _ in range(PATTERNS):
        scheduler = Scheduler(costs(), tuple(COST))
        requests = []
        for number in range(pick.randrange(1, 9)):
            scheduler.join(number, robot=False)
            deadline = pick.choice((pick.randrange(10, 90) * MS, NEVER))
            requests.append(QueuedRequest(number, 0, deadline))
            scheduler.offer(requests[-1])
        if not feasible(requests, 0):
            continue
        kept, now = kept + 1, 0
        while len(scheduler):
            turn = scheduler.next(now)
            assert not turn.late
            now += COST[next(n for n in sorted(COST) if n >= len(turn.batch))]
            assert all(now <= request.deadline_ns for request in turn.batch)
    assert kept > 300


def test_batches_are_capped_while_a_robot_lives() -> None:
    scheduler = Scheduler(costs(), tuple(COST))
    for number in range(4):
        scheduler.join(number, robot=False)
    assert scheduler.longest_permitted() == 4
    for budget, longest in ((40, 4), (31, 2), (23, 1), (12, 1)):
        scheduler.join(9, robot=True, budget_ns=budget * MS)
        assert scheduler.longest_permitted() == longest
    scheduler.leave(9)
    assert scheduler.longest_permitted() == 4


def test_a_batch_that_saves_nothing_is_not_made() -> None:
    scheduler = Scheduler(InferenceCostModel({1: 10 * MS, 2: 21 * MS}), (1, 2))
    for number in (0, 1):
        scheduler.join(number, robot=False)
        scheduler.offer(QueuedRequest(number, 0))
    assert len(scheduler.next(0).batch) == 1


def test_alone_in_the_world_a_request_is_served_or_refused_at_once() -> None:
    scheduler = Scheduler(costs(), tuple(COST), max_wait_ns=50 * MS)
    scheduler.join(0, robot=False)
    scheduler.offer(QueuedRequest(0, 0))
    assert len(scheduler.next(0).batch) == 1
    scheduler.offer(QueuedRequest(0, 0, 9 * MS))
    turn = scheduler.next(0)
    assert (len(turn.batch), len(turn.late), len(scheduler)) == (0, 1, 0)
    assert scheduler.next(0).wait_until_ns is None


def test_one_slow_inference_refuses_nobody() -> None:
    known = costs()
    known.add(1, 5_000 * MS)
    scheduler = Scheduler(known)
    for number in (0, 1):
        scheduler.join(number, robot=True)
        scheduler.offer(QueuedRequest(number, 0, 50 * MS))
    assert scheduler.next(0).late == []


def test_costs_forget_an_interruption_and_learn_a_change() -> None:
    known = InferenceCostModel()
    assert known.most(4) == 0
    for _ in range(20):
        known.add(1, 10)
    known.add(1, 500)
    assert (known.least(), known.usual(), known.most()) == (10, 10, 10)
    assert known.usual(4) == 40
    for _ in range(100):
        known.add(1, 30)
    assert (known.least(), known.usual(), known.most()) == (30, 30, 30)


def test_waiting_for_partners_ends_where_the_deadline_could_not_be_kept() -> None:
    scheduler = Scheduler(costs(), tuple(COST), max_wait_ns=50 * MS)
    for number in (0, 1):
        scheduler.join(number, robot=False)
    scheduler.offer(QueuedRequest(0, 0, 30 * MS))
    assert scheduler.next(0).wait_until_ns == 30 * MS - COST[2]
    assert len(scheduler.next(30 * MS - COST[2]).batch) == 1


@pytest.mark.parametrize("robot", [True, False])
def test_nobody_starves_in_its_own_class(robot: bool) -> None:
    """Two that ask without a pause, with deadlines, and one of their kind that has none."""
    scheduler = Scheduler(costs(), (1,))
    for number in range(3):
        scheduler.join(number, robot=robot)
    answers = {number: 0 for number in range(3)}
    now = 0
    waiting: set[int] = set()
    while now < 20_000 * MS:
        for number in set(answers) - waiting:
            scheduler.offer(QueuedRequest(number, now, NEVER if number == 2 else now + 5000 * MS))
            waiting.add(number)
        (request,) = scheduler.next(now).batch
        waiting.discard(request.session)
        answers[request.session] += 1
        now += COST[1]
    assert answers[2] >= 10
    assert min(answers[0], answers[1]) > 500


def test_what_was_declared_orders_what_has_no_deadline_of_its_own() -> None:
    scheduler = Scheduler(costs(), (1,))
    for number in range(2):
        scheduler.join(number, robot=True)
    scheduler.offer(QueuedRequest(0, 0, due_ns=90 * MS))
    scheduler.offer(QueuedRequest(1, 0, due_ns=30 * MS))
    assert [scheduler.next(0).batch[0].session for _ in range(2)] == [1, 0]


def test_what_is_overdue_is_computed_and_not_refused() -> None:
    scheduler = Scheduler(costs(), (1,))
    for number in range(2):
        scheduler.join(number, robot=True)
        scheduler.offer(QueuedRequest(number, 0, due_ns=5 * MS))
    turn = scheduler.next(50 * MS)
    assert (len(turn.batch), len(turn.late)) == (1, 0)


def test_who_is_overdue_may_share_a_batch() -> None:
    scheduler = Scheduler(costs(), tuple(COST))
    for number in range(2):
        scheduler.join(number, robot=False)
        scheduler.offer(QueuedRequest(number, 0, due_ns=5 * MS))
    assert len(scheduler.next(50 * MS).batch) == 2


def test_the_cap_leaves_room_for_every_robot() -> None:
    scheduler = Scheduler(costs(), tuple(COST))
    for number, longest in enumerate((4, 2, 1)):
        scheduler.join(number, robot=True, budget_ns=35 * MS)
        assert scheduler.longest_permitted() == longest
