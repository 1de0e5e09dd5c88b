"""Server and client together, over both transports: replies, isolation, freshness, loss."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from policies.checkpoint.load import load_policy
from policies.errors import ContractMismatch, InferenceError, ObservationError
from policies.types import STAGES, ActionChunk, MetaObs
from runtime.client import PolicyClient
from runtime.errors import RequestTimeout, ServerBusy, ServerLost
from runtime.protocol import messages
from runtime.server import PolicyServer
from runtime.server.cost_model import InferenceCostModel
from runtime.server.server_process import ServerProcess
from runtime.server.warmup import synthetic_observation, warm_up
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import CONTRACT, ToyPolicy, observation
from transport.dialer import Dialer
from transport.errors import AddressInUse, Refused, TransportTimeout

TRANSPORTS = ["shm", "zmq"]
TOY = ("-m", "python:tests.runtime.toy_policy:make")


def poll_until(client: PolicyClient, replies: int) -> list[int]:
    """Timesteps of the next ``replies`` chunks."""
    got: list[int] = []
    deadline_s = time.monotonic() + 30
    while len(got) < replies and time.monotonic() < deadline_s:
        chunk = client.poll()
        if chunk is not None:
            got.append(chunk.obs_timestep)
    return got


# replies


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_served_equals_in_process_bit_for_bit(transport: str) -> None:
    local = ToyPolicy()
    rng = np.random.default_rng(0)
    with serving(ToyPolicy()) as server, connect(server, transport) as client:
        assert client.contract == CONTRACT
        for tick in range(20):
            obs = MetaObs(
                images={"top": rng.integers(0, 256, (24, 32, 3), np.uint8)},
                state=rng.normal(size=14).astype(np.float32),
                timestep=tick,
                t_capture_ns=tick * 7,
            )
            ours, theirs = local.infer(obs), client.infer(obs)
            assert theirs.actions.tobytes() == ours.actions.tobytes()
            assert (theirs.obs_timestep, theirs.t_capture_ns) == (tick, tick * 7)
        assert client.transport == transport
        assert client.transport_reason
        assert client.statistics().replies == 20


def test_auto_selects_shared_memory_on_one_host() -> None:
    with serving(ToyPolicy()) as server, connect(server) as client:
        client.infer(observation())
        assert client.transport == "shm"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_stages_add_up_to_the_request(transport: str) -> None:
    with serving(ToyPolicy()) as server, connect(server, transport) as client:
        client.infer(observation())
        began_ns = time.monotonic_ns()
        request = client.submit(observation())
        submitted_ns = polled_ns = time.monotonic_ns()
        while (chunk := client.poll()) is None:
            polled_ns = time.monotonic_ns()
        total_ns = time.monotonic_ns() - began_ns
        assert request == client.statistics().requests
        assert list(chunk.stages_ns) == list(STAGES)
        assert min(chunk.stages_ns.values()) >= 0
        assert [chunk.stages_ns[s] for s in ("preprocess", "infer", "postprocess")] == [1, 2, 3]
        # It had not arrived at the last poll, and had when the loop ended.
        assert polled_ns - submitted_ns <= sum(chunk.stages_ns.values()) <= total_ns


def test_images_rendered_into_the_loan_arrive() -> None:
    with serving(ToyPolicy()) as server, connect(server, "shm") as client:
        assert client.loan_images() == {}  # its messages are laid out when the session opens
        client.open(messages.observation_schema(observation()))
        for shade in (10, 200):
            images = client.loan_images()
            images["top"][:] = shade
            chunk = client.infer(MetaObs(images=images, state=np.zeros(14, np.float32)))
            assert chunk.actions[0, 1] == pytest.approx(shade / 1000)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_submit_and_poll(transport: str) -> None:
    with serving(ToyPolicy()) as server, connect(server, transport) as client:
        assert client.poll() is None
        first, second = (client.submit(observation(timestep=t)) for t in (3, 4))
        assert second > first
        got = poll_until(client, 1)
        while got[-1] != 4:  # 3 may have been passed over for 4
            got += poll_until(client, 1)
        assert got in ([4], [3, 4])
        assert client.poll() is None


# isolation


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_reset_does_not_affect_another_client(transport: str) -> None:
    with (
        serving(ToyPolicy()) as server,
        connect(server, transport) as one,
        connect(server, transport) as two,
    ):
        asked = [int(c.infer(observation()).actions[0, 0]) for c in (one, two, one, two)]
        assert asked == [1, 1, 2, 2]
        one.reset()
        assert int(one.infer(observation()).actions[0, 0]) == 1
        assert int(two.infer(observation()).actions[0, 0]) == 3
        with one.fork() as third:
            assert int(third.infer(observation()).actions[0, 0]) == 1
        assert server.statistics().resets == 1


def test_policy_without_fork_serves_one_session_at_a_time() -> None:
    policy = load_policy("python:tests.runtime.toy_policy:make_without_fork")
    with serving(policy) as server, connect(server) as one, connect(server) as two:
        one.infer(observation())
        with pytest.raises(Refused, match="sessions"):
            two.infer(observation())
        one.infer(observation())


# invalid input: each is a clear error, and the server continues


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        (MetaObs({"front": np.zeros((24, 32, 3), np.uint8)}, np.zeros(14, np.float32)),
         r"cameras: got \['front'\], expected \['top'\]"),
        (MetaObs({"top": np.zeros((10, 10, 3), np.uint8)}, np.zeros(14, np.float32)),
         r"images.top: got uint8 \(10, 10, 3\), expected uint8 \(24, 32, 3\)"),
        (MetaObs({"top": np.zeros((24, 32, 3), np.float32)}, np.zeros(14, np.float32)),
         r"images.top: got float32"),
        (MetaObs({"top": np.zeros((24, 32, 3), np.uint8)}, np.zeros(7, np.float32)),
         r"state: got float32 \(7,\), expected float32 \(14,\)"),
    ],
    ids=["camera", "size", "float image", "state length"],
)  # fmt: skip
def test_wrong_observation_is_refused(obs: MetaObs, message: str) -> None:
    with serving(ToyPolicy()) as server, connect(server) as client:
        with pytest.raises(ContractMismatch, match=message):
            client.infer(obs)
        client.infer(observation())  # the same client may try again


@pytest.mark.parametrize(
    ("changes", "attributes", "field"),
    [
        ({"state": np.zeros(7, np.float32)}, {"kind": "sim"}, "state"),
        ({"images": {}}, {"kind": "sim"}, "cameras"),
        ({}, {"kind": "mars"}, "kind"),
        ({}, {"kind": ["robot"]}, "kind"),
    ],
)
def test_server_checks_the_schema_too(
    changes: dict[str, object], attributes: dict[str, object], field: str
) -> None:
    """A client without its own check, such as a third-party one."""
    schema = messages.observation_schema(dataclasses.replace(observation(), **changes))
    with serving(ToyPolicy()) as server:
        with Dialer(server.host, server.port) as dialer, pytest.raises(Refused) as caught:
            dialer.open(schema, client="unchecked", attributes=attributes)
        assert caught.value.field == field
        with connect(server) as client:
            client.infer(observation())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_failed_request_has_the_reason_and_the_session_continues(transport: str) -> None:
    with serving(ToyPolicy()) as server, connect(server, transport) as client:
        with pytest.raises(ObservationError, match="state: got NaN"):
            client.infer(observation(np.nan))
        with pytest.raises(InferenceError, match="a bug in the policy"):
            client.infer(observation(666))
        assert client.infer(observation(1)).actions[0, 1] == pytest.approx(1.1)
        assert client.statistics().failures == 2
        assert server.statistics().failed == 2


def test_changed_observation_shape_is_refused() -> None:
    with serving(ToyPolicy()) as server, connect(server) as client:
        client.infer(observation())
        other = MetaObs({"top": np.zeros((9, 9, 3), np.uint8)}, np.zeros(14, np.float32))
        with pytest.raises(ContractMismatch, match=r"images\.top"):
            client.infer(other)
        client.infer(observation())


class Failing(ToyPolicy):
    """Fails at the place that the test names."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def reset(self) -> None:
        if self.where == "reset" and self.asked:
            raise RuntimeError("no more episodes")

    def infer(self, obs: MetaObs) -> ActionChunk:
        if self.where == "transport":
            raise TransportTimeout("a policy that asks another server")
        chunk = super().infer(obs)
        if self.where == "nan":
            chunk.actions[3, 3] = np.nan
        return dataclasses.replace(chunk, obs_timestep=99) if self.where == "tick" else chunk

    def fork(self) -> Failing:
        if self.where == "fork later":
            self.where = "fork"
        elif self.where == "fork":
            raise RuntimeError("no more forks")
        return Failing(self.where)

    def close(self) -> None:
        if self.where == "close" and self.asked:
            raise RuntimeError("cannot close")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_failed_reset_ends_only_its_session(transport: str) -> None:
    with serving(Failing("reset")) as server, connect(server, transport) as other:
        other.infer(observation())
        with connect(server, transport) as client:
            client.infer(observation())
            client.reset()
            with pytest.raises(ServerLost, match=r"failed to reset.*no more episodes"):
                client.infer(observation())
        other.infer(observation())


