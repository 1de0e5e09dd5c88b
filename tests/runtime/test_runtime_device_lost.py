"""A device that is lost for good ends its server: clients get the reason, a supervisor a status."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from policies.errors import DeviceLost, InferenceError
from policies.types import Policy
from runtime.client import PolicyClient
from runtime.errors import ServerLost
from runtime.eval_sim import cli as eval_sim
from runtime.eval_sim.in_process_policy import InProcessPolicy
from runtime.protocol import messages
from runtime.server import PolicyServer
from runtime.server import cli as serve
from runtime.server.model_reload import ModelReloader
from runtime.server.warmup import warm_up
from tests.runtime.batch_policy import BatchPolicy
from tests.runtime.lost_policy import LOSES, REASON, LostPolicy
from tests.runtime.serving import connect
from tests.runtime.toy_policy import ToyPolicy, observation
from transport.errors import TransportTimeout

TRANSPORTS = ["shm", "zmq"]
MODULE = "python:tests.runtime.lost_policy"
PATIENCE_S = 20.0
LOST = f"the policy server has lost its device, and ends: {REASON}"


class Outcome:
    """How ``serve`` ended.

    Attributes:
        raised: What it raised; None if it returned.
    """

    raised: BaseException | None = None


@contextlib.contextmanager
def serving(policy: Policy) -> Iterator[tuple[PolicyServer, threading.Thread, Outcome]]:
    """A server in a thread whose end is recorded."""
    outcome = Outcome()

    def run() -> None:
        try:
            server.serve()
        except DeviceLost as error:
            outcome.raised = error

    with PolicyServer(policy) as server:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield server, thread, outcome
        finally:
            server.stop("the test is over")
            thread.join()


def error_of(client: PolicyClient) -> Exception:
    """The next error that ``poll`` raises."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            client.poll()
        except (InferenceError, ServerLost) as error:
            return error
    raise AssertionError("no error came")


