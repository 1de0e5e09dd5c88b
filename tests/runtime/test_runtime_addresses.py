"""Addresses of a server, as clients and commands read them: names, IPv4 and IPv6."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.client import PolicyClient
from runtime.eval_sim import cli as eval_sim
from runtime.server import PolicyServer
from runtime.tools import ctl, top
from tests.runtime.serving import serving
from tests.runtime.toy_policy import ToyPolicy, observation
from transport import address
from transport.address import parse_address
from transport.dialer import Dialer
from transport.errors import AddressInUse, TransportError

ROOT = Path(__file__).resolve().parents[2]
V6 = pytest.mark.skipif(not address.has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize("transport", ["shm", "zmq"])
@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "localhost"),
        ("0.0.0.0", "0.0.0.0"),  # noqa: S104
        pytest.param("::1", "[::1]", marks=V6),
        pytest.param("[::1]", "[::1]", marks=V6),
        pytest.param("::", "[::]", marks=V6),
    ],
)
def test_server_address_is_accepted_by_clients(host: str, expected: str, transport: str) -> None:
    with serving(ToyPolicy(), host=host) as server:
        assert server.address == f"{expected}:{server.port}"
        with Dialer(*parse_address(server.address)) as dialer:
            assert dialer.send_admin_command("status")["address"] == server.address
        with PolicyClient(server.address, transport=transport) as client:
            assert client.infer(observation(timestep=3)).obs_timestep == 3
            assert client.transport == transport
            with client.fork() as fork:
                assert fork.infer(observation(timestep=4)).obs_timestep == 4


@V6
def test_server_on_all_addresses_is_reachable_over_ipv4_and_ipv6() -> None:
    with serving(ToyPolicy(), host="::") as server:
        for host in ("127.0.0.1", "[::1]", "localhost"):
            with PolicyClient(f"{host}:{server.port}") as client:
                assert client.infer(observation(timestep=3)).obs_timestep == 3


@V6
def test_printed_address_is_accepted_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ServerProcess("--host", "::1") as said:
        assert re.fullmatch(r"\[::1\]:\d+", said)
        assert ctl.main([said, "status"]) == 0
        assert json.loads(capsys.readouterr().out)["address"] == said
        assert top.main([said, "--once"]) == 0
        assert said in capsys.readouterr().out
        flags = ["-m", said, "-e", "fake", "-n", "1", "--videos", "0", "-o", str(tmp_path)]
        assert eval_sim.main([*flags, "--env.max_timesteps", "3"]) == 0


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("127.0.0.1:5000", "expected a host alone: 127.0.0.1, with port 5000 beside it"),
        ("[::1]:5000", "expected a host alone: ::1, with port 5000 beside it"),
        pytest.param("::1:5000", "for port 5000 of ::1 give ::1 alone", marks=V6),
        ("no such host", "'no such host' is not an address of this machine"),
        ("192.0.2.1", r"cannot listen at 192.0.2.1:\d+: "),
    ],
)
def test_invalid_host_is_an_error(host: str, message: str) -> None:
    with pytest.raises(TransportError, match=message) as raised:
        PolicyServer(ToyPolicy(), host=host)
    assert "\n" not in str(raised.value)


def test_missing_ipv6_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "has_ipv6", lambda: False)
    for call in (lambda: PolicyServer(ToyPolicy(), host="::1"), lambda: PolicyClient("[::1]:5000")):
        with pytest.raises(TransportError, match=r"\[::1\]:\d+: this machine has no IPv6"):
            call()


def test_port_in_use_is_an_error() -> None:
    with (
        serving(ToyPolicy()) as server,
        pytest.raises(AddressInUse, match=rf"127.0.0.1:{server.port} is taken"),
    ):
        PolicyServer(ToyPolicy(), port=server.port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(TransportError, match=f"port: got {port}, expected 0 .any. to 65535"):
        PolicyServer(ToyPolicy(), port=port)


@pytest.mark.parametrize("text", ["::1:5000", "fe80::1:80", "tcp://::1:5000"])
def test_ipv6_without_brackets_is_an_error_that_shows_them(text: str) -> None:
    bare = text.removeprefix("tcp://").rpartition(":")
    with pytest.raises(TransportError, match="in brackets: ") as raised:
        parse_address(text)
    assert f"[{bare[0]}]:{bare[2]}" in str(raised.value)


class ServerProcess:
    """``python -m runtime.server`` with a toy policy; entering gives the printed address."""

    def __init__(self, *flags: str) -> None:
        model = "python:tests.runtime.toy_policy:make"
        command = [sys.executable, "-m", "runtime.server", "-m", model, "--port", "0", *flags]
        self._process = subprocess.Popen(
            [*command, "--stop_with_stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )

    def __enter__(self) -> str:
        for line in self._process.stdout or ():
            if match := re.search(r"Policy Server started on (\S+)", line):
                return match[1]
        raise AssertionError("the server did not start")

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
