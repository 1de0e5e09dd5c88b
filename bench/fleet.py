"""Evaluations on Ray beside those without: equal results, rates, start-up, memory.

    python -m bench.fleet equal  [--episodes 200]    two nodes against one process, in sequence
    python -m bench.fleet rate   [--episodes 2000]   --ray against --num_envs 2, in turns
    python -m bench.fleet sleep  [--episodes 2400] [--workers 16]   a world that sleeps 1 s
    python -m bench.fleet server [--episodes 200]    the policy in each world's process, or served

``rate`` counts from the tenth result on, ``sleep`` from the last worker's readiness. Only ratios
within one run mean anything on a shared machine.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT, PROCESSES
from runtime.eval_sim.cli import main as evaluate
from runtime.eval_sim.cli import read_config
from runtime.eval_sim.reports import FleetStatus
from runtime.eval_sim.runner import run
from runtime.evaluation.episode_result import Episode
from runtime.evaluation.repeatable_fields import repeatable_fields
from tests.fleet.fleet_rig import WORLD, Cluster

MODEL = "ckpt/act_sim_transfer_cube_scripted_zscore_example"
SHIPPED = ["-m", MODEL, "-e", "aloha", "--videos", "0"]
SLEEPING = ["-m", "python:bench.fleet_world:make", "-e", "gym:bench.fleet_world:Sleeping-v0"]
COUNTED_FROM = 10
ROUNDS = 2


@dataclass
class Run:
    """What one evaluation measured.

    Attributes:
        finished_s: When each result came, from the start.
        ready_s: When each worker was ready, from the first actor's start.
        all_ready_s: When the last one was ready, from the start.
        driver_cpu_s: Processor time of the driver's process from the tenth result on.
        answer_bytes: Largest pickled result of an episode.
    """

    finished_s: list[float] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)
    all_ready_s: float = 0.0
    driver_cpu_s: float = 0.0
    answer_bytes: int = 0

    @property
    def rate(self) -> float:
        """Episodes per second from the tenth result on."""
        counted = len(self.finished_s) - COUNTED_FROM
        return counted / (self.finished_s[-1] - self.finished_s[COUNTED_FROM - 1])


def measure(arguments: list[str], at_end: Callable[[], None] = lambda: None) -> Run:
    """Run an evaluation without writing its result."""
    measured, began_s, cpu_s, workers = Run(), time.monotonic(), 0.0, 0
    for report in run(read_config(arguments)):
        now_s = time.monotonic() - began_s
        if isinstance(report, FleetStatus):
            measured.ready_s = [worker.ready_s for worker in report.workers]
            if report.ready > workers:
                workers, measured.all_ready_s = report.ready, now_s
        elif isinstance(report, Episode):
            measured.finished_s.append(now_s)
            measured.answer_bytes = max(measured.answer_bytes, len(pickle.dumps(report)))
            if len(measured.finished_s) == COUNTED_FROM:
                cpu_s = time.process_time()
        if len(measured.finished_s) == COUNTED_FROM + 1:
            at_end()
            at_end = _nothing
    measured.driver_cpu_s = time.process_time() - cpu_s
    return measured


def _nothing() -> None:
    pass


def equal(episodes: int, _: int) -> None:
    with tempfile.TemporaryDirectory() as folder, Cluster(nodes=2, cpus=1) as cluster:
        results = []
        for name, flags in (
            ("sequence", []),
            ("two nodes", ["--num_envs", "2", "--ray", cluster.address]),
        ):
            where = Path(folder, name)
            assert evaluate([*SHIPPED, "-n", str(episodes), "-o", str(where), *flags]) == 0
            results.append(json.loads(next(where.glob("*/*.json")).read_text()))
    alone, fleet = (repeatable_fields(result) for result in results)
    others = [name for name in alone.keys() | fleet.keys() if alone.get(name) != fleet.get(name)]
    nodes = [(worker["pid"], worker["episodes"]) for worker in results[1]["fleet"]["workers"]]
    print(f"{episodes} episodes, {alone['total_success']} successes; (pid, episodes) {nodes}")
    print(f"fields that differ: {others or 'none'}")
    if others:
        raise SystemExit(1)


def rate(episodes: int, _: int) -> None:
    each = episodes // ROUNDS
    arguments = [*SHIPPED, "-n", str(each), "--num_envs", "2"]
    plain, fleet = [], []
    with Cluster(nodes=1, cpus=2) as cluster:
        for _round in range(ROUNDS):
            plain.append(measure(arguments))
            fleet.append(measure([*arguments, "--ray", cluster.address]))
            for name, one in (("--num_envs 2", plain[-1]), ("--ray", fleet[-1])):
                first_s, last_s = one.finished_s[0], one.finished_s[-1]
                print(
                    f"{name:<14} {one.rate:6.2f} episodes/s from result {COUNTED_FROM} on; first "
                    f"result after {first_s:.1f} s, last after {last_s:.1f} s; driver "
                    f"{1e3 * one.driver_cpu_s / (each - COUNTED_FROM):.2f} ms CPU an episode"
                )
    ratio = sum(one.rate for one in fleet) / sum(one.rate for one in plain)
    print(f"--ray / --num_envs 2: {ratio:.3f}, expected at least 0.95")


def sleep(episodes: int, workers: int) -> None:
    arguments = [*SLEEPING, "--videos", "0", "-n", str(episodes), "--num_envs", str(workers)]
    arguments += ["--env_cpus", "0.0625"]
    with Cluster(nodes=1, cpus=workers / 16) as cluster:
        memory: list[float] = []
        one = measure(
            [*arguments, "--ray", cluster.address],
            lambda: memory.extend(_anonymous_mb(pid) for pid in cluster.actors(WORLD)),
        )
    counted = [now for now in one.finished_s if now > one.all_ready_s]
    wall_s = counted[-1] - one.all_ready_s
    share = len(counted) / workers / wall_s
    driver_ms = 1e3 * one.driver_cpu_s / (episodes - COUNTED_FROM)
    print(f"{workers} workers: ready after {one.ready_s[0]:.1f} to {max(one.ready_s):.1f} s")
    print(f"{len(counted)} of {episodes} episodes after that, in {wall_s:.1f} s")
    print(f"{len(counted) / wall_s:.1f} episodes/s, {share:.3f} of the possible")
    print(f"result of an episode: {one.answer_bytes} bytes; driver: {driver_ms:.2f} ms CPU each")
    if memory:
        print(f"memory of a worker (RssAnon): {min(memory):.0f} to {max(memory):.0f} MB")


def server(episodes: int, _: int) -> None:
    arguments = [*SHIPPED, "-n", str(episodes), "--num_envs", "2", "--env_cpus", "0.5"]
    with Cluster(nodes=1, cpus=2) as cluster:
        for name, flags in (("in each process", []), ("one server", ["--servers", "1"])):
            memory: list[float] = []
            one = measure(
                [*arguments, *flags, "--ray", cluster.address],
                lambda memory=memory: memory.extend(map(_anonymous_mb, cluster.actors(WORLD))),
            )
            print(
                f"policy {name:<16} {one.rate:6.2f} episodes/s; a worker has {max(memory):.0f} MB "
                f"(RssAnon); first result after {one.finished_s[0]:.1f} s"
            )


def _anonymous_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


PARTS: dict[str, tuple[Callable[[int, int], None], int]] = {
    "equal": (equal, 200),
    "rate": (rate, 2000),
    "sleep": (sleep, 2400),
    "server": (server, 200),
}


def main() -> int:
    cli = CommandLine(description=__doc__)
    cli.add_argument("part", choices=PARTS)
    cli.add_argument("--episodes", type=Number(int, COUNT))
    cli.add_argument("--workers", type=Number(int, PROCESSES), default=16)
    args = cli.parse_args()
    part, episodes = PARTS[args.part]
    part(args.episodes or episodes, args.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
