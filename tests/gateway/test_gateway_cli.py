"""The gateway's command: one line and status 2 for bad input, and a life that ends with its own."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from websockets.sync.client import connect

from policies.types import ActionChunk, MetaObs
from runtime.gateway import cli
from runtime.gateway.config import GatewayCommand
from runtime.gateway.gateway_session import GatewaySession
from runtime.server import PolicyServer
from runtime.wire_formats.msgpack_arrays import pack, unpack
from tests.gateway.openpi_serving import StatelessPolicy, expected, sent
from tests.runtime.serving import connect as connect_client
from tests.runtime.serving import serving
from tests.runtime.toy_policy import CONTRACT, ToyPolicy, observation
from transport.child_process import ChildProcess
from transport.errors import Refused

KEY = "0123456789abcdef"


def run(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as error:  # argparse's own
        assert isinstance(error.code, int)
        return error.code


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "error: protocol: got none, expected one of ilstudio, openpi, lerobot, groot"),
        (("--port", "0"), "the following arguments are required: protocol"),
        (("gopher",), "protocol: invalid choice: 'gopher' (choose from 'ilstudio'"),
        (("openpi", "--server", "nowhere"), "--server: address: got 'nowhere', expected host:po"),
        (("openpi", "--server", "a:99999"), "--server: address 'a:99999': got port 99999, expec"),
        (("openpi", "--port", "99999"), "got 99999, expected 0 to 65535"),
        (("openpi", "--max_clients", "0"), "got 0, expected 1 to"),
        (("openpi", "--host", "0.0.0.0"), "--host: got 0.0.0.0, expected a loopback address: "),  # noqa: S104
        (("openpi", "--host", "robot.lab"), "--host: got robot.lab, expected a loopback address: "),
        (("openpi", "--kind", "robot"), "kind robot: got no rate_hz and no deadline_ms, expected "),
        (("openpi", "--kind", "tank"), "--kind: invalid choice: 'tank' (choose from 'robot'"),
        (("openpi", "--timeout_s", "-1"), "got -1"),
        (("openpi", "--config", "nothing"), "gateway configuration 'nothing': neither a file nor"),
        (("openpi", "--config", "{folder}/bad.yaml"), "bad.yaml: camera: unknown key, expected"),
        (("openpi", "--api_keys", "{folder}/missing"), "No such file or directory"),
        (("openpi", "--api_keys", "{folder}/open"), "got mode 0644 and owner"),
        (("groot", "--host", "10.254.254.254", "--insecure"), "10.254.254.254:5555: Cannot assig"),
        (("openpi", "--server_key", "x"), "server_key, client_key: got one, expected both or nei"),
        (("openpi", "--server_key", "x", "--client_key", "y"), "/x: got "),
        (("ilstudio", "--api_keys", "x"), "--api_keys: got x, expected none: ilstudio has no pla"),
        (("lerobot", "--api_keys", "x"), "--api_keys: got x, expected none: lerobot has no place"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(
    arguments: tuple[str, ...], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("camera: {}", encoding="utf-8")
    (tmp_path / "open").write_text(KEY, encoding="utf-8")
    (tmp_path / "open").chmod(0o644)
    assert run(*(part.format(folder=tmp_path) for part in arguments)) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert error in said and "Traceback" not in said
    assert said.splitlines()[-1].count("error: ") == 1


class PairPolicy(ToyPolicy):
    def __init__(self) -> None:
        super().__init__()
        self.contract = dataclasses.replace(self.contract, n_obs_steps=2)

    def infer(self, obs: MetaObs) -> ActionChunk:
        last = {name: image[-1] for name, image in obs.images.items()}
        return super().infer(dataclasses.replace(obs, images=last, state=obs.state[-1]))

    def fork(self) -> PairPolicy:
        return PairPolicy()


@pytest.mark.parametrize("protocol", cli.GATEWAYS)
def test_a_policy_of_several_ticks_is_refused(
    protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(PairPolicy()) as server:
        address = f"{server.host}:{server.port}"
        assert run(protocol, "--server", address, "--port", "0") == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "policy: got n_obs_steps 2, expected 1: clients of " + protocol in said


def test_every_protocol_has_its_own_port() -> None:
    ports = [cli.read_command([name]).port for name in cli.GATEWAYS]
    assert ports == [5001, 8000, 8080, 5555]
    assert cli.read_command(["openpi", "--port", "0"]).port == 0
    assert cli.read_command(["openpi", "--host", "0.0.0.0", "--insecure"]).host == "0.0.0.0"  # noqa: S104
    assert cli.read_command(["openpi", "--host", "::1"]).host == "::1"


def test_a_port_that_is_taken_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for protocol in cli.GATEWAYS:
            assert run(protocol, "--port", str(port)) == cli.BAD_INPUT
            said = capsys.readouterr().err
            assert said == f"error: 127.0.0.1:{port}: Address already in use\n"


def test_a_server_that_does_not_answer_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("openpi", "--server", "127.0.0.1:1", "--timeout_s", "0.2", "--port", "0")
    assert run(*arguments) == cli.FAILED
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_a_policy_that_the_protocol_cannot_serve_is_bad_input(
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = StatelessPolicy()
    policy.contract = dataclasses.replace(CONTRACT, first_action_offset=2)
    with serving(policy) as server:
        assert run("openpi", "--server", f"127.0.0.1:{server.port}", "--port", "0") == 2
    assert "policy: got a first action 2 ticks after its observation" in capsys.readouterr().err


def test_a_map_that_does_not_fit_the_policy_is_bad_input(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(StatelessPolicy()) as server:
        arguments = ("--server", f"127.0.0.1:{server.port}", "--port", "0")
        assert run("openpi", "--config", "openpi_aloha", *arguments) == cli.BAD_INPUT
    assert "cameras: got 'cam_high', expected cameras of the policy: ['top']" in (
        capsys.readouterr().err
    )


def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "runtime.gateway.openpi.gateway", None)
    assert run("openpi", "--server", "127.0.0.1:1") == cli.BAD_INPUT
    assert "pip install '.[gateway]'" in capsys.readouterr().err


@contextlib.contextmanager
def gateway_process(server_port: int) -> Iterator[ChildProcess]:
    flags = ["openpi", "--server", f"127.0.0.1:{server_port}", "--port", "0"]
    child = ChildProcess(
        "runtime.gateway", [*flags, "--stop_with_stdin"], name="it", events_flag="--ready_fd"
    )
    try:
        yield child
    finally:
        child.close(1.0)


def test_the_process_serves_and_ends_when_its_parent_does() -> None:
    with serving(StatelessPolicy()) as server, gateway_process(server.port) as child:
        address = child.wait_ready(30.0)["address"]
        with connect(f"ws://{address}", compression=None) as client:
            client.recv(5.0)
            client.send(pack(sent()))
            np.testing.assert_array_equal(
                unpack(client.recv(5.0, decode=False))["actions"], expected()
            )
        child.close(5.0)
        assert child.returncode == 0


def test_a_signal_ends_the_process_with_status_0() -> None:
    with serving(StatelessPolicy()) as server:
        flags = ["openpi", "--server", f"127.0.0.1:{server.port}", "--port", "0"]
        process = subprocess.Popen(
            [sys.executable, "-m", "runtime.gateway", *flags], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        with process.stderr as log:
            assert any("openpi clients are served on 127.0.0.1:" in line for line in log)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10.0) == 0


def test_a_signal_while_it_starts_ends_the_process_with_status_0() -> None:
    """Here it waits for a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        flags = ["openpi", "--server", f"127.0.0.1:{silent.getsockname()[1]}", "--port", "0"]
        numbers = (signal.SIGINT, signal.SIGTERM)
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "runtime.gateway", *flags], stderr=subprocess.PIPE, text=True
            )
            for _ in numbers
        ]
        for _ in processes:
            silent.accept()[0].close()
        for process, number in zip(processes, numbers, strict=True):
            process.send_signal(number)
        for process in processes:
            assert process.communicate(timeout=10.0)[1] == ""
            assert process.returncode == 0


