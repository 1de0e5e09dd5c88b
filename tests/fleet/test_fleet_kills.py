"""``kill -9`` at random moments of what a fleet is made of: nothing is lost, nothing twice."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.fleet_rig import FAST, SERVER, WORLD, Cluster, Evaluation, kill, same

pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

LONG = os.environ.get("METRONOME_LONG", "") not in ("", "0")
WORKERS, NODES, SERVERS, DRIVERS = (20, 10, 10, 10) if LONG else (3, 2, 2, 2)
"""How often each is killed."""
EPISODES_PER_KILL = 40
FLEET = ("--num_envs", "2", "--retries", "20")
"""More retries than kills: here the kills are at random, and no episode's fault."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=2, cpus=2) as started:
        yield started


def disturbed(
    tmp_path: Path, cluster: Cluster, times: int, disturb: Callable[[], Any], *flags: str
) -> dict[str, Any]:
    """Return the result of an evaluation that is disturbed ``times`` times."""
    episodes = ("-n", str(times * EPISODES_PER_KILL))
    evaluation = Evaluation(tmp_path / "fleet", *episodes, *FLEET, *flags, "--ray", cluster.address)
    for done in range(times):
        lines = evaluation.journal_lines()
        evaluation.wait_for(lambda lines=lines: evaluation.journal_lines() > lines + 1)
        time.sleep(random.uniform(0.0, 1.0))
        assert evaluation.wait_for(disturb), f"it ended before disturbance {done + 1} of {times}"
    result = evaluation.result()
    undisturbed = Evaluation(tmp_path / "alone", *episodes, model=FAST).result()
    same(result, undisturbed, served=True)
    return result


def test_workers_are_killed(tmp_path: Path, cluster: Cluster) -> None:
    result = disturbed(tmp_path, cluster, WORKERS, lambda: kill(cluster.actors(WORLD)))
    assert 1 <= result["fleet"]["workers_lost"] <= WORKERS


def test_servers_are_killed(tmp_path: Path, cluster: Cluster) -> None:
    flags = ("--servers", "2", "--env_cpus", "0.5")
    result = disturbed(tmp_path, cluster, SERVERS, lambda: kill(cluster.actors(SERVER)), *flags)
    assert 1 <= result["fleet"]["servers_lost"] <= SERVERS


def test_nodes_are_killed(tmp_path: Path, cluster: Cluster) -> None:
    def kill_node() -> bool:
        cluster.kill_node()
        return True

    result = disturbed(tmp_path, cluster, NODES, kill_node)
    assert result["fleet"]["workers_lost"] >= 1


def test_the_driver_is_killed_and_resumed(tmp_path: Path, cluster: Cluster) -> None:
    episodes = ("-n", str(DRIVERS * EPISODES_PER_KILL))
    flags = (*episodes, *FLEET, "--resume", "--ray", cluster.address)
    for _ in range(DRIVERS):
        driver = Evaluation(tmp_path / "fleet", *flags)
        lines = driver.journal_lines()
        driver.wait_for(lambda driver=driver, lines=lines: driver.journal_lines() > lines + 1)
        time.sleep(random.uniform(0.0, 2.0))
        assert driver.process.poll() is None, "it ended before it was killed"
        driver.kill()
    result = Evaluation(tmp_path / "fleet", *flags).result()
    same(result, Evaluation(tmp_path / "alone", *episodes, model=FAST).result())
    deadline_s = time.monotonic() + 30
    while cluster.actors(WORLD):
        assert time.monotonic() < deadline_s, "actors of a dead driver are left"
        time.sleep(0.1)
