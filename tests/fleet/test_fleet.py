"""Evaluations on a Ray cluster of two nodes: the episodes of one machine, whatever is lost."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.eval_sim import cli as eval_sim
from runtime.fleet.cluster import import_ray
from tests.fleet.fleet_rig import FAST, SERVER, SHORT, SLOW, WORLD, Cluster, Evaluation, kill, same
from tests.runtime.command import status_of

pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
EPISODES = 12


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Ray starts once: of the short tests, which may be spread over processes, one needs it."""
    with Cluster(nodes=2, cpus=2) as started:
        yield started


def test_the_same_result_on_two_nodes_though_a_worker_and_a_server_are_killed(
    tmp_path: Path, cluster: Cluster
) -> None:
    flags = ("-n", str(EPISODES))
    alone = Evaluation(tmp_path / "alone", *flags, model=FAST)
    fleet = Evaluation(
        tmp_path / "fleet", *flags, *("--num_envs", "2", "--servers", "1"), "--ray", cluster.address
    )
    fleet.wait_for(lambda: fleet.journal_lines() > 2)
    assert kill(cluster.actors(WORLD))
    fleet.wait_for(lambda: fleet.journal_lines() > 5)
    assert kill(cluster.actors(SERVER))
    result = fleet.result()
    same(result, alone.result(), served=True)
    record = result["fleet"]
    assert record["workers_lost"] == record["servers_lost"] == 1
    assert sum(worker["episodes"] for worker in record["workers"]) == EPISODES
    for worker in record["workers"]:
        assert worker["transport"] == "shm"
        assert "same host" in worker["transport_reason"]
        assert worker["server"].startswith(worker["node"])


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The error line of an evaluation that does not start, and leaves an earlier result."""
    kept = tmp_path / "fake" / "fake.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("earlier")
    arguments = ["-m", SLOW, *SHORT, "-o", str(tmp_path), *flags]
    assert status_of(eval_sim.main, arguments) == eval_sim.BAD_INPUT
    assert kept.read_text() == "earlier"
    return capsys.readouterr().err


def test_no_cluster_at_the_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    line = refused(tmp_path, capsys, "--ray", f"127.0.0.1:{port}")
    assert f"--ray 127.0.0.1:{port}: no cluster answers" in line
    assert "expected HOST:PORT of a cluster's head" in line


def test_no_ray_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "Ray is not installed" in refused(tmp_path, capsys, "--ray")


@pytest.mark.long
def test_an_episode_that_ends_its_worker_each_time_is_an_error(
    tmp_path: Path, cluster: Cluster
) -> None:
    crashing = "python:tests.fleet.slow_policy:make_crashing"
    flags = ("-n", "4", "--num_envs", "2", "--retries", "1", "--ray", cluster.address)
    result = Evaluation(tmp_path / "fleet", *flags, model=crashing).result(eval_sim.LOST)
    assert [episode["seed"] for episode in result["episodes"]] == [0, 2, 3]
    (error,) = result["errors"]
    assert (error["seed"], error["attempts"]) == (1, 2)
    assert "was lost" in error["error"]


@pytest.mark.long
def test_an_episode_that_takes_too_long_is_an_error(tmp_path: Path, cluster: Cluster) -> None:
    flags = ("-n", "2", "--num_envs", "1", "--retries", "0", "--ray", cluster.address)
    run = Evaluation(tmp_path / "fleet", *flags, "--episode_timeout_s", "0.05")
    result = run.result(eval_sim.LOST)
    assert [error["seed"] for error in result["errors"]] == [0, 1]
    assert all("took longer than 0.05 s" in error["error"] for error in result["errors"])


@pytest.mark.long
def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, cluster: Cluster) -> None:
    run = Evaluation(tmp_path / "fleet", "-n", "1000", "--num_envs", "2", "--ray", cluster.address)
    run.wait_for(lambda: run.journal_lines() > 4)
    run.process.send_signal(signal.SIGINT)
    result = run.result(eval_sim.INTERRUPTED)
    assert result["failure"] == "interrupted"
    assert 3 < result["total"] < 1000


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--servers", "1"), "--servers, --env_cpus: got one without --ray"),
        (("--ray", "--server_gpus", "1"), "--server_gpus: got it without --servers"),
        (("--ray", "--realtime"), "--ray with --realtime, --trace or --rerun"),
        (("--ray", "nonsense"), "expected HOST:PORT of a cluster's head"),
    ],
)
def test_flags_that_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], line: str
) -> None:
    assert line in refused(tmp_path, capsys, *flags)


def test_usage_reports_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    import_ray()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