def test_failed_fork_ends_only_its_session() -> None:
    with serving(Failing("fork later")) as server, connect(server) as client:
        with pytest.raises(ServerLost, match=r"could not be forked.*no more forks"):
            client.infer(observation())
        assert server.statistics().answered == 0


def test_server_survives_a_policy_that_fails_to_close() -> None:
    with serving(Failing("close")) as server:
        for _ in range(2):
            with connect(server) as client:
                client.infer(observation())


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("transport", "a policy that asks another server"),
        ("tick", "chunk for tick 99, expected 0"),
        ("nan", "returned NaN or infinity"),
    ],
)
def test_any_policy_failure_is_reported_to_the_client(where: str, message: str) -> None:
    with serving(Failing(where)) as server, connect(server) as client:
        for _ in range(4):  # more often than requests may be in flight
            with pytest.raises(InferenceError, match=message):
                client.infer(observation())


# freshness


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_beyond_max_in_flight_only_the_newest_waits(transport: str) -> None:
    gate = threading.Semaphore(0)
    policy = ToyPolicy(gate)
    with serving(policy) as server, connect(server, transport, max_in_flight=1) as client:
        client.submit(observation(timestep=0))
        policy.entered.acquire()
        for tick in (1, 2, 3):
            client.submit(observation(timestep=tick))
        assert client.statistics().superseded == 2
        gate.release(10)
        assert poll_until(client, 2) == [0, 3]
        assert client.statistics().requests == 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_request_gets_a_chunk_or_is_superseded(transport: str) -> None:
    gate = threading.Semaphore(0)
    policy = ToyPolicy(gate)
    with serving(policy) as server, connect(server, transport, max_in_flight=3) as client:
        client.submit(observation(timestep=0))
        policy.entered.acquire()
        client.submit(observation(timestep=1))
        client.submit(observation(timestep=2))
        gate.release(10)
        got: list[int] = []
        deadline_s = time.monotonic() + 30
        while len(got) + client.statistics().superseded < 3 and time.monotonic() < deadline_s:
            if (chunk := client.poll()) is not None:
                got.append(chunk.obs_timestep)
        assert got[0] == 0
        assert got[-1] == 2
        if transport == "shm":  # both were in the ring when the server looked again
            assert got == [0, 2]
        assert server.statistics().superseded == client.statistics().superseded == 3 - len(got)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_late_reply_is_dropped(transport: str) -> None:
    gate = threading.Semaphore(0)
    policy = ToyPolicy(gate)
    with serving(policy) as server, connect(server, transport) as client:
        with pytest.raises(RequestTimeout, match=r"no answer from .* within 0.05 s"):
            client.infer(observation(timestep=1), timeout_s=0.05)
        gate.release(10)
        assert client.infer(observation(timestep=2)).obs_timestep == 2
        assert client.statistics().dropped_late == 1
        client.submit(observation(timestep=3))
        client.cancel()
        assert client.infer(observation(timestep=4)).obs_timestep == 4


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_request_that_would_expire_times_out_at_once(transport: str) -> None:
    class Minute(InferenceCostModel):
        def min(self, size: int = 1) -> int:
            return 60 * 10**9

    costs = Minute()
    with serving(ToyPolicy(), costs=costs) as server, connect(server, transport) as client:
        assert client.infer(observation(timestep=1), timeout_s=100).obs_timestep == 1
        for tick in (2, 3):
            with pytest.raises(RequestTimeout, match=r"within 50 s: the request expired"):
                client.infer(observation(timestep=tick), timeout_s=50)
            assert client.infer(observation(timestep=tick + 10), timeout_s=100).obs_timestep > 10
        assert client.statistics().failures == 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_short_timeout_is_kept_with_a_server_process(transport: str) -> None:
    with (
        ServerProcess(["-m", "python:tests.runtime.toy_policy:make_slow"]) as server,
        PolicyClient(server.address, transport=transport, timeout_s=30) as client,
    ):
        assert client.infer(observation(timestep=1)).obs_timestep == 1
        for tick, timeout_s in enumerate((0.0, 0.001, 0.05, 0.15, 0.19), start=2):
            with pytest.raises(RequestTimeout, match=rf"within {timeout_s:g} s"):
                client.infer(observation(timestep=tick), timeout_s=timeout_s)
            assert client.infer(observation(timestep=tick + 10)).obs_timestep == tick + 10