# One session, tried at the start

ROBOT = ("--kind", "robot", "--rate_hz", "1000", "--deadline_ms", "0.001")


@pytest.fixture
def measured() -> Iterator[PolicyServer]:
    """A server that knows how long an inference takes, with room for one session."""
    with serving(StatelessPolicy(), max_sessions=1) as server:
        with connect_client(server) as client:
            client.infer(observation())
        yield server


def test_a_robot_that_can_never_be_admitted_is_bad_input(
    measured: PolicyServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "ADMISSION_S", 0.2)
    assert run("openpi", "--server", measured.address, "--port", "0", *ROBOT) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "deadline_ms: got its own 0.001, where 1 robots of " in said
    assert "expected at least " in said
    assert measured.status()["sessions"] == []


def test_a_refusal_is_tried_again_for_a_while(
    measured: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two gateways that start at the same time must not refuse each other."""
    open_session, tries = GatewaySession.open, []

    def refused_twice(session: GatewaySession) -> None:
        tries.append(session)
        if len(tries) < 3:
            raise Refused("rate_hz", "another robot", "none")
        open_session(session)

    monkeypatch.setattr(GatewaySession, "open", refused_twice)
    cli.try_session(GatewayCommand("openpi", server=measured.address))
    assert len(tries) == 3


def test_a_server_that_is_full_just_now_does_not_keep_a_gateway_from_starting(
    measured: PolicyServer, caplog: pytest.LogCaptureFixture
) -> None:
    with connect_client(measured) as client:
        client.infer(observation())
        session = cli.try_session(GatewayCommand("openpi", server=measured.address))
    assert session.contract == measured.model.policy.contract
    assert "clients are refused until there is room: sessions: got one more, expec" in caplog.text
