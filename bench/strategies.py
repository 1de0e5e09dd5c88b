"""How chunks are played, and what it does to success: one row per strategy, the same seeds.

    python bench/strategies.py --num_rollout 100 --num_envs 2

Prints a Markdown table and writes ``bench/results/strategies_<task>.json``: a summary a row,
without the single episodes, which the same seeds give again.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record_files import write_record
from envs.factory import load_env_config
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT, PROCESSES
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.eval_sim.runner import run
from runtime.evaluation.episode_result import Episode
from runtime.evaluation.results import summarize, versions
from runtime.options.defaults import DEFAULT_CHECKPOINT

STRATEGIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sequential, 100 steps", {"action_manager": "sequential", "n_action_steps": 100}),
    ("sequential, 50 steps", {"action_manager": "sequential", "n_action_steps": 50}),
    ("sequential, 25 steps", {"action_manager": "sequential", "n_action_steps": 25}),
    ("sequential, 10 steps", {"action_manager": "sequential", "n_action_steps": 10}),
    ("temporal_ensemble, m = 0.01", {"action_manager": "temporal_ensemble", "manager_coef": 0.01}),
    ("temporal_ensemble, m = 0.1", {"action_manager": "temporal_ensemble", "manager_coef": 0.1}),
    ("latest, every tick", {"action_manager": "latest"}),
)
FIRST_SEED = 20_000


def main() -> None:
    cli = CommandLine(description=__doc__.splitlines()[0])
    cli.add_argument("-m", "--model_name_or_path", default=DEFAULT_CHECKPOINT)
    cli.add_argument("--task", default="sim_transfer_cube")
    cli.add_argument("-n", "--num_rollout", type=Number(int, COUNT), default=100)
    cli.add_argument("--num_envs", type=Number(int, PROCESSES), default=2)
    args = cli.parse_args()
    config = EvalSimConfig(
        model_name_or_path=args.model_name_or_path,
        env=load_env_config("aloha", {"task": args.task}),
        seed=FIRST_SEED,
        num_rollout=args.num_rollout,
        num_envs=args.num_envs,
        videos=0,
    )
    rows: list[dict[str, Any]] = []
    print("| strategy | success | 95 % interval | action age p50 | p99 | largest seam (rad) |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, options in STRATEGIES:
        reports = run(dataclasses.replace(config, **options))
        episodes = [report for report in reports if isinstance(report, Episode)]
        result = summarize(episodes)
        timing, (low, high) = result["timing"], result["wilson_95"]
        age = timing["action_age"]
        print(
            f"| {name} | {result['total_success']}/{result['total']} "
            f"| {100 * low:.1f} to {100 * high:.1f} % "
            f"| {age['p50']:.2f} s | {age['p99']:.2f} s | {timing['seam_jump']:.3f} |",
            flush=True,
        )
        del result["episodes"]
        rows.append({"strategy": name, **options, **result})
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"strategies_{args.task}.json"
    record = {
        "seeds": [config.seeds[0], config.seeds[-1]],
        "cpu": platform.processor(),
        "rows": rows,
    }
    write_record(path, {**record, "versions": versions()})
    print(f"\n{path}", file=sys.stderr)


if __name__ == "__main__":
    main()
