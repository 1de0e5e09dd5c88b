"""A robot over ROS 2 next to the same robot without it.

    python -m bench.ros2                       # both parts
    python -m bench.ros2 --parts lateness --ticks 10000
    python -m bench.ros2 --parts latency --samples 1000

``lateness``: how late the control loop of ``eval_real.py`` sends its commands at 50 and 200 Hz
under SCHED_FIFO, on ``ros2_aloha_twin`` and on ``sim_twin``, by turns; the ratio of the p99s.
``latency``: from the publication of joints and a picture by a node to the arrival of the command
that was made from them, through the driver and a policy server over shared memory, whose policy
costs nothing; beside it the same over ROS 1, where that is installed.
Results land in ``bench/results/ros2.json``. Needs what ``make ros2`` installs; real-time priority
needs the right to it (``--priority 0`` goes without).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.record_files import write_record
from bench.records import RESULTS, Records
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT
from policies.types import CameraContract, MetaObs
from robots.base import Robot
from robots.factory import make_robot
from robots.ros2_environment import find_interpreter
from runtime.client import PolicyClient
from runtime.eval_real.run_config import PRIORITY
from runtime.server.server_process import ServerProcess
from tests.faults.sine_policy import CONTRACT, START, SinePolicy
from tests.robots import ros2_rig, ros_rig

ROOT = Path(__file__).parents[1]
OUTPUT = RESULTS / "ros2.json"
ROBOTS = ("sim_twin", "ros2_aloha_twin")
RATES, POLICY_HZ, TURNS = (50, 200), 50, 2
PICTURE_HW = (48, 64)
COUNTER_STEP = 1e-5
"""rad per picture: what an echoed number moves joint 0 by."""


def make_sine() -> SinePolicy:
    """Moves without looking, from pictures of the twin's size."""
    return SinePolicy(
        dataclasses.replace(CONTRACT, cameras=(CameraContract("top", (240, 320), (240, 320)),))
    )


class EchoPolicy(SinePolicy):
    """Answers a picture's number as the position of joint 0."""

    def spoiled(self, actions: np.ndarray, obs: MetaObs) -> np.ndarray:
        actions[:] = START
        actions[:, 0] = COUNTER_STEP * _number(obs.images["top"])
        return actions


def make_echo() -> EchoPolicy:
    return EchoPolicy()


def _number(picture: np.ndarray) -> int:
    return 256 * int(picture[0, 0, 1]) + int(picture[0, 0, 2])


def lateness(ticks: int, priority: int) -> dict[str, Any]:
    """By rate and robot: p50 and p99 of the lateness in us, of each turn; and the ratios."""
    rates: dict[str, Any] = {}
    for rate in RATES:
        turns: dict[str, list[Any]] = {robot: [] for robot in ROBOTS}
        for _ in range(TURNS):
            for robot in ROBOTS:
                turns[robot].append(_evaluate(robot, rate, ticks // TURNS, priority))
        p99 = {robot: statistics.mean(t["p99_us"] for t in turns[robot]) for robot in ROBOTS}
        rates[str(rate)] = {**turns, "p99_ratio": p99[ROBOTS[1]] / p99[ROBOTS[0]]}
    return rates


def _evaluate(robot: str, rate: int, ticks: int, priority: int) -> dict[str, Any]:
    domain = []
    if robot == "ros2_aloha_twin":
        domain = ["--robot.domain_id", str(ros2_rig.free_domain())]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "eval_real.py", "-m", "python:bench.ros2:make_sine", "-c", robot,
             "--yes", "--video_fps", "0", "--priority", str(priority), "-o", folder,
             "--publish_rate", str(rate), "--max_timesteps", str(ticks * POLICY_HZ // rate),
             *domain],
            cwd=ROOT, check=True,
        )  # fmt: skip
        path = Path(folder) / robot / "sim_transfer_cube.json"
        timing = json.loads(path.read_text(encoding="utf-8"))["timing"]
    late = timing["lateness"]
    return {
        "ticks": timing["ticks"], "missed": timing["missed_ticks"],
        "starved": timing["starved_ticks"],
        "p50_us": 1e6 * late["p50"], "p99_us": 1e6 * late["p99"],
    }  # fmt: skip


def latency(samples: int) -> dict[str, Any]:
    """By middleware: p50 and p99, ms, from publication to the command made from it."""
    found = {"ROS 2": _latency_ros2(samples)}
    if not ros_rig.MISSING:
        found["ROS 1"] = _latency_ros1(samples)
    return found


def _latency_ros2(samples: int) -> dict[str, Any]:
    domain = ros2_rig.free_domain()
    robot = ros2_rig.arm({"domain_id": str(domain)})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        node = ros2_rig.joint_peer(folder, domain, robot, images=(ros2_rig.PICTURES,))
        try:
            _answer(robot, samples)
        finally:
            node.close()
        commands = ros2_rig.read_commands(folder, len(robot.config.joint_names))
        return _from_publication(folder, commands["ns"], commands["values"][:, 0])


def _latency_ros1(samples: int) -> dict[str, Any]:
    robot = make_robot(
        "agilex_aloha_twin", {"cameras.top.hw": str(list(PICTURE_HW)), "twin": "null"}
    )
    with tempfile.TemporaryDirectory() as name, ros_rig.master(Path(name)) as environment:
        folder = Path(name)
        os.environ.update(environment)  # rospy reads it in this process
        command = [sys.executable, "-m", "bench.ros1_arm", name]
        with ros_rig.stopped_afterwards(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)):
            _answer(robot, samples)
        commands = np.fromfile(folder / "commands", np.dtype([("ns", "<i8"), ("target", "<f8")]))
        return _from_publication(folder, commands["ns"], commands["target"])