# in process


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_lost_device_ends_the_server_and_every_session_with_the_reason(
    transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = LostPolicy(3)
    with (
        serving(policy) as (server, thread, outcome),
        connect(server, transport) as one,
        connect(server, transport) as two,
    ):
        address = server.address
        for client in (one, two, one):
            client.infer(observation(1))
        with pytest.raises(DeviceLost, match=LOST):
            one.infer(observation(1))
        thread.join(PATIENCE_S)
        assert isinstance(outcome.raised, DeviceLost)
        assert str(outcome.raised).startswith(LOST)
        for client in (two, one):
            with pytest.raises(ServerLost, match=LOST):
                client.infer(observation(1))
        assert server.statistics().failed == 1
        with pytest.raises(TransportTimeout):
            PolicyClient(address, timeout_s=0.1)
        with pytest.raises(DeviceLost):
            server.serve()
    assert policy.closed == 0
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage().startswith(LOST)


@pytest.mark.parametrize("returns", [False, True], ids=["raised", "one of the results"])
def test_a_device_lost_in_a_batch(returns: bool) -> None:
    gate = threading.Semaphore(0)
    policy = LostPolicy(returns=returns, gate=gate)
    with (
        serving(policy) as (server, thread, outcome),
        connect(server) as first,
        connect(server) as one,
        connect(server) as two,
    ):
        gate.release(2)
        for client in (one, two):
            client.infer(observation(1))
        first.submit(observation(1))
        for _ in range(3):
            policy.entered.acquire()
        one.submit(observation(LOSES))
        two.submit(observation(2))
        gate.release(2)
        thread.join(PATIENCE_S)
        assert policy.done[-1] in ([LOSES, 2], [2, LOSES])
        assert isinstance(outcome.raised, DeviceLost)
        errors = [error_of(one), error_of(two)]
        assert isinstance(errors[0], DeviceLost)
        assert isinstance(errors[1], ServerLost if returns else DeviceLost)
        for error in (*errors, error_of(first)):
            assert LOST in str(error)


@pytest.mark.parametrize("where", ["fork", "reset"])
def test_a_device_lost_outside_of_an_inference(where: str) -> None:
    class Losing(ToyPolicy):
        lost = False

        def reset(self) -> None:
            if self.lost and where == "reset":
                raise DeviceLost(REASON)

        def fork(self) -> ToyPolicy:
            if self.lost and where == "fork":
                raise DeviceLost(REASON)
            return Losing()

    policy = Losing()
    with serving(policy) as (server, thread, outcome), connect(server) as other:
        other.infer(observation())
        Losing.lost = True
        with connect(server) as client, pytest.raises(ServerLost, match=LOST):
            client.infer(observation())
        thread.join(PATIENCE_S)
        assert isinstance(outcome.raised, DeviceLost)
        with pytest.raises(ServerLost, match=LOST):
            other.infer(observation())


def test_a_lost_device_closes_and_frees_no_fork() -> None:
    ended_when_lost: list[bool] = []

    class Fork(ToyPolicy):
        lost = False

        def infer(self, obs):
            if obs.state[0] == LOSES:
                Fork.lost = True
                raise DeviceLost(REASON)
            return super().infer(obs)

        def fork(self) -> Fork:
            return Fork()

        def close(self) -> None:
            ended_when_lost.append(self.lost)

        def __del__(self) -> None:
            ended_when_lost.append(self.lost)

    with serving(Fork()) as (server, thread, _), connect(server) as one, connect(server) as two:
        one.infer(observation())
        server.call_in_serving_thread(lambda: server.swap(Fork()))
        two.infer(observation())
        with pytest.raises(DeviceLost):
            one.infer(observation(LOSES))
        thread.join(PATIENCE_S)
        assert not server.statistics().sessions
        assert True not in ended_when_lost


@pytest.mark.parametrize("where", ["load", "warm up"])
def test_a_device_lost_by_a_load_ends_the_server(where: str) -> None:
    loaded = LostPolicy()
    loaded.lost = True

    def load(name: str) -> Policy:
        if where == "load":
            raise DeviceLost(REASON)
        return loaded

    with serving(BatchPolicy()) as (server, thread, outcome), connect(server) as client:
        client.infer(observation(1))
        reloader = ModelReloader(
            load,
            None,
            check=server.check_successor,
            swap=server.swap,
            call_in_serving_thread=server.call_in_serving_thread,
            report_device_lost=server.report_device_lost,
        )
        reloader.start("another")
        thread.join(PATIENCE_S)
        assert isinstance(outcome.raised, DeviceLost)
        with pytest.raises(ServerLost, match=LOST):
            client.infer(observation(1))
        state = reloader.wait(PATIENCE_S)
        assert state.state == "failed"
        assert REASON in state.error


def test_the_reason_has_a_bounded_length() -> None:
    class Talkative(BatchPolicy):
        def infer(self, obs):
            raise DeviceLost("a line\n" * 10_000)

    with serving(Talkative()) as (server, thread, outcome), connect(server) as client:
        with pytest.raises(DeviceLost, match="a line a line"):
            client.infer(observation(1))
        thread.join(PATIENCE_S)
    assert 500 < len(str(outcome.raised)) < 600


def test_the_error_keeps_its_type_on_the_way_to_a_client() -> None:
    error = messages.decode_error(messages.encode_error(DeviceLost("gone")))
    assert (type(error), str(error)) == (DeviceLost, "gone")


def test_a_device_lost_by_the_reset_of_a_warm_up_is_told_as_that() -> None:
    class Losing(BatchPolicy):
        def reset(self) -> None:
            raise DeviceLost(REASON)

    with pytest.raises(DeviceLost, match=REASON):
        warm_up(Losing())


def test_a_device_lost_by_the_first_fork_does_not_count_as_a_policy_without_fork() -> None:
    class Losing(BatchPolicy):
        def fork(self):
            raise DeviceLost(REASON)

    with pytest.raises(DeviceLost, match=REASON):
        PolicyServer(Losing())


# the command


def start(tmp_path: Path, factory: str, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "runtime", "serve", "-m", f"{MODULE}:{factory}"),
            *("--port", "0", *flags),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "XDG_RUNTIME_DIR": str(tmp_path)},
    )


