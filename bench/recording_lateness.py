"""How late a robot's commands are while a dataset or a live view is recorded, ÷ without.

    python -m bench.recording_lateness

``eval_real -c sim_twin`` with the shipped policy at its rate, SCHED_FIFO, in turns: as it is, with
``--rerun FILE.rrd`` and with ``--dataset DIR``; each round begins with another one. A rollout that
passes the cube goes on. Lateness is from the deadline to the moment the command was sent, of every
tick. The ``.rrd``, read back, must have every tick. Results land in
``bench/results/recording_lateness.json`` after each round.

Needs ``[rerun]``, ``[dataset]``, ``[sim]``, and the right to use SCHED_FIFO.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.record_files import write_record
from bench.records import RESULTS, Records
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT
from runtime.eval_real.recording import Recording
from runtime.options.defaults import DEFAULT_CHECKPOINT

ROOT = Path(__file__).parents[1]
OUTPUT = RESULTS / "recording_lateness.json"
ROBOT, TASK = "sim_twin", "sim_transfer_cube"
PLAIN, RERUN, DATASET = "as it is", "--rerun FILE.rrd", "--dataset DIR"
WAYS = (PLAIN, RERUN, DATASET)
ATTEMPTS = 3
NEVER = "1000"
"""A reward that the twin does not reach, so no rollout ends early."""
PERCENTILES = {"p50": 50, "p99": 99, "p99.9": 99.9, "max": 100}


class Way:
    """What one way gave so far.

    Attributes:
        rounds: Lateness of each round's ticks, in ms.
        missed: Ticks missed.
        unrecorded: Ticks of the recording that the ``.rrd`` or the dataset does not have.
        repeated: Rollouts that failed and were repeated, as where the machine stalls.
    """

    def __init__(self) -> None:
        self.rounds: list[NDArray[np.float64]] = []
        self.missed = self.unrecorded = self.repeated = 0

    def summary(self, plain: Way) -> dict[str, Any]:
        pooled = np.concatenate(self.rounds)
        ratios = [
            float(np.percentile(own, 99) / np.percentile(other, 99))
            for own, other in zip(self.rounds, plain.rounds, strict=True)
        ]
        base = np.percentile(np.concatenate(plain.rounds), 99)
        return {
            "ticks": pooled.size,
            "missed": self.missed,
            "unrecorded": self.unrecorded,
            "repeated": self.repeated,
            **{f"{n}_ms": float(np.percentile(pooled, q)) for n, q in PERCENTILES.items()},
            "p99_ratio": float(np.percentile(pooled, 99) / base),
            "p99_ratio_of_each_round": ratios,
        }


def run(name: str, ticks: int, priority: int, folder: Path) -> tuple[NDArray[np.float64], int, int]:
    """One rollout: the lateness in ms, the ticks missed, and those that are not recorded.

    Raises:
        RuntimeError: It failed.
    """
    flags = {RERUN: ["--rerun", str(folder / "run.rrd")], DATASET: ["--dataset", str(folder / "d")]}
    command = [
        sys.executable, "eval_real.py", "-m", DEFAULT_CHECKPOINT, "-c", ROBOT, "--task", TASK,
        "--yes", "--max_timesteps", str(ticks), "--robot.success_reward", NEVER,
        "--priority", str(priority), "--video_fps", "0", "-o", str(folder), *flags.get(name, []),
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    stem = folder / ROBOT / TASK / "rollout_000"
    if ended.returncode or not stem.with_suffix(".npz").exists():
        raise RuntimeError(f"{' '.join(command)}: {ended.stderr[-2000:]}")
    rows = Recording.load(stem).rows
    played = rows["played"] != 0
    timing = json.loads((folder / ROBOT / f"{TASK}.json").read_text(encoding="utf-8"))["timing"]
    lateness_ms = (rows["sent_ns"] - rows["deadline_ns"])[played] / 1e6
    unrecorded = 0
    if name == RERUN:
        unrecorded = _not_in_file(folder / "run.rrd", rows["sent_ns"])
    elif name == DATASET:
        info = json.loads((folder / "d" / "meta" / "info.json").read_text(encoding="utf-8"))
        unrecorded = len(lateness_ms) + timing["missed_ticks"] - info["total_frames"]
    return lateness_ms, timing["missed_ticks"], unrecorded


def add_round(way: Way, name: str, ticks: int, priority: int) -> None:
    """Raises ``RuntimeError``: every attempt failed."""
    for attempt in range(ATTEMPTS):
        with tempfile.TemporaryDirectory() as folder:
            try:
                lateness_ms, missed, unrecorded = run(name, ticks, priority, Path(folder))
                break
            except RuntimeError as error:
                if attempt == ATTEMPTS - 1:
                    raise
                print(f"repeated: {error}", file=sys.stderr)
                way.repeated += 1
    way.rounds.append(lateness_ms)
    way.missed += missed
    way.unrecorded += unrecorded


def _not_in_file(path: Path, sent_ns: NDArray[np.int64]) -> int:
    """How many of the commands the file does not have. It counts time from another zero."""
    from rerun.dataframe import load_recording

    recording = load_recording(str(path))
    (entity,) = {
        column.entity_path
        for column in recording.schema().component_columns()
        if column.entity_path.endswith("left_waist/commanded")
    }
    table = recording.view(index="time", contents=entity).select().read_all()
    times_ns = np.asarray(table["time"].cast("int64"))
    since_ns = sent_ns - sent_ns[0]
    zeros = times_ns[np.isin(times_ns + since_ns[1], times_ns)]
    missing = [int((~np.isin(since_ns + zero, times_ns)).sum()) for zero in zeros]
    return min(missing, default=len(sent_ns))


def table(ways: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| eval_real -c sim_twin | ticks | missed | not recorded | repeated | p50 | p99 | p99.9 "
        "| max lateness (ms) | p99 ÷ as it is | in each round |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, way in ways.items():
        figures = " | ".join(f"{way[f'{each}_ms']:.3f}" for each in PERCENTILES)
        ratios = way["p99_ratio_of_each_round"]
        lines.append(
            f"| {name} | {way['ticks']} | {way['missed']} | {way['unrecorded']} "
            f"| {way['repeated']} | {figures} | {way['p99_ratio']:.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    cli = CommandLine(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cli.add_argument("--ticks", type=Number(int, COUNT), default=10_000, help="of each way")
    cli.add_argument("--rounds", type=Number(int, COUNT), default=5)
    cli.add_argument("--priority", type=Number(int, COUNT), default=10, help="of SCHED_FIFO")
    args = cli.parse_args()
    found = {name: Way() for name in WAYS}
    for turn in range(args.rounds):
        for name in (*WAYS[turn % len(WAYS) :], *WAYS[: turn % len(WAYS)]):
            add_round(found[name], name, -(-args.ticks // args.rounds), args.priority)
        ways = {name: way.summary(found[PLAIN]) for name, way in found.items()}
        write_record(OUTPUT, {"facts": Records().facts, "rounds": turn + 1, "ways": ways})
        print(table(ways), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
