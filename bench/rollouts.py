"""The same rollouts in simulation, on the robot, and with the server on another host.

    python -m bench.rollouts --rollouts 50

Five ways, the same seeds: ``simulation`` (``eval_sim.py``, lockstep); ``ROS 2`` (``eval_real.py``
on ``ros2_aloha_twin``, its server on this host); ``local`` (the same on ``agilex_aloha_twin`` over
a real ROS 1 master); ``other host`` and ``other host, JPEG`` (``local`` with the server in a
network namespace, over ZMQ, through a relay that delays each way by 5 ± 2 ms). The outcome comes
from the twin's own reward. Results land in ``bench/results/rollouts.json``, each way as soon as it
is done; ``--ways`` picks some.

``ROS 2`` needs what ``make ros2`` installs. The other ways on a robot need ROS 1
(``python3-rospy`` ...); another host needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.record_files import write_record
from bench.records import RESULTS, Records
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT
from robots.ros2_environment import find_interpreter
from runtime.options.defaults import DEFAULT_CHECKPOINT
from tests.hosts import INSIDE, other_host
from tests.robots.ros_rig import MISSING, WHY_NOT, master, twin_node

ROOT = Path(__file__).parents[1]
FIRST_SEED = 1000
RELAY_MS = {"delay": 5.0, "jitter": 2.0}
ROBOT, ROS2_ROBOT, TASK = "agilex_aloha_twin", "ros2_aloha_twin", "sim_transfer_cube"
WITHOUT_ROS1 = {"simulation", "ROS 2"}
OUTPUT = RESULTS / "rollouts.json"


def simulation(rollouts: int, folder: Path) -> Path:
    run_command(
        "eval_sim.py", "-m", DEFAULT_CHECKPOINT, "-e", "aloha", "-n", str(rollouts),
        "--seed", str(FIRST_SEED), "--videos", "0", "-o", str(folder),
    )  # fmt: skip
    return folder / "aloha" / f"{TASK}.json"


def ros2(rollouts: int, folder: Path) -> Path:
    find_interpreter("")
    _evaluate(ROS2_ROBOT, DEFAULT_CHECKPOINT, rollouts, folder)
    return folder / ROS2_ROBOT / f"{TASK}.json"


def local(rollouts: int, folder: Path) -> Path:
    return _on_the_robot(rollouts, folder, DEFAULT_CHECKPOINT)


def elsewhere(rollouts: int, folder: Path, *flags: str) -> Path:
    with other_host() as prefix, relayed_server(prefix, DEFAULT_CHECKPOINT) as address:
        return _on_the_robot(rollouts, folder, address, *flags)


WAYS: Mapping[str, Callable[[int, Path], Path]] = {
    "simulation": simulation,
    "ROS 2": ros2,
    "local": local,
    "other host": elsewhere,
    "other host, JPEG": lambda rollouts, folder: elsewhere(rollouts, folder, "--jpeg"),
}


def _on_the_robot(rollouts: int, folder: Path, model: str, *flags: str) -> Path:
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ.update(stack.enter_context(master(home)))
        stack.enter_context(twin_node())
        _evaluate(ROBOT, model, rollouts, folder, *flags)
    return folder / ROBOT / f"{TASK}.json"


def _evaluate(robot: str, model: str, rollouts: int, folder: Path, *flags: str) -> None:
    run_command(
        "eval_real.py", "-m", model, "-c", robot, "--task", TASK, "-n", str(rollouts),
        "--seed", str(FIRST_SEED), "--yes", "--video_fps", "0", "--priority", "10",
        "-o", str(folder), *flags,
    )  # fmt: skip


@contextlib.contextmanager
def relayed_server(prefix: tuple[str, ...], checkpoint: str) -> Iterator[str]:
    """The address at which a server on the other host is reached."""
    server = [*prefix, sys.executable, "-m", "runtime.server", "-m", checkpoint]
    server += ["--host", INSIDE, "--port", "0", "--stop_with_stdin", "--log_level", "ERROR"]
    with _said(server, "started on ") as there:
        relay = [sys.executable, "tests/relay.py", "--to", there]
        relay += [word for name, ms in RELAY_MS.items() for word in (f"--{name}", str(ms))]
        with _said(relay, "") as port:
            yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def _said(command: list[str], before: str) -> Iterator[str]:
    """A program, as long as it is needed, and the first line of its that has ``before`` in it."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        line = next(line for line in process.stdout if before in line)
        yield line.rpartition(before)[2].strip() if before else line.strip()
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def run_command(*command: str) -> None:
    """Raises ``RuntimeError``: it failed."""
    status = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    if status:
        raise RuntimeError(f"{' '.join(command)}: exit status {status}")


def summary(path: Path, took_s: float) -> dict[str, Any]:
    """What a result file says of the matter."""
    result = json.loads(path.read_text(encoding="utf-8"))
    timing, episodes = result["timing"], result["episodes"]
    kept = {
        name: timing[name] for name in ("request", "action_age", "lateness", "infer")
        if name in timing
    }  # fmt: skip
    return {
        **{name: result.get(name) for name in ("success_rate", "wilson_95", "total_success")},
        **{name: result.get(name) for name in ("total", "transport", "pictures", "mode")},
        **{name: timing.get(name, 0) for name in ("ticks", "missed_ticks", "starved_ticks")},
        "faults": result.get("faults", []),
        "clamped_ticks": result.get("clamped_ticks"),
        "failed_seeds": [entry["seed"] for entry in episodes if not entry["success"]],
        "timing": kept,
        "took_s": round(took_s, 1),
    }


def table(ways: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| way | success | ticks | missed | starved | request p50 | p99 (ms) | lateness p99 (ms) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, way in ways.items():
        request, lateness = way["timing"].get("request", {}), way["timing"].get("lateness", {})
        lines.append(
            f"| {name} | {way['total_success']}/{way['total']} | {way['ticks']} "
            f"| {way['missed_ticks']} | {way['starved_ticks']} | {_ms(request, 'p50')} "
            f"| {_ms(request, 'p99')} | {_ms(lateness, 'p99')} |"
        )
    return "\n".join(lines)


def _ms(timing: Mapping[str, Any], name: str) -> str:
    value = timing.get(name)
    return "-" if value is None else f"{1e3 * value:.1f}"


def main() -> int:
    cli = CommandLine(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cli.add_argument("--rollouts", type=Number(int, COUNT), default=50)
    cli.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    args = cli.parse_args()
    if MISSING and not WITHOUT_ROS1.issuperset(args.ways):
        print(f"error: {WHY_NOT}", file=sys.stderr)
        return 2
    facts = Records().facts
    found: dict[str, Any] = {"seeds_from": FIRST_SEED, "ways": {}}
    if OUTPUT.exists():
        found["ways"] = json.loads(OUTPUT.read_text(encoding="utf-8"))["ways"]
    for name in args.ways:
        with tempfile.TemporaryDirectory() as folder:
            began_s = time.monotonic()
            path = WAYS[name](args.rollouts, Path(folder))
            took_s = time.monotonic() - began_s
            found["ways"][name] = {"facts": facts, **summary(path, took_s)}
        write_record(OUTPUT, found)
        print(table(found["ways"]), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
