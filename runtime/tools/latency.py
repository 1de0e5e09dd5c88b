"""``metronome latency``: what latency does to a policy, over latencies and execution strategies.

Each point is one evaluation in lockstep under the latency dial, with the same seeds, in a folder of
its own. A point whose result is complete and matches is not run again, so the command can be
interrupted and repeated. Exit status: that of the evaluation that failed; 2 for bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from envs.errors import EnvError
from policies.command_line import CommandLine
from policies.execution import check_strategy
from policies.flag_builder import Flag, add_flags, from_flags
from policies.number_ranges import COUNT, LATENCY_MS, PROCESSES, SEED
from policies.standard_streams import run_command
from policies.yaml_config import InvalidConfig, as_plain
from runtime.control.strategy_selection import ENSEMBLE
from runtime.errors import ComparisonError, RuntimeFault
from runtime.eval_sim import cli as eval_sim
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.evaluation.latency_curves import (
    LatencyCurve,
    LatencyPoint,
    as_json,
    format_table,
    read_point,
)
from runtime.evaluation.results import write_atomically

BAD_INPUT = 2
UNCOMPARED = (
    *("num_envs", "output_dir", "log_level", "trace"),
    *("resume", "retries", "episode_timeout_s", "live_view"),
)
"""Fields of a point's configuration that do not change its result."""
MODEL_FILE = "model.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyCommand:
    """The arguments of ``metronome latency``."""

    model_name_or_path: Annotated[str, Flag("as eval-sim's", "-m")]
    env: Annotated[str, Flag("as eval-sim's", "-e")] = "aloha"
    latencies_ms: Annotated[
        tuple[Annotated[float, LATENCY_MS], ...],
        Flag("latencies of the dial, in ms", default="0 50 100 200 400"),
    ] = (0.0, 50.0, 100.0, 200.0, 400.0)
    strategies: Annotated[
        tuple[str, ...],
        Flag(
            "strategies, each with its ticks from one chunk to the next (without: every tick for "
            "temporal_ensemble, else as eval-sim); run in this order",
            metavar="NAME[:STRIDE]",
            default="sequential align_fade temporal_ensemble:5 temporal_ensemble",
        ),
    ] = ("sequential", "align_fade", "temporal_ensemble:5", "temporal_ensemble")
    num_rollout: Annotated[int, COUNT, Flag("episodes of each point", "-n")] = 100
    seed: Annotated[int, SEED, Flag("seed of each point's first episode", "-s")] = 0
    num_envs: Annotated[
        int | None, PROCESSES, Flag("worker processes", "-bs", default="one per core")
    ] = None
    output_dir: Annotated[Path, Flag("folder of the points, kept for the next call", "-o")] = Path(
        "results/latency"
    )
    json: Annotated[Path | None, Flag("write all numbers as JSON")] = None
    plot: Annotated[Path | None, Flag("write the curves as a picture")] = None

    def __post_init__(self) -> None:
        for strategy in self.strategies:
            name, stride = split_strategy(strategy)
            check_strategy(name, None)
            if stride is not None and not (stride.isdecimal() and int(stride) > 0):
                raise ValueError(
                    f"--strategies: got {strategy!r}, expected NAME or NAME:STRIDE, STRIDE in ticks"
                )


def split_strategy(strategy: str) -> tuple[str, str | None]:
    """Return name and stride of ``NAME[:STRIDE]``; None without a stride."""
    name, colon, stride = strategy.partition(":")
    return name, stride if colon else None


@dataclass(frozen=True, slots=True)
class PointRun:
    """One point that is run or read.

    Attributes:
        strategy, latency_ms: As given.
        argv: The arguments of the evaluation.
        config: What they mean.
    """

    strategy: str
    latency_ms: float
    argv: tuple[str, ...]
    config: EvalSimConfig

    @property
    def is_done(self) -> bool:
        """Whether a complete result of the same configuration is there."""
        try:
            result = json.loads(self.config.path.read_text())
            complete = result["failure"] == "" and result["total"] == self.config.num_rollout
            return complete and _compared(result["config"]) == _compared(as_plain(self.config))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False  # none, or no result file

    def __str__(self) -> str:
        return f"{self.strategy} at {self.latency_ms:g} ms"


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(config))
    return {name: value for name, value in plain.items() if name not in UNCOMPARED}


