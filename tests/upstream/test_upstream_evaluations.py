"""Whole evaluations with another system's server: the same episodes, and a stop when it dies.

Real peers, each with its own server code as it is: openpi's with ``METRONOME_OPENPI_PYTHON`` and
``METRONOME_OPENPI_SOURCE``, GR00T's with ``METRONOME_GROOT_PYTHON`` and ``METRONOME_GROOT_SOURCE``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.eval_sim import cli as eval_sim
from runtime.server import cli as server_cli
from runtime.server.server_process import ServerProcess
from tests.faults.rig import Program
from tests.faults.test_faults_base import Device, check_braking
from tests.runtime.command import status_of
from tests.upstream.fake_servers import FakeGroot, FakeOpenpi, groot_toy, openpi_toy
from tests.upstream.foreign_model import toy
from tests.upstream.toy_upstream import (
    DRIVE,
    GROOT_TOY,
    TOY,
    contract_file,
    load,
    observations,
)

COUNT = 100
CONTRACTS = {"openpi": TOY, "groot": GROOT_TOY}
OURS = "python:tests.upstream.toy_upstream:make"
SHORT = ["-e", "fake", "--env.max_timesteps", "60", "--videos", "0"]
SYSTEMS = ("openpi", "groot")


def evaluate(folder: Path, *flags: str, status: int = 0) -> dict[str, Any]:
    assert status_of(eval_sim.main, [*SHORT, "-o", str(folder), *flags]) == status
    (path,) = (folder / "fake").glob("*.json")
    return json.loads(path.read_text())


def outcomes(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(e["seed"], e["success"], e["reward"], e["horizon"]) for e in result["episodes"]]


def fake(system: str) -> Any:
    return FakeOpenpi() if system == "openpi" else FakeGroot()


@contextlib.contextmanager
def real_peer(system: str, model: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The system's own server with a model of ``foreign_model``; (port, process)."""
    names = [f"METRONOME_{system.upper()}_{what}" for what in ("PYTHON", "SOURCE")]
    python, source = (os.environ.get(name, "") for name in names)
    if not (python and source):
        pytest.skip(f"{' or '.join(names)} is unset")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    program = Path(__file__).with_name(f"{system}_peer.py")
    process = subprocess.Popen(
        [python, str(program), source, str(port), model],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline_s = time.monotonic() + 30
        while True:
            assert process.poll() is None, "the peer ended"
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        yield port, process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_foreign_server_plays_the_same_episodes_as_in_process(
    system: str, tmp_path: Path
) -> None:
    local = evaluate(tmp_path / "local", "-m", OURS, "-n", "2")
    with fake(system) as server:
        model = ["-m", f"{system}://127.0.0.1:{server.port}"]
        model += ["--upstream_contract", str(contract_file(tmp_path, CONTRACTS[system]))]
        foreign = evaluate(tmp_path / "foreign", *model, "-n", "2")
    assert outcomes(foreign) == outcomes(local)
    assert foreign["transport"] == "in process"
    assert "another system's server" in foreign["transport_reason"]
    assert foreign["deterministic"] is False


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_lost_foreign_server_keeps_the_finished_episodes(
    system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lives = iter(range(12))

    def answer(asked: dict[str, Any]) -> Any:
        if system == "groot" and asked["endpoint"] != "get_action":
            return groot_toy(asked)
        if next(lives, None) is None:
            return None
        return openpi_toy(asked) if system == "openpi" else groot_toy(asked)

    with fake(system) as server:
        server.answer = answer
        model = ["-m", f"{system}://127.0.0.1:{server.port}", "--upstream_timeout_s", "0.3"]
        model += ["--upstream_contract", str(contract_file(tmp_path, CONTRACTS[system]))]
        result = evaluate(tmp_path, *model, "-n", "9", status=1)
    assert result["total"] == 1  # of 6 answers; the start and the check of the world took 2
    assert "no answer within 0.3 s" in result["failure"]
    assert "1 of 9 episodes were finished and kept" in capsys.readouterr().err


def test_a_server_of_ours_does_not_start_without_its_upstream(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contract = ["--upstream_contract", str(contract_file(tmp_path, TOY)), "--port", "0"]
    model = ["-m", "openpi://127.0.0.1:9", *contract]
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert status_of(server_cli.main, model) == 2
        assert status_of(server_cli.main, ["-m", OURS, *contract]) == 2
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    lost, useless = capsys.readouterr().err.splitlines()
    assert lost.startswith("error: openpi://127.0.0.1:9: nobody listens there")
    assert "expected none: they are for -m openpi://HOST:PORT" in useless


@pytest.mark.long
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_real_servers_actions_arrive_as_they_were_computed(system: str, tmp_path: Path) -> None:
    with real_peer(system, "toy") as (port, _):
        policy = load(system, port, tmp_path, CONTRACTS[system])
        sent = observations(COUNT)
        got = [policy.infer(obs).actions for obs in sent]
        policy.close()
    expected = [toy(obs.images["top"], obs.state) for obs in sent]
    assert sum(a.tobytes() == b.tobytes() for a, b in zip(got, expected, strict=True)) == COUNT


@pytest.mark.long
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_real_server_plays_the_same_episodes_in_process_and_behind_ours(
    system: str, tmp_path: Path
) -> None:
    local = evaluate(tmp_path / "local", "-m", OURS, "-n", "4")
    with real_peer(system, "toy") as (port, _):
        model = ["-m", f"{system}://127.0.0.1:{port}"]
        model += ["--upstream_contract", str(contract_file(tmp_path, CONTRACTS[system]))]
        foreign = evaluate(tmp_path / "foreign", *model, "-n", "4")
        several = evaluate(tmp_path / "several", *model, "-n", "4", "--num_envs", "2")
        with ServerProcess(model) as ours:
            served = evaluate(tmp_path / "served", "-m", ours.address, "-n", "4")
    assert outcomes(local) == outcomes(foreign) == outcomes(several) == outcomes(served)
    assert len({reward for _, _, reward, _ in outcomes(local)}) > 1  # not all the same anyway


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path)
    with made.program:
        yield made


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_base_stands_when_the_real_server_dies_or_hangs(
    system: str, number: int, device: Device, tmp_path: Path
) -> None:
    contract = contract_file(tmp_path, DRIVE, prompt="task" if system == "groot" else "prompt")
    if system == "groot":
        parts = {"state": [{"key": "base"}], "actions": [{"key": "base"}], "prompt": "task"}
        contract = contract_file(tmp_path, {**DRIVE, **parts})
    robot = device.folder / "robot.yaml"
    robot.write_text(
        f"type: python:tests.faults.base_robot\nname: base\nargs: {{folder: {device.folder}}}\n"
    )
    with (
        real_peer(system, "drive") as (port, process),
        Program(
            "eval_real.py", "-m", f"{system}://127.0.0.1:{port}", "-c", str(robot),
            "--upstream_contract", str(contract), "--upstream_timeout_s", "0.3",
            "--task", "fake", "--yes", "-o", str(tmp_path / "out"), "--max_timesteps", "100000",
        ) as program,
    ):  # fmt: skip
        device.driving()
        process.send_signal(number)
        killed_s = time.monotonic()
        assert program.wait() == 1, program.said
    rows = device.rows()
    commanded = rows[rows[:, 3] == 1]
    stood_s = commanded[np.flatnonzero(commanded[:, 2])[-1] + 1, 0] - killed_s
    expected = "within 0.3 s" if number == signal.SIGSTOP else "nobody listens|ended"
    assert any(part in program.said[-1] for part in expected.split("|")), program.said
    print(f"{system}: stood {stood_s:.3f} s after it; {program.said[-1]}")  # noqa: T201
    assert rows[-1, 2] == 0
    assert rows[:, 3].all()  # it was told to stop, it did not have to do so alone
    # A tenth for the next request, the time for its answer, and the brake from 0.3 m/s.
    assert stood_s < 0.3 + 0.3 / 0.8 + 1.0
    check_braking(rows)
