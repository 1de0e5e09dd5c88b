"""A server's gateways: they start, are started again, and end with the server."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from policies.yaml_config import InvalidConfig, parse_config
from runtime.gateway.cli import GATEWAYS
from runtime.gateway.config import GatewayCommand
from runtime.options.gateways import PROTOCOLS
from runtime.server import gateway_processes
from runtime.server.cli import main, read_command
from runtime.server.config import ServerConfig
from runtime.server.gateway_options import GatewayOptions
from runtime.server.gateway_processes import (
    MAX_DELAY_S,
    GatewayProcesses,
    RunningGateway,
    restart_delay_s,
)
from runtime.tools.keys import allow, new_keys
from tests.runtime.serving import serving
from tests.runtime.toy_policy import ToyPolicy
from transport.address import parse_address

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0
BACK_WITHIN_S = 2.0
STUB, SHORT_LIVED = "tests.gateway.stub_gateway", "tests.gateway.short_lived_gateway"
ANY_HOST = "0.0.0.0"  # noqa: S104
OPENPI = GatewayOptions("openpi", 0)


def until(condition: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def gateway_pid(address: str) -> int:
    """The process that answers at ``address``; 0 if none does."""
    with contextlib.suppress(OSError), socket.create_connection(parse_address(address), 1) as to:
        return int(to.makefile().readline() or 0)
    return 0


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that waits for its parent to read its status does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The command


class Server:
    """``metronome serve`` with stubs for gateways, once it has printed its banner."""

    def __init__(self, log: Path, *flags: str) -> None:
        self._log = log
        words = ["-m", "python:tests.runtime.toy_policy:make", "-p", "0", *flags]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.gateway.stub_server", *words],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        assert self.process.stdout is not None
        banner = ""
        for line in self.process.stdout:
            banner += line
            if "warm latency" in line:
                break
        self.gateways = re.findall(r"^   gateway      (\w+) clients on (\S+)$", banner, re.M)
        self.pids = [gateway_pid(address) for _, address in self.gateways]

    @property
    def log(self) -> str:
        return self._log.read_text()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        until(lambda: not any(map(is_alive, self.pids)))


Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Server] = []

    def start(*flags: str) -> Server:
        started.append(Server(tmp_path / f"log{len(started)}", *flags))
        return started[-1]

    yield start
    for server in started:
        server.end()


def test_gateways_start_return_after_a_kill_and_end_with_the_server(start: Start) -> None:
    server = start("--gateway", "openpi:0", "--gateway", "openpi:0")
    assert [protocol for protocol, _ in server.gateways] == ["openpi", "openpi"]
    first, second = (address for _, address in server.gateways)
    killed, other = server.pids
    assert killed
    assert other not in (0, killed)

    os.kill(killed, signal.SIGKILL)
    until(lambda: gateway_pid(first) not in (0, killed))
    assert gateway_pid(second) == other
    assert "the openpi gateway ended (killed by SIGKILL)" in server.log
    assert "the openpi gateway is started again in" in server.log

    server.pids = [gateway_pid(first), other]
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE_S) == 0
    assert not any(map(is_alive, server.pids))
    assert not gateway_pid(first)


@pytest.mark.long
def test_a_gateway_is_back_within_two_seconds_of_twenty_kills(start: Start) -> None:
    server = start("--gateway", "openpi:0", "openpi:0")
    (_, killed_at), (_, other_at) = server.gateways
    other = gateway_pid(other_at)
    for _ in range(20):
        killed = gateway_pid(killed_at)
        os.kill(killed, signal.SIGKILL)
        until(lambda killed=killed: gateway_pid(killed_at) not in (0, killed), BACK_WITHIN_S)
        time.sleep(gateway_processes.HEALTHY_S)  # otherwise these are a crash loop
        assert gateway_pid(other_at) == other
    server.pids = [gateway_pid(killed_at), other]


def test_a_killed_server_takes_its_gateways_along(start: Start) -> None:
    """Also a stopped one, which does not notice that its standard input ends."""
    server = start("--gateway", "openpi:0", "openpi:0")
    os.kill(server.pids[0], signal.SIGSTOP)
    server.process.kill()
    until(lambda: not any(map(is_alive, server.pids)))


def test_a_gateway_that_cannot_start_ends_the_server_with_the_reason(start: Start) -> None:
    server = start("--gateway", "groot:0")
    assert server.process.wait(PATIENCE_S) == 2
    assert server.gateways == []  # and no banner
    (reason,) = (line for line in server.log.splitlines() if line.startswith("error: "))
    assert re.search("the groot gateway: No module named 'a_package.*pip install", reason)


class Unloaded:
    """``metronome serve`` until it would load a policy that cannot be loaded."""

    @staticmethod
    def error(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
        assert main(["-m", "python:no_such_module:make", "-p", "0", *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("openpi:0:nowhere", "the openpi gateway: gateway configuration 'nowhere': neither a"),
        ("openpi:0:{folder}/bad.yaml", "the openpi gateway: .*bad.yaml: camera: unknown key"),
        ("openpi:0:{folder}/no.yaml", "the openpi gateway: .*no.yaml: while parsing a flow"),
        ("openpi:{taken}", "the openpi gateway: 127.0.0.1:{taken}: Address already in use"),
        ("groot:0", "no_such_module"),  # nothing was wrong with the gateway
    ],
)
def test_what_is_wrong_with_a_gateway_shows_before_the_policy_is_loaded(
    value: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("camera: {}")
    (tmp_path / "no.yaml").write_text("cameras: {")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        said = Unloaded.error(capsys, "--gateway", value.format(folder=tmp_path, taken=taken))
    assert re.search(reason.format(taken=taken), said)


def test_a_port_for_two_and_bad_keys_show_before_the_policy_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    two = ("--gateway", f"groot:{free}", f"openpi:{free}")
    said = Unloaded.error(capsys, *two)
    assert f"the openpi gateway: 127.0.0.1:{free}: Address already in use" in said
    said = Unloaded.error(capsys, "--gateway", f"openpi:{free}", "--port", str(free))
    assert f"the openpi gateway: port: got {free}, the server's own, expected another" in said
    said = Unloaded.error(capsys, "--gateway", "openpi:0", "--gateway_host", "robot.invalid")
    assert "gateway_host" in said
    config = tmp_path / "server.yaml"
    config.write_text(f"gateways: [{{protocol: groot, port: 0, api_keys: {tmp_path}/none}}]")
    said = Unloaded.error(capsys, "--config", str(config))
    assert re.search("the groot gateway: .*No such file", said)
    _, secret = new_keys(tmp_path, "server")
    (tmp_path / "allowed").mkdir()
    keys = ("--curve_key", str(secret), "--curve_allow", str(tmp_path / "allowed"))
    said = Unloaded.error(capsys, *keys, "--gateway", "openpi:0", "--gateway_key", "nowhere")
    assert "nowhere" in said


def test_a_server_beyond_this_host_and_with_keys_has_gateways(start: Start, tmp_path: Path) -> None:
    """The gateway listens on loopback all the same, and is a client with a key."""
    _, secret = new_keys(tmp_path, "server")
    public, own = new_keys(tmp_path, "gateway")
    allow(public, tmp_path / "allowed")
    keys = ("--curve_key", str(secret), "--curve_allow", str(tmp_path / "allowed"))
    keys += ("--gateway_key", str(own))
    server = start("--host", ANY_HOST, *keys, "--gateway", "openpi:0")
    ((_, address),) = server.gateways
    assert address.startswith("127.0.0.1:")
    assert server.pids[0]


# The processes


class Reports:
    """What a server would be told."""

    def __init__(self) -> None:
        self.ready: list[RunningGateway] | None = None
        self.failures: list[str] = []

    def on_ready(self, gateways: Sequence[RunningGateway]) -> None:
        assert self.ready is None
        self.ready = list(gateways)


@contextlib.contextmanager
def gateways_of(address: str, *options: GatewayOptions) -> Iterator[tuple[Reports, list[str]]]:
    """Gateways of the server at ``address``, what they report, and what ended in failure."""
    reports = Reports()
    threads = set(threading.enumerate())
    with GatewayProcesses(
        options,
        [f"--server={address}"],
        on_ready=reports.on_ready,
        on_failure=reports.failures.append,
    ) as gateways:
        yield reports, reports.failures
        gateways.close()
    assert set(threading.enumerate()) <= threads


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(gateway_processes, "MODULE", STUB)
    with serving(ToyPolicy()) as server:
        yield server.address


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (GatewayOptions("groot", 0), "the groot gateway: No module named 'a_package.*pip install"),
        (GatewayOptions("openpi", 0, "nowhere"), "the openpi gateway: .*'nowhere'"),
        (GatewayOptions("openpi", 0, "{map}"), "the openpi gateway: cameras: got 'wrist', expec"),
    ],
)
def test_each_refusal_is_one_line(
    address: str, tmp_path: Path, options: GatewayOptions, reason: str
) -> None:
    (tmp_path / "map.yaml").write_text("cameras: {wrist: {key: wrist_image}}")
    config = options.config.format(map=tmp_path / "map.yaml")
    options = GatewayOptions(options.protocol, 0, config)
    with gateways_of(address, options) as (reports, failures):
        until(lambda: failures)
    assert reports.ready is None
    assert re.search(reason, failures[0])
    assert "\n" not in failures[0]


def test_a_crash_loop_backs_off_and_closing_does_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(gateway_processes, "MODULE", SHORT_LIVED)
    delays = (0.0, 0.01, 0.02, 1000.0)
    monkeypatch.setattr(gateway_processes, "restart_delay_s", delays.__getitem__)
    with gateways_of("127.0.0.1:9", OPENPI) as (reports, failures):
        until(lambda: "again in 1000 s" in caplog.text)
    assert reports.ready == [RunningGateway("openpi", "127.0.0.1:9")]
    assert not failures
    assert caplog.text.count("the openpi gateway ended (exit status 1)") == 3
    said = re.findall(r"the openpi gateway is started again in (\S+) s", caplog.text)
    assert [float(delay) for delay in said] == list(delays[1:])


def test_restart_delays_double() -> None:
    assert [restart_delay_s(runs) for runs in range(4)] == [0.0, 0.25, 0.5, 1.0]
    assert restart_delay_s(10_000) == MAX_DELAY_S


def test_a_gateway_that_was_ready_for_long_is_started_again_at_once(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(gateway_processes, "HEALTHY_S", 0.0)
    with gateways_of(address, OPENPI) as (reports, _):
        until(lambda: reports.ready)
        assert reports.ready is not None
        (gateway,) = reports.ready
        killed = gateway_pid(gateway.address)
        os.kill(killed, signal.SIGKILL)
        until(lambda: gateway_pid(gateway.address) not in (0, killed))
    assert "again in 0 s" in caplog.text


def test_closing_ends_a_gateway_that_is_still_starting(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with gateways_of(address, OPENPI):
        pass
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_without_gateways_a_server_is_ready_at_once() -> None:
    with gateways_of("127.0.0.1:9") as (reports, _):
        assert reports.ready == []


# The options


def test_the_server_and_the_gateways_name_the_same_protocols() -> None:
    assert tuple(GATEWAYS) == PROTOCOLS


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("openpi",), [GatewayOptions("openpi")]),
        (("openpi:8000",), [GatewayOptions("openpi", 8000)]),
        (("openpi::droid",), [GatewayOptions("openpi", None, "droid")]),
        (("openpi:1:a:b.yaml",), [GatewayOptions("openpi", 1, "a:b.yaml")]),
        (
            ("openpi:1", "--gateway", "groot"),
            [GatewayOptions("openpi", 1), GatewayOptions("groot")],
        ),
        (("openpi:1", "groot"), [GatewayOptions("openpi", 1), GatewayOptions("groot")]),
    ],
)
def test_gateway_is_repeated_with_port_and_configuration(
    words: tuple[str, ...], expected: list[GatewayOptions]
) -> None:
    assert list(read_command(["--gateway", *words]).server.gateways) == expected


@pytest.mark.parametrize("text", ["nobody", "openpi:x", "openpi:70000", "openpi:-1", "", ":8000"])
def test_a_wrong_value_is_refused_in_one_line(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        read_command(["--gateway", text])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: --gateway: got '{text}'[:,] .*expected .*\n", said)


def test_every_option_reaches_the_gateway() -> None:
    raw = {
        **{"protocol": "openpi", "port": 8001, "config": "c", "api_keys": "k"},
        **{"kind": "robot", "rate_hz": 50, "deadline_ms": 20},
    }
    config = parse_config(ServerConfig, {"gateways": [raw]}, source="x.yaml")
    from runtime.gateway.cli import read_command as read_gateway_command

    (options,) = config.gateways
    words = gateway_processes.shared_flags(config, "[::1]:5", insecure=False, log_level="ERROR")
    command: GatewayCommand = read_gateway_command([*options.arguments(), *words])
    assert (command.protocol, command.port, command.config) == ("openpi", 8001, "c")
    assert (command.api_keys, command.server, command.log_level) == ("k", "[::1]:5", "ERROR")
    sessions = command.sessions
    assert (sessions.kind, sessions.rate_hz, sessions.deadline_ms) == ("robot", 50.0, 20.0)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"gateways": [{"protocol": "x"}]}, r"gateways\[0\]\.protocol: got 'x', expected one of"),
        ({"gateways": [{"protocol": "openpi", "prt": 1}]}, r"gateways\[0\].prt: unknown key"),
        (
            {"gateways": [{"protocol": "openpi", "kind": "robot"}]},
            r"gateways\[0\]: kind robot: got no rate_hz and no deadline_ms, expected",
        ),
        (
            {"gateways": [{"protocol": "lerobot", "api_keys": "k"}]},
            r"gateways\[0\]: api_keys: got k, expected none: lerobot has no place for keys",
        ),
        ({"gateway_key": "k"}, "gateway_key: got one, expected it with gateways and curve_key"),
        (
            {"gateways": [{"protocol": "groot"}], "curve_key": "k", "curve_allow": "d"},
            "gateway_key: got none, expected the secret key file of a client in curve_allow",
        ),
    ],
)
def test_a_wrong_configuration_is_refused(raw: dict[str, object], reason: str) -> None:
    with pytest.raises(InvalidConfig, match=reason):
        parse_config(ServerConfig, raw, source="x.yaml")


def test_gateways_listen_beyond_this_host_only_if_insecure() -> None:
    words = ["--gateway", "openpi", "--gateway_host", ANY_HOST]
    with pytest.raises(ValueError, match=r"--gateway_host: got 0\.0\.0\.0, expected a loopback"):
        read_command(words)
    command = read_command([*words, "--insecure"])
    flags = gateway_processes.shared_flags(
        command.server, "127.0.0.1:5", insecure=command.insecure, log_level="INFO"
    )
    assert {"--host=0.0.0.0", "--insecure"} <= set(flags)