@pytest.mark.parametrize("timeout_s", [float("inf"), float("nan"), -1, 1e12])
def test_invalid_timeout_is_refused(timeout_s: float) -> None:
    with serving(ToyPolicy()) as server:
        with pytest.raises(ValueError, match=r"timeout_s: got .*, expected 0 to 1e\+06 seconds"):
            connect(server, timeout_s=timeout_s)
        with connect(server) as client:
            with pytest.raises(ValueError, match="timeout_s: got"):
                client.infer(observation(timestep=1), timeout_s=timeout_s)
            assert client.infer(observation(timestep=2)).obs_timestep == 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_busy_server_is_busy_and_not_lost(transport: str) -> None:
    gate = threading.Semaphore(0)
    with serving(ToyPolicy(gate)) as server, connect(server, transport) as client:
        for tick in range(8):
            with pytest.raises(RequestTimeout):
                client.infer(observation(timestep=tick), timeout_s=0.02)
            client.reset()
        with pytest.raises(ServerBusy, match="is busy"):
            for tick in range(8):
                client.submit(observation(timestep=tick))
                client.cancel()
        gate.release(100)
        assert client.infer(observation(timestep=50)).obs_timestep == 50
        # Expired requests were not computed.
        assert server.statistics().answered < client.statistics().requests