def _answer(robot: Robot, samples: int) -> None:
    """Answer each new picture with one command, from a server over shared memory."""
    with (
        robot.companion(),
        robot,
        ServerProcess(["-m", "python:bench.ros2:make_echo"]) as server,
        PolicyClient(server.address, transport="shm") as client,
    ):
        robot.connect()
        newest = 0
        while samples:
            stamp_ns = robot.get_cameras()["top"].stamp_ns
            if stamp_ns == newest:
                time.sleep(1e-4)
                continue
            newest, samples = stamp_ns, samples - 1
            robot.send_action(client.infer(robot.get_observation()).actions[0])


def _from_publication(
    folder: Path, arrived_ns: NDArray[Any], targets: NDArray[Any]
) -> dict[str, Any]:
    """Pair each picture with the first command made from it, by its number in joint 0."""
    published = ros2_rig.read_pictures(folder)
    numbers = np.rint(targets / COUNTER_STEP).astype(int)
    arrived = {int(n): int(ns) for n, ns in zip(numbers[::-1], arrived_ns[::-1], strict=True)}
    took_ms = [(ns - published[n]) / 1e6 for n, ns in arrived.items() if n in published]
    return {
        "samples": len(took_ms),
        "p50_ms": float(np.percentile(took_ms, 50)),
        "p99_ms": float(np.percentile(took_ms, 99)),
    }


def table(found: Mapping[str, Any]) -> str:
    lines = []
    for rate, row in found.get("lateness", {}).items():
        shown = {
            robot: ", ".join(f"{turn['p99_us']:.0f}" for turn in row[robot]) for robot in ROBOTS
        }
        lines.append(
            f"lateness p99 at {rate} Hz: {shown[ROBOTS[1]]} us over ROS 2, {shown[ROBOTS[0]]} us "
            f"without; ratio {row['p99_ratio']:.2f}"
        )
    for middleware, row in found.get("latency", {}).items():
        lines.append(
            f"publication to command over {middleware}: p50 {row['p50_ms']:.2f} ms, "
            f"p99 {row['p99_ms']:.2f} ms, {row['samples']} samples"
        )
    return "\n".join(lines)


def main() -> int:
    cli = CommandLine(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cli.add_argument("--parts", nargs="+", choices=("lateness", "latency"),
                     default=["lateness", "latency"])  # fmt: skip
    cli.add_argument("--ticks", type=Number(int, COUNT), default=10_000)
    cli.add_argument("--samples", type=Number(int, COUNT), default=1000)
    cli.add_argument("--priority", type=Number(int, PRIORITY), default=10)
    args = cli.parse_args()
    find_interpreter("")
    found: dict[str, Any] = {"facts": Records().facts}
    if "lateness" in args.parts:
        found["lateness"] = lateness(args.ticks, args.priority)
    if "latency" in args.parts:
        found["latency"] = latency(args.samples)
    write_record(OUTPUT, found)
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
