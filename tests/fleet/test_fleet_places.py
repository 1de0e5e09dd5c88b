"""Nodes that are no copies of this one: behind a network, or with other sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.eval_sim import cli as eval_sim
from runtime.fleet import package_stamp
from tests.fleet.fleet_rig import ENVIRONMENT, ROOT, SLOW, Cluster, Evaluation, same
from tests.hosts import INSIDE, OUTSIDE, NoOtherHost, other_host

pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def test_two_hosts(tmp_path: Path) -> None:
    try:
        with other_host() as inside:
            _on_two_hosts(tmp_path, inside)
    except NoOtherHost as error:
        pytest.skip(str(error))


def _on_two_hosts(tmp_path: Path, inside: tuple[str, ...]) -> None:
    """A worker beside the server uses shared memory, one on the other host TCP."""
    with Cluster(nodes=1, cpus=1, head_ip=OUTSIDE) as cluster:
        start = ["-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1"]
        start += ["--address", cluster.address, "--node-ip-address", INSIDE]
        node = subprocess.Popen(
            [*inside, sys.executable, *start, "--object-store-memory", str(80 * 2**20)],
            env=ENVIRONMENT,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            time.sleep(10.0)
            flags = ("-n", "30", "--videos", "3", "--dataset")
            fleet = ("--num_envs", "2", "--servers", "1", "--ray", cluster.address)
            result = Evaluation(
                tmp_path / "fleet", *flags, str(tmp_path / "fleet_data"), *fleet
            ).result()
        finally:
            node.terminate()
            node.wait()
    alone = Evaluation(tmp_path / "alone", *flags, str(tmp_path / "alone_data")).result()
    for one in (result, alone):
        del one["config"]["recording"]["dataset"]
    same(result, alone, served=True)
    by_node = {worker["node"]: worker for worker in result["fleet"]["workers"]}
    assert by_node.keys() == {OUTSIDE, INSIDE}
    for node, worker in by_node.items():
        beside_it = worker["server"].startswith(f"{node}:")
        assert worker["transport"] == ("shm" if beside_it else "zmq")
        assert worker["transport_reason"]
    assert {worker["transport"] for worker in by_node.values()} == {"shm", "zmq"}
    assert all(worker["episodes"] for worker in by_node.values())
    videos = [
        sorted(path.name for path in (tmp_path / name / "fake" / "video" / "fake").iterdir())
        for name in ("fleet", "alone")
    ]
    assert videos[0] == videos[1]
    assert len(videos[0]) == 6


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare"
)
def test_a_node_with_other_sources_is_refused(tmp_path: Path) -> None:
    ours = ROOT / "runtime" / "fleet" / "errors.py"
    other = tmp_path / "errors.py"
    other.write_text(f"{ours.read_text()}\n# another version\n")
    mounted = f'mount --bind {other} {ours} && exec "$@"'
    with Cluster(nodes=1, cpus=2, prefix=("unshare", "-m", "sh", "-c", mounted, "sh")) as cluster:
        evaluation = Evaluation(tmp_path / "results", "-n", "2", "--ray", cluster.address)
        evaluation.process.wait(120)
        errors = evaluation.errors()
        assert evaluation.result(eval_sim.BAD_INPUT) == {}
    assert f"expected {package_stamp.package_stamp()}" in errors
    assert "got this package as " in errors
    assert SLOW not in errors
