"""Evaluate a policy in simulation: ``eval_sim.py``.

Writes ``<output_dir>/<env>/<task>.json`` after every episode; videos and raw samples lie beside it.
Exit status: 0 done, 1 the server was lost or a process died (the finished episodes are kept), 2 bad
input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from envs.config import EnvConfig
from envs.errors import EnvError
from envs.factory import GYM_PREFIX, load_env_config
from policies.command_line import CommandLine, Number
from policies.execution import Execution
from policies.number_ranges import COUNT, COUNT_OR_NONE, PROCESSES, SEED
from policies.standard_streams import run_command
from policies.types import PolicyContract, PolicyInfo
from policies.yaml_config import ConfigError
from runtime.errors import RuntimeFault
from runtime.eval_sim.runner import Plan, Setting, run
from runtime.eval_sim.worker_processes import WorkerFailed
from runtime.evaluation.episode_result import Episode
from runtime.evaluation.plots import write_timing_plot
from runtime.evaluation.results import (
    policy_record,
    report,
    result_path,
    summarize,
    versions,
    write_result,
)
from runtime.options import connection as connection_options
from runtime.options import execution as strategy_options
from runtime.options.checkpoint import CheckpointOptions, add_flags, from_flags
from runtime.options.model import ServerAddress, read_model_name
from runtime.options.overrides import read_overrides
from runtime.trace import recorder as trace
from runtime.trace.buffer import TraceError
from transport.zeromq.malloc import keep_freed_memory

BAD_INPUT, LOST, INTERRUPTED = 2, 1, 130


def parser() -> argparse.ArgumentParser:
    cli = CommandLine(
        prog="eval_sim.py",
        description="Evaluate a policy in simulation.",
        epilog="--env.KEY VALUE overrides KEY of the environment's configuration.",
    )
    add = cli.add_argument
    add(
        "-m",
        "--model_name_or_path",
        default="127.0.0.1:5000",
        help="checkpoint, HOST:PORT or python:MODULE:FACTORY (127.0.0.1:5000)",
    )
    add("-e", "--env", default="aloha", help="name under configs/env, a YAML, or gym:ID (aloha)")
    add("-n", "--num_rollout", type=Number(int, COUNT), default=4, help="episodes (4)")
    add(
        "-bs",
        "--batch_size",
        "--num_envs",
        dest="num_envs",
        type=Number(int, PROCESSES),
        default=1,
        help="processes side by side (1)",
    )
    add("-o", "--output_dir", default="results", help="(results)")
    add(
        "-s",
        "--seed",
        type=Number(int, SEED),
        default=0,
        help="of the first episode; the next has one more (0)",
    )
    add("--realtime", action="store_true", help="by the wall clock, not in lockstep")
    connection_options.add_flags(cli)
    strategy_options.add_flags(cli)
    add(
        "--videos",
        type=Number(int, COUNT_OR_NONE),
        default=10,
        help="record this many of the first episodes (10)",
    )
    add(
        "--camera_map",
        nargs="+",
        default=[],
        metavar="POLICY=WORLD",
        help="which camera of the world the policy's camera is",
    )
    add("--use_spawn", action="store_true", help="accepted; processes are always spawned")
    add("--trace", type=Path, metavar="FILE", help="what happened when, for ui.perfetto.dev")
    add_flags(cli)
    add("--log_level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    return cli


def read_plan(argv: Sequence[str] | None) -> tuple[Plan, argparse.Namespace]:
    """What the command line asks for.

    Raises:
        ConfigError, RuntimeFault, EnvError, ValueError: It asks for what cannot be.
    """
    args, rest = parser().parse_known_args(argv)
    overrides = read_overrides(rest, "env", "eval_sim.py")
    mapped: dict[str, str] = {}
    for pair in args.camera_map:
        policy_name, equals, world_name = pair.partition("=")
        if not equals:
            raise ValueError(f"--camera_map: got {pair!r}, expected POLICY=WORLD")
        if policy_name in mapped:
            raise ValueError(f"--camera_map: got {policy_name!r} twice, expected it once")
        mapped[policy_name] = world_name
    SEED.require("--seed with --num_rollout", args.seed + args.num_rollout - 1)
    if args.realtime and args.num_envs > 1:
        raise ValueError(
            "--realtime with --num_envs > 1: one world by the wall clock at a time on one machine"
        )
    env = load_env_config(args.env, overrides)
    # Not as overrides: a dot in a camera's name is none between keys.
    env = dataclasses.replace(env, camera_map={**env.camera_map, **mapped})
    path = _result_path(args, env)
    plan = Plan(
        model=read_model_name(args.model_name_or_path),
        # The rate is applied to the contract here, wherever the policy is.
        checkpoint=dataclasses.replace(from_flags(args), fps=None),
        options=connection_options.from_flags(args),
        env=env,
        seeds=tuple(range(args.seed, args.seed + args.num_rollout)),
        num_envs=args.num_envs,
        realtime=args.realtime,
        action_manager=args.action_manager,
        manager_coef=args.manager_coef,
        n_action_steps=args.n_action_steps,
        camera_names=tuple(mapped),
        fps=args.fps,
        video_dir=path.parent / "video" / path.stem,
        videos=args.videos,
        trace=args.trace,
    )
    return plan, args


def _result_path(args: argparse.Namespace, env: EnvConfig) -> Path:
    world = args.env if args.env.startswith(GYM_PREFIX) else Path(args.env).stem
    return result_path(args.output_dir, world, env.task)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation. Returns the exit status."""
    try:
        plan, args = read_plan(argv)
        path = _result_path(args, plan.env)
        _must_be_writable(path.parent)
    except (ConfigError, EnvError, RuntimeFault, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    keep_freed_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    logging.basicConfig(level=args.log_level, format="%(levelname)s %(name)s: %(message)s")
    try:
        with trace.tracing(args.trace, "eval_sim"):
            status = _evaluate(plan, path)
    except TraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if args.trace is not None:
        print(f"trace        {args.trace}")
    return status


def _evaluate(plan: Plan, path: Path) -> int:
    if isinstance(plan.model, ServerAddress) and plan.checkpoint != CheckpointOptions():
        print(
            f"note: {', '.join(plan.checkpoint.given())}: ignored; they are for the server at "
            f"{plan.model}, which loads the checkpoint",
            file=sys.stderr,
        )
    episodes: list[Episode] = []
    setting: Setting | None = None
    failure, status = "", 0
    bar = tqdm(total=len(plan.seeds), unit="episode", desc=plan.env.task)
    try:
        for item in run(plan):
            if isinstance(item, Setting):
                setting = item
                for line in _say_before(setting):
                    bar.write(line, file=sys.stderr)
                continue
            episodes.append(item)
            bar.update()
            bar.set_postfix_str(f"{sum(e.success for e in episodes)} of {len(episodes)} succeeded")
            _save(path, plan, setting, episodes, "")
    except WorkerFailed as error:
        failure, status = str(error), BAD_INPUT if error.bad_input else LOST
    except RuntimeFault as error:
        failure, status = str(error), BAD_INPUT
    except OSError as error:
        failure, status = f"the result cannot be written: {error}", LOST
    except KeyboardInterrupt:
        failure, status = "interrupted", INTERRUPTED
    finally:
        bar.close()
    if episodes:
        try:
            _conclude(path, plan, setting, episodes, failure)
        except OSError as error:
            failure, status = failure or f"the result cannot be written: {error}", status or LOST
        except KeyboardInterrupt:
            failure, status = "interrupted", INTERRUPTED
    if failure:
        kept = f"; {len(episodes)} of {len(plan.seeds)} episodes were finished and kept"
        print(f"error: {failure}{kept if status != BAD_INPUT else ''}", file=sys.stderr)
    return status


def _say_before(setting: Setting) -> list[str]:
    contract = PolicyContract.from_json(setting.contract_json)
    execution = Execution(**setting.execution)
    return strategy_options.say_before(contract, execution, setting.assumed)


def _must_be_writable(folder: Path) -> None:
    """Find out before the first episode rather than after it. Raises ``ValueError``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"room for at least this")
            probe.flush()
    except OSError as error:
        raise ValueError(f"--output_dir: {folder} cannot be written: {error}") from error


def _conclude(
    path: Path, plan: Plan, setting: Setting | None, episodes: Sequence[Episode], failure: str
) -> None:
    print(report(_save(path, plan, setting, episodes, failure)))
    print(f"result       {path}")
    picture = path.with_name(f"{path.stem}_timing.png")
    write_timing_plot(picture, episodes, f"{plan.env.task}, {len(episodes)} episodes")
    print(f"timing       {picture}")
    if plan.video_dir is not None and plan.videos:
        print(f"videos       {plan.video_dir}/")


def _save(
    path: Path, plan: Plan, setting: Setting | None, episodes: Sequence[Episode], failure: str
) -> dict[str, Any]:
    result = summarize(episodes)
    if setting is not None:
        contract = PolicyContract.from_json(setting.contract_json)
        execution = Execution(**setting.execution)
        result |= {
            "action_manager": strategy_options.record(contract, execution),
            "assumed": list(setting.assumed),
            "transport": setting.transport,
            "transport_reason": setting.transport_reason,
            "pictures": setting.pictures,
            "deterministic": setting.deterministic,
            "policy": policy_record(contract, PolicyInfo(**setting.policy_info)),
            "world": setting.world,
        }
    result |= {
        "requested": len(plan.seeds),
        "failure": failure,
        "mode": "realtime" if plan.realtime else "lockstep",
        "env": json.loads(json.dumps(dataclasses.asdict(plan.env), default=str)),
        "versions": versions(),
    }
    write_result(path, result, episodes)
    return result


if __name__ == "__main__":
    raise SystemExit(run_command(main))
