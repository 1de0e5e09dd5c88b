"""One server, many clients: batches, robots first, deadlines, limits, and isolation."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from policies.checkpoint.load import load_policy
from policies.errors import InferenceError, ObservationError
from policies.types import ActionChunk
from runtime.client import PolicyClient
from runtime.errors import ServerLost
from runtime.options.defaults import DEFAULT_CHECKPOINT
from runtime.protocol import messages
from runtime.server import PolicyServer
from runtime.server.admission import SessionLimits
from runtime.server.cost_model import InferenceCostModel
from runtime.server.warmup import synthetic_observation
from tests.runtime.batch_policy import BatchPolicy
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import ToyPolicy, observation
from transport.base_channel import SLOTS, ReceivedMessage
from transport.channel import Kind, Message
from transport.errors import Refused
from transport.handshake_messages import Hello, Peer
from transport.server.listener_records import ServerSession

PATIENCE_S = 30.0
MS = 1_000_000


class FixedCosts(InferenceCostModel):
    """Keeps its first durations, because the tests hold inferences for any time."""

    def __init__(self, known: dict[int, int]) -> None:
        super().__init__()
        for size, duration_ns in known.items():
            super().add(size, duration_ns)

    def add(self, size: int, duration_ns: int) -> None:
        pass


SAVING = {1: 10 * MS, 2: 14 * MS, 4: 22 * MS}


def await_chunk(client: PolicyClient) -> ActionChunk:
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        chunk = client.poll()
        if chunk is not None:
            return chunk
        time.sleep(1e-4)
    raise AssertionError("no chunk")


@contextlib.contextmanager
def held(**options: object) -> Iterator[tuple]:
    """A server whose inferences wait for ``gate``, and a function that makes clients."""
    gate = threading.Semaphore(0)
    policy = BatchPolicy(gate=gate)
    with (
        serving(policy, **{"costs": FixedCosts(SAVING), **options}) as server,
        contextlib.ExitStack() as stack,
    ):

        def client(**options: object) -> PolicyClient:
            made = stack.enter_context(connect(server, **options))
            gate.release()
            made.infer(observation(-1))
            return made

        first = client()
        policy.done.clear()
        try:
            yield server, policy, gate, first, client
        finally:
            gate.release(100)


def occupy(policy: BatchPolicy, client: PolicyClient, value: float) -> None:
    """Submit a request of ``client`` and wait until the server computes it."""
    while policy.entered.acquire(blocking=False):
        pass
    client.submit(observation(value))
    assert policy.entered.acquire(timeout=PATIENCE_S)


def test_simulations_share_a_batch_and_each_gets_its_own_chunk() -> None:
    with held() as (server, policy, gate, first, client):
        others = [client() for _ in range(3)]
        policy.done.clear()
        occupy(policy, first, 1)
        for value, other in enumerate(others, 2):
            other.submit(observation(value, timestep=value))
        gate.release(2)
        assert await_chunk(first).actions[0, 0] == 1
        for value, other in enumerate(others, 2):
            chunk = await_chunk(other)
            assert chunk.actions[0, 0] == value
            assert chunk.obs_timestep == value
        assert policy.done[0] == [1]
        assert sorted(policy.done[1]) == [2, 3, 4]
        assert server.statistics().batches == 1


def test_bad_observation_in_a_batch_fails_only_its_request() -> None:
    with held() as (_, policy, gate, first, client):
        bad, good = client(), client()
        occupy(policy, first, 1)
        bad.submit(observation(float("nan")))
        good.submit(observation(7))
        gate.release(2)
        assert await_chunk(good).actions[0, 0] == 7
        with pytest.raises(ObservationError, match="NaN"):
            await_chunk(bad)


def test_policy_failure_on_a_batch_fails_its_requests_only() -> None:
    class Fragile(BatchPolicy):
        def infer_batch(self, observations):
            answers = super().infer_batch(observations)
            if len(observations) > 1:
                raise RuntimeError("a bug in the policy")
            return answers

    gate = threading.Semaphore(0)
    policy = Fragile(gate=gate)
    with serving(policy, costs=FixedCosts(SAVING)) as server, contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(connect(server)) for _ in range(3))
        for each in (first, second, third):
            gate.release()
            each.infer(observation(0))
        occupy(policy, first, 1)
        second.submit(observation(2))
        third.submit(observation(3))
        gate.release(2)
        await_chunk(first)
        for each in (second, third):
            with pytest.raises(InferenceError, match="a bug in the policy"):
                await_chunk(each)
        gate.release()
        assert second.infer(observation(4)).actions[0, 0] == 4


def test_robot_is_served_before_earlier_simulations() -> None:
    with held() as (_, policy, gate, first, client):
        simulations, robot = [client(), client()], client(kind="robot")
        policy.done.clear()
        occupy(policy, first, 1)
        for value, simulation in enumerate(simulations, 10):
            simulation.submit(observation(value))
        robot.submit(observation(99))
        gate.release(3)
        await_chunk(robot)
        for simulation in simulations:
            await_chunk(simulation)
        assert policy.done[:2] == [[1], [99]]


def test_robot_shares_no_batch_with_simulations() -> None:
    with held() as (_, policy, gate, first, client):
        robots = [client(kind="robot") for _ in range(2)]
        policy.done.clear()
        occupy(policy, first, 1)
        robots[0].submit(observation(5))
        gate.release(1)
        await_chunk(first)
        gate.release(1)
        await_chunk(robots[0])
        assert [5] in policy.done


def test_robots_deadline_limits_batch_sizes() -> None:
    costs = FixedCosts({1: 10 * MS, 2: 14 * MS, 4: 60 * MS})
    with held(costs=costs) as (_, policy, gate, first, client):
        client(kind="robot", deadline_ms=50)
        simulations = [client() for _ in range(4)]
        policy.done.clear()
        occupy(policy, first, 1)
        for value, simulation in enumerate(simulations, 10):
            simulation.submit(observation(value))
        gate.release(5)
        for simulation in simulations:
            await_chunk(simulation)
        assert max(len(done) for done in policy.done) == 2


@pytest.mark.parametrize("exact", [True, False])
def test_deterministic_sessions_share_only_exact_batches(exact: bool) -> None:
    gate = threading.Semaphore(0)
    policy = BatchPolicy(gate=gate)
    policy.batch_is_exact = exact
    with serving(policy, costs=FixedCosts(SAVING)) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server, deterministic=True)) for _ in range(3)]
        for each in clients:
            gate.release()
            each.infer(observation(0))
        policy.done.clear()
        occupy(policy, clients[0], 1)
        clients[1].submit(observation(2))
        clients[2].submit(observation(3))
        gate.release(3)
        for each in clients:
            await_chunk(each)
        assert [len(done) for done in policy.done] == ([1, 2] if exact else [1, 1, 1])


def test_expired_request_is_rejected_without_inference() -> None:
    with held(costs=FixedCosts({1: 10 * MS})) as (server, policy, gate, first, client):
        expiring, robot = client(), client(kind="robot")
        policy.done.clear()
        occupy(policy, first, 1)
        expiring._session_for(observation(2)).submit(observation(2), 30 * MS)
        robot.submit(observation(3))
        gate.release(1)  # the server now has both requests, and takes the robot's
        await_chunk(first)
        assert policy.entered.acquire(timeout=PATIENCE_S)
        time.sleep(0.05)
        gate.release(1)
        await_chunk(robot)
        with pytest.raises(InferenceError, match="the request expired"):
            await_chunk(expiring)
        assert policy.done == [[1], [3]]
        assert server.statistics().late == 1


def test_rate_limited_session_gets_errors_and_does_not_slow_others() -> None:
    with serving(BatchPolicy(), limits=SessionLimits(rate_hz=20)) as server:
        with connect(server) as eager, connect(server) as calm:
            rejected = 0
            for value in range(40):
                try:
                    eager.infer(observation(value))
                except InferenceError as error:
                    assert "at most 20 per s" in str(error)
                    rejected += 1
            assert rejected >= 20
            assert calm.infer(observation(7)).actions[0, 0] == 7
        assert server.statistics().too_many == rejected


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (
            {"kind": "robot", "rate_hz": 91},
            r"91 requests/s of 10 ms each.*91 % of the time.*at most 90 %: 90 requests/s for ",
        ),
        ({"kind": "robot", "deadline_ms": 19}, r"its own 19, where 1 robots of 10 ms each"),
        ({"rate_hz": -1}, "a number above 0"),
        ({"deadline_ms": 0}, "a number above 0"),
        ({"rate_hz": float("nan")}, "a number above 0"),
        ({"kind": "cat"}, "one of"),
    ],
)
def test_session_beyond_capacity_is_refused_with_the_numbers(declared, message: str) -> None:
    with (
        serving(BatchPolicy(), costs=FixedCosts({1: 10 * MS})) as server,
        connect(server, **declared) as client,
        pytest.raises(Refused, match=message),
    ):
        client.infer(observation(1))


def test_session_that_breaks_another_robots_deadline_is_refused() -> None:
    with serving(BatchPolicy(), costs=FixedCosts({1: 10 * MS})) as server:
        with connect(server, kind="robot", deadline_ms=25) as first:
            first.infer(observation(1))
            with (
                connect(server, kind="robot") as second,
                pytest.raises(Refused, match="another robot's 25"),
            ):
                second.infer(observation(1))
            with connect(server) as simulation:
                simulation.infer(observation(1))
        with connect(server, kind="robot") as second:  # the first has ended
            deadline_s = time.monotonic() + PATIENCE_S
            while server.statistics().sessions > 0 and time.monotonic() < deadline_s:
                time.sleep(0.01)
            second.infer(observation(1))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (SessionLimits(message_bytes=1000), r"bytes, expected at most 1000"),
        (SessionLimits(total_bytes=1000), r"at most 1000 for all sessions"),
        (SessionLimits(rate_hz=10), r"expected at most 10"),
    ],
)
def test_limits_are_in_the_refusal(limits: SessionLimits, message: str) -> None:
    with (
        serving(BatchPolicy(), limits=limits) as server,
        connect(server, rate_hz=11) as client,
        pytest.raises(Refused, match=message),
    ):
        client.infer(observation(1))


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_idle_session_is_ended_with_the_reason_and_a_busy_one_is_not(transport: str) -> None:
    with (
        serving(ToyPolicy(), session_timeout_s=0.3) as server,
        connect(server, transport) as silent,
        connect(server, transport) as busy,
    ):
        silent.infer(observation(1))
        until_s = time.monotonic() + 2.5
        while time.monotonic() < until_s:
            busy.infer(observation(2))
            time.sleep(0.05)
        with pytest.raises(ServerLost, match=r"the session was idle for 0\.3 s"):
            silent.infer(observation(1))
        busy.infer(observation(2))


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_client_that_never_reads_delays_no_other(transport: str) -> None:
    with (
        serving(BatchPolicy()) as server,
        connect(server, transport, max_in_flight=3) as stuck,
        connect(server, transport) as other,
    ):
        stuck.infer(observation(1))
        session = stuck._session
        for number in range(20):  # beyond what a direction holds, and never a look at an answer
            with contextlib.suppress(Exception):
                loan = session.channel.loan()
                session.writer.write(observation(number), loan.arrays)
                loan.publish(1000 + number)
        for value in range(50):
            assert other.infer(observation(value), timeout_s=2.0).actions[0, 0] == value


def test_shipped_checkpoint_gives_the_same_bits_in_any_batch() -> None:
    policy = load_policy(DEFAULT_CHECKPOINT, device="cpu", threads=1)
    observations = [synthetic_observation(policy.contract, seed) for seed in range(4)]
    try:
        alone = [policy.infer(obs).actions.copy() for obs in observations]
        with serving(policy) as server, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(server, deterministic=True)) for _ in range(4)]
            for client, obs in zip(clients, observations, strict=True):
                client.infer(obs)
            for _ in range(5):
                for client, obs in zip(clients, observations, strict=True):
                    client.submit(obs)
                for client, expected in zip(clients, alone, strict=True):
                    assert np.array_equal(await_chunk(client).actions, expected)
            if len(server.model.sizes) > 1:
                assert server.statistics().batches > 0
    finally:
        policy.close()


def test_session_counts_for_admission_before_its_first_request() -> None:
    """Accepted sessions without a request count for admission and are in the status."""
    cost = FixedCosts({1: 20 * MS})
    wants = {"kind": "robot", "rate_hz": 20.0}
    schema = messages.observation_schema(observation(0))
    with serving(BatchPolicy(), costs=cost) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(connect(server, **wants)).open(schema)
        with pytest.raises(Refused, match="rate_hz"):
            stack.enter_context(connect(server, **wants)).open(schema)
        until_s = time.monotonic() + PATIENCE_S
        while (
            len(server.call_in_serving_thread(server.status)["sessions"]) < 2
            and time.monotonic() < until_s
        ):
            time.sleep(0.01)
        assert [s["kind"] for s in server.call_in_serving_thread(server.status)["sessions"]] == [
            "robot"
        ] * 2


def test_session_that_never_sends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server.session_manager.IDLE_CHECK_EVERY_S", 0.05)
    with (
        serving(BatchPolicy(), session_timeout_s=0.1) as server,
        connect(server) as client,
    ):
        client.open(messages.observation_schema(observation(0)))
        until_s = time.monotonic() + PATIENCE_S
        with pytest.raises(ServerLost, match="the session was idle"):
            while time.monotonic() < until_s:
                client.poll()
                time.sleep(0.01)


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_message_of_exactly_the_limit_is_accepted(transport: str) -> None:
    size = messages.observation_schema(observation(0)).nbytes
    limits = SessionLimits(message_bytes=max(size, 65536))
    with (
        serving(BatchPolicy(), limits=limits) as server,
        connect(server, transport) as client,
    ):
        assert client.infer(observation(5)).actions[0, 0] == 5


@pytest.mark.parametrize("change", [{"t_capture_ns": None}, {"stages_ns": {"infer": 2**70}}])
def test_chunk_that_cannot_be_sent_fails_only_its_request(change: dict) -> None:
    class Odd(BatchPolicy):
        def infer(self, obs):
            chunk = super().infer(obs)
            return dataclasses.replace(chunk, **change) if obs.state[0] == 7 else chunk

    with serving(Odd(), max_batch=1) as server, connect(server) as client:
        with pytest.raises(InferenceError, match="chunk cannot be sent"):
            client.infer(observation(7))
        assert client.infer(observation(5)).actions[0, 0] == 5


def test_client_that_only_resets_does_not_occupy_the_server() -> None:
    """One ``drain`` reads a bounded number of messages from a ring that never becomes empty."""
    served: list[str] = []

    class Endless:
        transport, unread, peer_memory = "shm", True, None

        def __init__(self) -> None:
            self.polled = 0

        def poll(self) -> Message:
            self.polled += 1
            assert self.polled <= 100, "nobody else is looked at"
            reset = ReceivedMessage(Kind.RESET, self.polled, 0, self.polled, None, b"")
            reset.attach_channel(self)  # type: ignore[arg-type]
            return reset

        def release_when_unused(self, message: Message) -> None:
            pass

    with PolicyServer(BatchPolicy()) as server:
        hello = Hello("c", messages.observation_schema(observation(0)), ("shm",))
        session = ServerSession(1, hello, Endless(), "", Peer())  # type: ignore[arg-type]
        server._session_manager.drain(session)
        assert session.channel.polled == SLOTS
        session.channel.close = served.append
        server._session_manager.end(session)
