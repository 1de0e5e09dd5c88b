"""One server, many clients: what batching gives, what a robot pays, what a swap and a stranger do.

    pytest bench/test_many_clients.py --long

Everything with the shipped checkpoint, canned observations, and servers and clients as processes of
their own. What is compared is measured in turns, in blocks, within one run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.clients import Answers, Clients
from bench.inference.nets import SHIPPED
from bench.records import Records
from runtime.server.server_process import ServerProcess
from runtime.tools import ctl

MODEL = ("-m", str(SHIPPED), "--device", "cpu")
CLIENTS, SIMULATIONS = 8, 7
ROBOT_HZ, ROBOT_DEADLINE_MS = 20.0, 200.0
STEM = "many_clients"


@pytest.fixture(scope="module")
def long(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--long"))


@pytest.fixture(autouse=True)
def _as_on_a_robot(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield


def say(capsys: pytest.CaptureFixture[str], *lines: str) -> None:
    with capsys.disabled():
        print("", *lines, sep="\n  ")


@pytest.mark.timeout(1800)
def test_batches(capsys: pytest.CaptureFixture[str], records: Records, long: bool) -> None:
    """Requests per second of eight simulations: batched, and one at a time on one core and two."""
    rounds, seconds = (10, 6.0) if long else (2, 2.0)
    settings = {
        "batched": (),
        "one at a time": ("--max_batch", "1"),
        "one at a time, all cores on each": ("--max_batch", "1", "--threads", "2"),
    }
    rates: dict[str, list[float]] = {name: [] for name in settings}
    with ExitStack() as stack:
        crowds = {}
        for name, flags in settings.items():
            server = stack.enter_context(ServerProcess((*MODEL, *flags)))
            crowds[name] = stack.enter_context(Clients(server.address, CLIENTS))
        for _ in range(rounds):
            for name, crowd in crowds.items():
                crowd.start(seconds)
                answers = crowd.answers()
                assert answers.failed == 0
                rates[name].append(answers.per_s)
    median = {name: float(np.median(values)) for name, values in rates.items()}
    ratio = median["batched"] / median["one at a time"]
    against_all = median["batched"] / median["one at a time, all cores on each"]
    for name, value in median.items():
        records.values[f"{CLIENTS} clients, {name}, requests/s"] = round(value, 1)
    records.values["batched ÷ one at a time"] = ratio
    records.values["one at a time ÷ batched"] = 1 / ratio
    records.values["batched ÷ one at a time, all cores on each"] = against_all
    say(
        capsys,
        *(f"{name:34}{value:8.1f} requests/s" for name, value in median.items()),
        f"batched ÷ one at a time {ratio:.2f}; ÷ with all cores on each {against_all:.2f}",
    )
    records.save(STEM)


@pytest.mark.timeout(1800)
def test_a_robot_among_simulations(
    capsys: pytest.CaptureFixture[str], records: Records, long: bool
) -> None:
    """A robot's p99 beside seven simulations that never pause, ÷ (longest batch + inference)."""
    seconds = 120.0 if long else 5.0
    wants = {"kind": "robot", "deadline_ms": ROBOT_DEADLINE_MS, "rate_hz": ROBOT_HZ}
    with (
        ServerProcess(MODEL) as server,
        Clients(server.address, 1, **wants) as robot,
        Clients(server.address, SIMULATIONS) as simulations,
    ):
        simulations.start(seconds + 1)
        robot.start(seconds, ROBOT_HZ)
        ours, theirs = robot.answers(), simulations.answers()
    assert ours.failed == theirs.failed == 0
    batch_s, single_s = (float(np.percentile(a.infer_s, 99)) for a in (theirs, ours))
    p99_s = float(np.percentile(ours.latency_s, 99))
    ratio = p99_s / (batch_s + single_s)
    medians_s = float(np.median(theirs.infer_s) + np.median(ours.infer_s))
    records.add("a robot among 7 simulations", {"robot": ours.latency_s * 1e6})
    records.add("a robot among 7 simulations", {"simulations": theirs.latency_s * 1e6})
    records.values["robot p99 ÷ (longest batch + one inference)"] = ratio
    records.values["robot p99 ÷ (median batch + median inference)"] = p99_s / medians_s
    say(
        capsys,
        f"robot        {_ms(ours.latency_s)}, {len(ours.latency_s)} requests",
        f"simulations  {_ms(theirs.latency_s)}, {theirs.per_s:.0f} requests/s",
        f"p99 of a batch {batch_s * 1e3:.1f} ms, of the robot's inference {single_s * 1e3:.1f} ms",
        f"robot p99 ÷ (batch + inference): {ratio:.2f} by p99s, {p99_s / medians_s:.2f} by medians",
    )
    records.save(STEM)