def test_max_in_flight_is_bounded_by_the_slots() -> None:
    with (
        serving(ToyPolicy()) as server,
        pytest.raises(ValueError, match="max_in_flight: got 4, expected 1 to 3"),
    ):
        connect(server, max_in_flight=4)


# loss


def patiently() -> Iterator[None]:
    """Until 20 s are over, however fast the calls are."""
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        yield


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_any_call_after_a_loss_raises(transport: str) -> None:
    calls = [
        lambda client: client.loan_images(),
        lambda client: client.submit(observation()),
        lambda client: client.reset(),
        lambda client: poll_until(client, 1),
    ]
    for call in calls:
        with serving(ToyPolicy()) as server:
            client = connect(server, transport)
            client.infer(observation())
        with client:
            with pytest.raises(ServerLost, match="the test is over"):
                for _ in patiently():  # over TCP the news takes a moment
                    call(client)
            with pytest.raises(ServerLost):
                client.loan_images()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_loss_is_noticed_while_the_newest_observation_waits(transport: str) -> None:
    """Nothing is sent then: the server owes as many replies as it may.

    A TCP connection that is closed with unread data loses what was sent last: the reason.
    """
    gate = threading.Semaphore(0)
    with serving(ToyPolicy(gate)) as server:
        client = connect(server, transport)
        for _ in range(5):
            client.submit(observation())
        gate.release(5)
    with client, pytest.raises(ServerLost, match=r"the test is over|connection to .* broke"):
        for _ in patiently():
            client.submit(observation())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_loss_is_noticed_while_images_are_loaned(transport: str) -> None:
    with serving(ToyPolicy()) as server:
        client = connect(server, transport)
        client.infer(observation())
        client.loan_images()
    with client, pytest.raises(ServerLost, match="the test is over"):
        for _ in patiently():  # over TCP the news takes a moment
            client.loan_images()


def test_another_policy_at_the_same_address_is_an_error() -> None:
    class Other(ToyPolicy):
        def __init__(self) -> None:
            super().__init__()
            self.contract = dataclasses.replace(CONTRACT, normalizer_hash="another")

    with serving(ToyPolicy()) as server:
        port = server.port
        early, late = connect(server), connect(server)
        late.infer(observation())
    with serving(Other(), port=port), early, late:
        with pytest.raises(ContractMismatch, match="another server's"):
            early.infer(observation())
        with pytest.raises(ServerLost):
            late.infer(observation())
        with pytest.raises(ContractMismatch, match="normalizer_hash: got another"):
            late.reconnect()
        with pytest.raises(ServerLost):  # and stays lost
            late.infer(observation())