def parser() -> argparse.ArgumentParser:
    """Return the parser, with one argument per flag of ``LatencyCommand``."""
    cli = CommandLine(
        prog="metronome latency",
        description="Measure what latency does to a policy, in simulation.",
        epilog="--env.KEY VALUE overrides KEY of the environment's configuration.",
    )
    add_flags(cli, LatencyCommand)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing points, then print the table; return the exit status."""
    try:
        args, rest = parser().parse_known_args(argv)
        command = from_flags(LatencyCommand, args)
        points = [_point_run(command, *pair, rest) for pair in _pairs(command)]
        _check_model(command)
        for point in points:
            status = _run(point)
            if status:
                return status
        curves = _curves(command, points)
        _write(command, curves, points[0].config.env.task)
    except (ComparisonError, InvalidConfig, EnvError, RuntimeFault, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return BAD_INPUT
    print(format_table(curves))
    return 0


def _pairs(command: LatencyCommand) -> Iterator[tuple[str, float]]:
    for strategy in dict.fromkeys(command.strategies):
        for latency_ms in sorted(set(command.latencies_ms)):
            yield strategy, latency_ms


def _point_run(
    command: LatencyCommand, strategy: str, latency_ms: float, overrides: Sequence[str]
) -> PointRun:
    name, stride = split_strategy(strategy)
    processes = command.num_envs or len(os.sched_getaffinity(0))
    folder = command.output_dir / f"{strategy.replace(':', '_every_')}_{latency_ms:g}ms"
    flags = {
        "--model_name_or_path": command.model_name_or_path,
        "--env": command.env,
        "--num_rollout": command.num_rollout,
        "--seed": command.seed,
        "--num_envs": min(processes, command.num_rollout),
        "--output_dir": folder,
        "--videos": 0,
        "--latency_ms": latency_ms,
        "--action_manager": name,
    }
    if name == ENSEMBLE:  # whatever the checkpoint recommends
        flags["--ensemble_stride"] = stride or 1
    elif stride is not None:
        flags["--n_action_steps"] = stride
    argv = (*(str(word) for pair in flags.items() for word in pair), *overrides)
    return PointRun(strategy, latency_ms, argv, eval_sim.read_config(argv))


def _check_model(command: LatencyCommand) -> None:
    """Keep the checkpoint's hash in the folder, or raise ``ValueError`` if it has another one's."""
    path, digest = command.output_dir / MODEL_FILE, _digest(Path(command.model_name_or_path))
    now = {"model_name_or_path": command.model_name_or_path, "sha256": digest}
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["sha256"] != digest:
            raise ValueError(
                f"--output_dir: {command.output_dir} has points of another checkpoint, "
                f"{kept['model_name_or_path']} with SHA-256 {kept['sha256']:.12}, expected that of "
                f"{digest:.12}, or an empty folder"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(now, indent=2).encode())


def _digest(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint folder's files; of nothing if it is no folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file():
            total.update(f"{path.relative_to(folder)}\n".encode())
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _run(point: PointRun) -> int:
    if point.is_done:
        print(f"{point}: kept", file=sys.stderr)
        return 0
    print(f"{point}: running", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        return eval_sim.main(point.argv)


def _curves(command: LatencyCommand, points: Sequence[PointRun]) -> list[LatencyCurve]:
    read: dict[str, list[LatencyPoint]] = {strategy: [] for strategy in command.strategies}
    for point in points:
        found = read_point(point.config.path, point.strategy, point.latency_ms)
        read[point.strategy].append(found)
    return [LatencyCurve.of(curve) for curve in read.values()]


def _write(command: LatencyCommand, curves: Sequence[LatencyCurve], task: str) -> None:
    if command.json is not None:
        content = {"task": task, "seed": command.seed, "curves": as_json(curves)}
        write_atomically(command.json, json.dumps(content, indent=2).encode())
    if command.plot is not None:
        from runtime.evaluation.plots import write_latency_plot

        title = f"{task}, {command.num_rollout} episodes a point"
        write_latency_plot(command.plot, curves, title)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
