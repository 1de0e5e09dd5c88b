"""Operating a running server: status, metrics, model replacement, and who may do it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from policies.errors import CheckpointError, ContractMismatch
from policies.types import Policy
from runtime.client import PolicyClient
from runtime.errors import ServerLost
from runtime.server import PolicyServer, admin_token
from runtime.server import cli as serve
from runtime.server.admin_token import AdminToken, read_token
from runtime.server.cli import read_command
from runtime.server.metrics import ServerCollector, serve_metrics
from runtime.server.model_reload import ModelReloader
from runtime.tools import ctl, top
from runtime.tools.keys import allow, new_keys
from tests.runtime.batch_policy import BatchPolicy
from tests.runtime.command import status_of
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import ToyPolicy, observation
from transport.errors import AddressInUse, Refused, TransportError

PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def _own_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def until(condition) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    assert condition()


# model replacement


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_hundred_model_replacements_under_load_fail_no_request(transport: str) -> None:
    policies = [BatchPolicy(shift=float(number)) for number in range(101)]
    with serving(policies[0]) as server, connect(server, transport) as client:
        failures: list[BaseException] = []
        replies: list[tuple[int, float]] = []
        stop = threading.Event()

        def infer_until_stopped() -> None:
            try:
                while not stop.is_set():
                    chunk = client.infer(observation(1000))
                    replies.append((client.policy_id, float(chunk.actions[0, 0])))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=infer_until_stopped)
        thread.start()
        for number, replacement in enumerate(policies[1:], 2):
            assert server.call_in_serving_thread(lambda: server.swap(replacement)) == number  # noqa: B023
            # A chunk of the previous policy may arrive after the replacement.
            until(lambda: failures or (replies and replies[-1][0] == number))  # noqa: B023
        stop.set()
        thread.join(PATIENCE_S)
        assert not failures
        ids = [number for number, _ in replies]
        assert ids == sorted(ids)
        assert set(ids) >= set(range(2, 101))
        assert all(value == 1000 + number - 1 for number, value in replies)
        assert server.statistics().swaps == 100
    assert [policy.closed for policy in policies] == [1] * 100 + [0]


def test_episode_keeps_its_policy_until_reset() -> None:
    class Replacement(ToyPolicy):
        def infer(self, obs):
            chunk = super().infer(obs)
            return dataclasses.replace(chunk, actions=chunk.actions + 1000)

        def fork(self):
            return Replacement()

    with serving(ToyPolicy()) as server, connect(server) as client:
        assert client.infer(observation(0)).actions[0, 0] == 1
        server.call_in_serving_thread(lambda: server.swap(Replacement()))
        assert client.infer(observation(0)).actions[0, 0] == 2
        with connect(server) as new_client:
            assert new_client.infer(observation(0)).actions[0, 0] == 1001
        client.reset()
        assert client.infer(observation(0)).actions[0, 0] == 1001


def test_old_policy_is_closed_after_its_last_episode() -> None:
    closed: list[str] = []

    class Named(ToyPolicy):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def fork(self):
            return Named(f"fork of {self.name}")

        def close(self) -> None:
            closed.append(self.name)

    with serving(Named("old")) as server:
        closed.clear()  # the server forks it once, to find out whether it can
        with connect(server) as client:
            client.infer(observation(0))
            server.call_in_serving_thread(lambda: server.swap(Named("new")))
            assert "old" not in closed
            client.infer(observation(0))
        until(lambda: "old" in closed)
        assert closed.count("fork of old") == closed.count("old") == 1
        assert "new" not in closed


def test_replacement_with_another_contract_is_refused() -> None:
    other = BatchPolicy()
    other.contract = dataclasses.replace(other.contract, dt_s=0.01)
    with serving(BatchPolicy()) as server, connect(server) as client:
        with pytest.raises(ContractMismatch, match=r"dt_s: got 0\.01, expected 0\.02"):
            server.call_in_serving_thread(lambda: server.swap(other))
        client.infer(observation(1))
        assert client.policy_id == 1


def test_task_for_the_serving_thread_times_out() -> None:
    with serving(BatchPolicy()) as server:
        with pytest.raises(ZeroDivisionError):
            server.call_in_serving_thread(lambda: 1 / 0)
        stuck = threading.Event()
        blocked = threading.Thread(
            target=lambda: server.call_in_serving_thread(lambda: stuck.wait(PATIENCE_S))
        )
        blocked.start()
        done: list[int] = []
        with pytest.raises(TimeoutError, match=r"busy for 0\.05 s"):
            server.call_in_serving_thread(lambda: done.append(1), timeout_s=0.05)
        stuck.set()
        blocked.join(PATIENCE_S)
        server.call_in_serving_thread(lambda: None)
        assert not done  # a task that timed out does not run later


# admin commands


def load(name: str) -> Policy:
    if name.startswith("good"):
        return BatchPolicy(shift=100)
    if name == "other":
        other = BatchPolicy()
        other.contract = dataclasses.replace(other.contract, action_dim=3)
        return other
    if name == "broken":
        broken = BatchPolicy()
        broken.infer = lambda obs: 1 / 0  # type: ignore[assignment]
        return broken
    raise CheckpointError(f"{name}: no such checkpoint")


def make_reloader(
    server: PolicyServer, load: Callable[[str], Policy], token: AdminToken | None
) -> ModelReloader:
    """A reloader whose commands ``server`` has, as the command line makes it."""
    reloader = ModelReloader(
        load,
        token,
        check=server.check_successor,
        swap=server.swap,
        call_in_serving_thread=server.call_in_serving_thread,
        report_device_lost=server.report_device_lost,
    )
    server.add_admin_commands(reloader.admin_commands)
    return reloader


def test_load_by_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(BatchPolicy()) as server, connect(server) as client:
        address, token = f"127.0.0.1:{server.port}", AdminToken(server.port)
        reloader = make_reloader(server, load, token)
        client.infer(observation(1))
        for bad, message in (
            ("nowhere", "no such checkpoint"),
            ("other", "action_dim: got 3, expected 14"),
            ("broken", "failed while warming up"),
        ):
            assert ctl.main([address, "load", bad]) == ctl.FAILED
            assert message in (output := capsys.readouterr().err)
            assert "the server keeps the old policy" in output
            assert client.infer(observation(1)).actions[0, 0] == 1
            assert client.policy_id == 1
        assert ctl.main([address, "load", "good"]) == 0
        assert capsys.readouterr().out.startswith("policy 2: good, after ")
        assert client.infer(observation(1)).actions[0, 0] == 101
        assert client.policy_id == 2
        assert ctl.main([address, "status"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert status["policy"]["id"] == 2
        assert status["counts"]["swaps"] == 1
        assert ctl.main([address, "load", "python:os:getcwd"]) == ctl.BAD_INPUT
        assert "python: is accepted on the command line only" in capsys.readouterr().err
        token.close()
        assert ctl.main([address, "load", "good"]) == ctl.BAD_INPUT
        assert "the user who runs the server" in capsys.readouterr().err
        reloader.close()


@pytest.mark.parametrize("token", ["", "0" * 64, None, 7, ["x"]])
def test_load_with_a_wrong_token_is_refused(token: object) -> None:
    with serving(BatchPolicy()) as server:
        reloader = make_reloader(server, load, AdminToken(server.port))
        with (
            ctl.dial(f"127.0.0.1:{server.port}", "", "") as dialer,
            pytest.raises(Refused, match="operator"),
        ):
            dialer.send_admin_command("load", {"checkpoint": "good", "token": token})
        assert reloader.state.state == "none"


def test_second_load_is_refused_during_the_first() -> None:
    gate = threading.Event()

    def slow(name: str) -> Policy:
        gate.wait(PATIENCE_S)
        return load(name)

    with serving(BatchPolicy()) as server:
        reloader = make_reloader(server, slow, None)
        reloader.start("good one")
        with pytest.raises(Refused, match="the end of loading good one"):
            reloader.start("good two")
        gate.set()
        assert reloader.wait(PATIENCE_S).state == "serving"
        reloader.start("good two")
        assert reloader.wait(PATIENCE_S).policy_id == 3


def test_unknown_admin_command_is_refused_with_the_valid_ones() -> None:
    with (
        serving(BatchPolicy()) as server,
        ctl.dial(f"127.0.0.1:{server.port}", "", "") as dialer,
        pytest.raises(Refused, match="status"),
    ):
        dialer.send_admin_command("dance")


def test_only_operator_keys_may_load(tmp_path: Path) -> None:
    keys, listed = tmp_path / "keys", tmp_path / "list"
    server_public, server_secret = new_keys(keys, "server")
    for name, operator in (("boss", True), ("arm", False)):
        public, _ = new_keys(keys, name)
        allow(public, listed, operator=operator)
    config = read_command(["--curve_key", str(server_secret), "--curve_allow", str(listed)]).server
    with serving(BatchPolicy(), curve=config.keys()) as server:
        reloader = make_reloader(server, load, None)
        address = f"127.0.0.1:{server.port}"

        def dial(name: str):
            return ctl.dial(address, str(server_public), str(keys / f"{name}.key_secret"))

        with dial("arm") as arm:
            assert arm.send_admin_command("status")["sessions"] == []
            with pytest.raises(Refused, match=r"arm at 127\.0\.0\.1"):
                ctl.load(arm, "good", PATIENCE_S)
        with dial("boss") as boss:
            assert ctl.load(boss, "good", PATIENCE_S)["policy_id"] == 2
        reloader.close()
        secret = str(keys / "arm.key_secret")
        with connect(server, server_key=str(server_public), client_key=secret) as client:
            assert client.infer(observation(1)).actions[0, 0] == 101
            with client.fork() as fork:
                assert fork.infer(observation(1)).actions[0, 0] == 101
        with pytest.raises(Refused, match="none"):
            PolicyClient(address)


@pytest.mark.parametrize("trouble", ["readable", "a file", "a link"])
def test_token_is_not_written_to_a_folder_open_to_others(tmp_path: Path, trouble: str) -> None:
    folder = tmp_path / f"metronome-{os.geteuid()}"
    if trouble == "readable":
        folder.mkdir(mode=0o755)
    elif trouble == "a file":
        folder.write_text("")
    else:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(mode=0o700)
        folder.symlink_to(elsewhere)
    with pytest.raises(OSError, match=str(folder)):
        AdminToken(5000)


def test_token_file_is_removed_with_its_server() -> None:
    first = AdminToken(5000)
    assert admin_token.read_token(5000)
    assert first.path.stat().st_mode & 0o777 == 0o600
    second = AdminToken(5000)  # the first was killed
    assert not first.matches(read_token(5000))
    assert second.matches(read_token(5000))
    first.close()
    assert second.matches(read_token(5000))
    second.close()
    assert read_token(5000) == ""


# status and metrics


def test_status_has_each_session() -> None:
    with (
        serving(BatchPolicy()) as server,
        connect(server, "shm", kind="robot", rate_hz=5, deadline_ms=900, name="arm") as arm,
        connect(server, "zmq", name="[bold]sim[/]") as sim,
    ):
        for _ in range(3):
            arm.infer(observation(1))
        sim.infer(observation(1))
        status = server.call_in_serving_thread(server.status)
        assert json.loads(json.dumps(status)) == status
        one, two = status["sessions"]
        assert (one["client"], one["kind"], one["transport"]) == ("arm", "robot", "shm")
        assert (one["declared_rate_hz"], one["declared_deadline_ms"]) == (5, 900)
        assert one["answered"] == 3
        assert one["latency_ms"]["p99"] > 0
        assert (two["kind"], two["transport"], two["answered"]) == ("sim", "zmq", 1)
        assert status["counts"]["answered"] == 4


def test_top_shows_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(BatchPolicy()) as server, connect(server, name="[bold]arm[/]") as client:
        client.infer(observation(1))
        assert top.main([f"127.0.0.1:{server.port}", "--once"]) == 0
        output = capsys.readouterr().out
        assert "[bold]arm[/]" in output  # a name is not markup
        assert "policy 1: batch 0 on" in output
    assert top.main([f"127.0.0.1:{server.port}", "--once"]) == top.BAD_INPUT
    assert "nothing answered" in capsys.readouterr().err


def test_prometheus_metrics() -> None:
    with serving(BatchPolicy()) as server, connect(server, name='a"b') as client:
        client.infer(observation(1))
        stop = serve_metrics(lambda: server.call_in_serving_thread(server.status), "127.0.0.1", 0)
        stop()
        port = _free_port()
        stop = serve_metrics(
            lambda: server.call_in_serving_thread(server.status), "127.0.0.1", port
        )
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                text = page.read().decode()
            with pytest.raises(AddressInUse, match=f"--metrics_port: 127.0.0.1:{port}"):
                serve_metrics(
                    lambda: server.call_in_serving_thread(server.status), "127.0.0.1", port
                )
        finally:
            stop()
    assert "metronome_up 1.0" in text
    assert 'metronome_requests_total{outcome="answered"} 1.0' in text
    assert 'client="a\\"b"' in text
    assert "metronome_sessions 1.0" in text


def test_metrics_report_down_if_the_status_times_out() -> None:
    def late() -> dict:
        raise TimeoutError

    (up,) = ServerCollector(late).collect()
    assert [sample.value for sample in up.samples] == [0]


def _free_port() -> int:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


# the command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_batch", "0"], "--max_batch: got 0, expected 1 to"),
        (["--batch_wait_ms", "-1"], "--batch_wait_ms: got -1, expected 0 to"),
        (["--session_timeout_s", "nan"], "--session_timeout_s: got nan, expected 0 to"),
        (["--max_rate_hz", "-3"], "--max_rate_hz: got -3, expected 0 to"),
        (["--curve_key", "x"], "curve_key, curve_allow: got one"),
        (["--ready_fd", "4000"], "--ready_fd: got 4000: Bad file descriptor"),
        (["--metrics_port", "70000"], "--metrics-port/--metrics_port: got 70000, expected 0 to"),
    ],
)
def test_invalid_flags_are_errors_that_name_them(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert status_of(serve.main, flags) == serve.BAD_INPUT
    (output,) = capsys.readouterr().err.splitlines()
    assert message in output


def _start(*flags: str) -> subprocess.Popen[str]:
    model, all_addresses = "python:tests.runtime.batch_policy:make", "0.0.0.0"  # noqa: S104
    address = ["--host", all_addresses, "--port", "0"]
    return subprocess.Popen(
        [sys.executable, "-m", "runtime.server", "-m", model, *address, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def _until_ready(server: subprocess.Popen[str]) -> list[str]:
    """The lines that the server prints until it is ready."""
    assert server.stdout is not None
    lines: list[str] = []
    while not lines or "warm latency" not in lines[-1]:
        lines.append(server.stdout.readline())
        assert lines[-1]
    return lines


def _stop(server: subprocess.Popen[str]) -> str:
    """Stop the server; return its standard error."""
    server.send_signal(signal.SIGTERM)
    _, errors = server.communicate(timeout=PATIENCE_S)
    assert server.returncode == 0
    return errors


def test_keys_by_command_line(tmp_path: Path) -> None:
    keys, listed = tmp_path / "keys", tmp_path / "list"
    server_public, server_secret = new_keys(keys, "server")
    arm_public, arm_secret = new_keys(keys, "arm")
    allow(arm_public, listed)
    server = _start("--curve_key", str(server_secret), "--curve_allow", str(listed))
    try:
        lines = _until_ready(server)
        assert any("CURVE" in line for line in lines)
        address = f"127.0.0.1:{int(lines[0].rpartition(':')[2])}"
        given = {"server_key": str(server_public), "client_key": str(arm_secret)}
        with PolicyClient(address, **given) as arm:
            assert arm.infer(observation(5)).actions[0, 0] == 5
        with pytest.raises(Refused):
            PolicyClient(address)
    finally:
        errors = _stop(server)
    assert "NO ENCRYPTION" not in errors
    assert "arm at 127.0.0.1" in errors
    assert "refused a connection" in errors


@pytest.mark.parametrize("insecure", [False, True])
def test_warning_for_a_public_address_without_keys(insecure: bool) -> None:
    server = _start("--max_rate_hz", "1000", *(["--insecure"] if insecure else []))
    try:
        _until_ready(server)
    finally:
        errors = _stop(server)
    assert ("NO ENCRYPTION, NO KEYS" in errors) is not insecure


def test_removed_client_key_prevents_reconnect(tmp_path: Path) -> None:
    """After its key is removed, an open session continues, and a new one is refused."""
    keys, listed = tmp_path / "keys", tmp_path / "list"
    server_public, server_secret = new_keys(keys, "server")
    arm_public, arm_secret = new_keys(keys, "arm")
    entry = allow(arm_public, listed)
    config = read_command(["--curve_key", str(server_secret), "--curve_allow", str(listed)]).server
    with serving(BatchPolicy(), curve=config.keys()) as server:
        given = {"server_key": str(server_public), "client_key": str(arm_secret)}
        with connect(server, "zmq", **given) as client:
            client.infer(observation(1))
            entry.unlink()
            client.infer(observation(1))
            with pytest.raises(ServerLost, match="not on its list"):
                client.reconnect(timeout_s=0.3)


def test_one_key_flag_without_the_other_is_an_error() -> None:
    with pytest.raises(ValueError, match="both or neither"):
        PolicyClient("127.0.0.1:1", server_key="x")
    with pytest.raises(TransportError, match="both or neither"):
        ctl.dial("127.0.0.1:1", "x", "")


@pytest.mark.parametrize(
    ("host", "here"), [("127.0.0.1", True), ("localhost", True), ("192.0.2.1", False)]
)
def test_token_is_sent_to_this_host_only(host: str, here: bool) -> None:
    assert ctl._is_this_machine(host) is here


def test_episode_keeps_its_policy_through_several_replacements() -> None:
    """A policy with episode state is replaced twice by one without; the last one stays open."""
    with serving(ToyPolicy()) as server:
        with connect(server) as old, connect(server) as other:
            old.infer(observation(1.0))
            assert old.infer(observation(1.0)).actions[0, 0] == 2
            for _ in range(2):
                server.call_in_serving_thread(lambda: server.swap(BatchPolicy()))
            assert old.infer(observation(1.0)).actions[0, 0] == 3
            assert old.policy_id == 1
            other.reset()
            other.infer(observation(1.0))
            assert other.policy_id == 3
        with connect(server) as late:
            late.infer(observation(1.0))
        served = server.model.policy
        assert isinstance(served, BatchPolicy)
        assert not served.closed