def hashed(weights_hash: str) -> ToyPolicy:
    policy = ToyPolicy()
    policy.info = dataclasses.replace(policy.info, weights_hash=weights_hash)
    return policy


@pytest.mark.parametrize(
    ("before", "after", "refusal"),
    [
        ("0a", "0a", ""),
        ("", "0b", ""),
        ("0a", "0b", "weights_hash: got '0b', expected '0a'"),
        ("0a", "", "weights_hash: got none, expected '0a'"),
    ],
)
def test_reconnecting_demands_the_same_weights(before: str, after: str, refusal: str) -> None:
    with serving(hashed(before)) as server:
        port = server.port
        client = connect(server)
        client.infer(observation())
        assert client.info.weights_hash == before
    with serving(hashed(after), port=port), client:
        with pytest.raises(ServerLost):
            client.infer(observation())
        if not refusal:
            client.reconnect()
            assert client.infer(observation()).actions[0, 0] == 1
            assert client.info.weights_hash == after
            return
        for _ in range(2):  # a refusal does not make the other weights the expected ones
            with pytest.raises(ContractMismatch, match=refusal):
                client.reconnect()
        with pytest.raises(ServerLost):
            client.infer(observation())


def test_weights_that_the_operator_replaced_are_replaced_after_reconnecting_too() -> None:
    with serving(hashed("0a")) as server:
        port = server.port
        client = connect(server)
        client.infer(observation())
    with serving(hashed("0a"), port=port) as server, client:
        for later in ("0b", "0c"):
            server.call_in_serving_thread(lambda later=later: server.swap(hashed(later)))
        with pytest.raises(ServerLost):
            client.infer(observation())
        client.reconnect()
        assert client.info.weights_hash == "0c"
        client.require_weights("0a")
        with pytest.raises(ContractMismatch, match="got '0c', expected '0d'"):
            client.require_weights("0d")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_stopped_server_is_lost_with_its_reason_until_reconnect(transport: str) -> None:
    with serving(ToyPolicy()) as server:
        port = server.port
        client = connect(server, transport)
        client.infer(observation())
    with client:
        with pytest.raises(ServerLost, match="the test is over"):
            client.infer(observation())
        with pytest.raises(ServerLost):  # it stays lost
            client.poll()
        with pytest.raises(ServerLost, match="no server at"):
            client.reconnect(timeout_s=0.2)
        with serving(ToyPolicy(), port=port):
            client.reconnect()
            assert int(client.infer(observation()).actions[0, 0]) == 1
            assert client.statistics().sessions == 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_killed_server_is_lost(transport: str) -> None:
    with ServerProcess(TOY) as server, PolicyClient(server.address, transport=transport) as client:
        client.infer(observation())
        server.kill()
        with pytest.raises(ServerLost):
            client.infer(observation())


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_signal_stops_the_server_and_the_client_gets_the_reason(number: str) -> None:
    with ServerProcess(TOY) as server, PolicyClient(server.address) as client:
        client.infer(observation())
        os.kill(server.pid, getattr(signal, number))
        assert select.select([server.pidfd], [], [], 20)[0]
        assert server.returncode == 0
        with pytest.raises(ServerLost, match=f"shutting down \\({number}\\)"):
            client.infer(observation())


def test_no_server_at_the_address_times_out() -> None:
    with pytest.raises(TransportTimeout, match=r"127\.0\.0\.1:1"):
        PolicyClient("127.0.0.1:1", timeout_s=0.2)


def test_port_in_use_is_an_error() -> None:
    with serving(ToyPolicy()) as server, pytest.raises(AddressInUse, match=str(server.port)):
        PolicyServer(ToyPolicy(), port=server.port)


@pytest.mark.parametrize(
    ("where", "message"),
    [("nan", "NaN"), ("reset", "no more episodes"), ("transport", "warming up")],
)
def test_warm_up_finds_a_policy_that_fails(where: str, message: str) -> None:
    with pytest.raises(InferenceError, match=message):
        warm_up(Failing(where))


def test_warm_up_resets_the_policy() -> None:
    policy = ToyPolicy()
    assert warm_up(policy).count >= 2
    assert policy.asked == 0
    assert synthetic_observation(CONTRACT).images["top"].shape == (24, 32, 3)


def test_the_client_needs_neither_torch_nor_mujoco() -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'mujoco', 'gymnasium', 'av', 'tqdm'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import runtime.client, runtime.control.control_loop, runtime.control.chunk_executor\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