def address_of(server: subprocess.Popen[str]) -> str:
    """The address of a server that has just become ready."""
    assert server.stdout is not None
    first = server.stdout.readline()
    while "warm latency" not in server.stdout.readline():
        assert server.poll() is None
    return f"127.0.0.1:{int(first.rpartition(':')[2])}"


@pytest.mark.parametrize(
    ("transport", "factory"),
    [("shm", "make"), ("zmq", "make_in_a_stuck_process")],
)
def test_the_command_exits_at_once_with_a_status_of_its_own(
    tmp_path: Path, transport: str, factory: str
) -> None:
    trace = tmp_path / "trace.json"
    with start(tmp_path, factory, "--trace", str(trace)) as server:
        try:
            address = address_of(server)
            with (
                PolicyClient(address, transport=transport) as client,
                PolicyClient(address, transport=transport) as other,
            ):
                for each in (client, other, client):
                    each.infer(observation(1))
                with pytest.raises(DeviceLost, match=LOST):
                    client.infer(observation(1))
                lost_s = time.monotonic()
                with pytest.raises(ServerLost, match=LOST):
                    other.infer(observation(1))
                _, errors = server.communicate(timeout=PATIENCE_S)
                took_s = time.monotonic() - lost_s
        finally:
            server.kill()
    assert server.returncode == serve.DEVICE_LOST == 3
    assert took_s < 2.0
    assert f" ERROR runtime.server.state: {LOST}" in errors
    assert "a destructor was run" not in errors
    assert "Traceback" not in errors
    if factory == "make":
        assert f"\nerror: {LOST}" in errors
        assert trace.exists()
        assert not list(tmp_path.rglob("metronome-*/*"))  # the token is removed
    else:
        assert "the shutdown hangs" in errors


def test_a_device_lost_before_the_server_listens_has_the_same_status(tmp_path: Path) -> None:
    with start(tmp_path, "make_lost_in_warm_up") as server:
        began_s = time.monotonic()
        _, errors = server.communicate(timeout=PATIENCE_S)
        assert time.monotonic() - began_s < PATIENCE_S
    assert server.returncode == serve.DEVICE_LOST
    assert f"error: {REASON}" in errors
    assert "a destructor was run" not in errors


# evaluations


def evaluate(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Standard error of a short evaluation that loses the device."""
    command = ["-e", "fake", "--env.max_timesteps", "25", "-n", "5", "--videos", "0"]
    argv = [*command, "-o", str(tmp_path), "-m", model, *flags]
    assert eval_sim.main(argv) == eval_sim.LOST
    return capsys.readouterr().err


def test_an_evaluation_in_process_ends_with_the_reason_and_keeps_its_episodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = evaluate(tmp_path, f"{MODULE}:make_short", capsys)
    assert f"error: this process has lost the policy's device: {REASON}" in errors
    assert "2 of 5 episodes were finished and kept" in errors
    assert "Traceback" not in errors


def test_an_evaluation_with_a_server_ends_with_the_reason_and_keeps_its_episodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(LostPolicy(8)) as (server, _, _):
        errors = evaluate(tmp_path, server.address, capsys)
    assert f"error: {LOST}" in errors
    assert "2 of 5 episodes were finished and kept" in errors


def test_a_policy_in_process_is_closed_unless_its_device_is_lost() -> None:
    usable, lost = LostPolicy(), LostPolicy()
    InProcessPolicy(usable).close()
    assert usable.closed == 1
    policy = InProcessPolicy(lost)
    with pytest.raises(DeviceLost):
        policy.infer(observation(LOSES))
    policy.close()