@pytest.mark.timeout(1800)
def test_a_stranger_every_second(
    capsys: pytest.CaptureFixture[str], records: Records, long: bool
) -> None:
    """A robot's p99 while a client connects every second, ÷ without."""
    rounds, seconds = (6, 20.0) if long else (1, 4.0)
    alone: list[Answers] = []
    visited: list[Answers] = []
    with (
        ServerProcess(MODEL) as server,
        Clients(server.address, 1, kind="robot") as robot,
        Clients(server.address, 1) as stranger,
    ):
        for _ in range(rounds):
            robot.start(seconds, ROBOT_HZ)
            alone.append(robot.answers())
            stranger.come_and_go(seconds, 1.0)
            robot.start(seconds, ROBOT_HZ)
            visited.append(robot.answers())
            assert stranger.answers().failed == 0
    without, beside = _latency(alone), _latency(visited)
    ratio = float(np.percentile(beside, 99) / np.percentile(without, 99))
    group = "a robot, and a stranger every second"
    records.add(group, {"alone": without * 1e6, "a stranger every second": beside * 1e6})
    records.values["robot p99, a client connecting every second ÷ without"] = ratio
    say(capsys, f"alone    {_ms(without)}", f"visited  {_ms(beside)}", f"p99 ÷ p99 {ratio:.2f}")
    records.save(STEM)


@pytest.mark.timeout(1800)
def test_swaps_under_load(capsys: pytest.CaptureFixture[str], records: Records, long: bool) -> None:
    """The shipped checkpoint for itself, again and again, under a robot and a simulation."""
    swaps = 100 if long else 3
    calm_s, during = 20.0 if long else 3.0, []
    with (
        ServerProcess(MODEL) as server,
        Clients(server.address, 1, kind="robot") as robot,
        Clients(server.address, 1) as simulation,
        ctl.dial(server.address, "", "") as dialer,
    ):
        robot.start(calm_s, ROBOT_HZ)
        simulation.start(calm_s)
        calm = robot.answers()
        failed = calm.failed + simulation.answers().failed
        took_s = []
        while len(took_s) < swaps:
            robot.start(20.0 if long else 4.0, ROBOT_HZ)
            simulation.start(20.0 if long else 4.0)
            for _ in range(10 if long else 3):
                state = ctl.load(dialer, str(SHIPPED), 120)
                assert state["state"] == "serving", state
                took_s.append(state["took_s"])
            answers = robot.answers()
            during.append(answers)
            failed += answers.failed + simulation.answers().failed
        counts = dialer.send_admin_command("status")["counts"]
    swapping = _latency(during)
    group = "a robot, while policies are swapped"
    records.add(group, {"before": calm.latency_s * 1e6, "meanwhile": swapping * 1e6})
    records.values["hot swaps"] = counts["swaps"]
    records.values["hot swaps: failed requests"] = failed
    ratio = float(np.percentile(swapping, 99) / np.percentile(calm.latency_s, 99))
    records.values["robot p99 during swaps ÷ before"] = ratio
    say(
        capsys,
        f"{counts['swaps']} swaps, {failed} failed requests, median {np.median(took_s):.1f} s each",
        f"robot before     {_ms(calm.latency_s)}",
        f"robot meanwhile  {_ms(swapping)}, p99 ÷ p99 {ratio:.2f}",
    )
    records.save(STEM)
    assert counts["failed"] == failed == 0
    assert counts["swaps"] >= swaps


def _latency(blocks: list[Answers]) -> NDArray[np.float64]:
    assert not any(block.failed for block in blocks)
    return np.concatenate([block.latency_s for block in blocks])


def _ms(seconds: NDArray[np.float64]) -> str:
    figures = np.percentile(seconds, (50, 99, 100)) * 1e3
    return "p50 {:.1f}  p99 {:.1f}  max {:.1f} ms".format(*figures)
