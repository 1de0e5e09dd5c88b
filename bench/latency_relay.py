"""The latency dial against a relay that really delays: success of the same seeds, and the delays.

    python bench/latency_relay.py -n 200

The relay (``tests/relay.py``) delays a TCP connection by half of ``--latency_ms`` each way; an
evaluation by the wall clock runs through it. The dial draws the same latency, by the wall clock and
in lockstep. Prints a Markdown table: each mode's success and its paired difference to the relay's,
and the delays from an observation until its answer could be used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs.factory import load_env_config
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT, LATENCY_MS, SEED
from runtime.eval_sim.latency_dial import LatencyDial
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.eval_sim.runner import run
from runtime.evaluation.episode_result import Episode
from runtime.evaluation.success_statistics import PairCounts, paired_difference_95
from runtime.latency_stats import Percentiles
from runtime.options.connection import ConnectionOptions
from runtime.options.defaults import DEFAULT_CHECKPOINT
from runtime.server.server_process import ServerProcess

RELAY = Path(__file__).resolve().parents[1] / "tests" / "relay.py"


@contextlib.contextmanager
def relayed(address: str, latency_ms: float, jitter_ms: float) -> Iterator[str]:
    """The address of a relay to ``address``, half of the latency each way."""
    argv = [sys.executable, str(RELAY), "--to", address]
    argv += ["--delay", str(latency_ms / 2), "--jitter", str(jitter_ms / 2)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as relay:
        assert relay.stdin is not None
        assert relay.stdout is not None
        try:
            yield f"127.0.0.1:{int(relay.stdout.readline())}"
        finally:
            relay.stdin.close()


def evaluate(config: EvalSimConfig) -> list[Episode]:
    """Run all episodes."""
    return [report for report in run(config) if isinstance(report, Episode)]


def row(mode: str, episodes: list[Episode], reference: list[Episode]) -> str:
    """A row of the table; ``reference`` are the relay's episodes."""
    won = [episode.success for episode in episodes]
    pairs = PairCounts.of([episode.success for episode in reference], won)
    low, high = paired_difference_95(pairs)
    delays = Percentiles.of(np.concatenate([episode.answer_delay_s for episode in episodes]))
    compared = f"{100 * pairs.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return (
        f"| {mode} | {sum(won)}/{len(won)} | {compared if episodes is not reference else '-'} "
        f"| {delays.in_ms()} | {sum(episode.missed_ticks for episode in episodes)} "
        f"| {sum(episode.executor.starved_ticks for episode in episodes)} |"
    )


def parser() -> CommandLine:
    cli = CommandLine(description=__doc__.splitlines()[0])
    cli.add_argument("-m", "--model_name_or_path", default=DEFAULT_CHECKPOINT)
    cli.add_argument("-e", "--env", default="aloha")
    cli.add_argument("--task", default="sim_transfer_cube")
    cli.add_argument("-n", "--num_rollout", type=Number(int, COUNT), default=200)
    cli.add_argument("-s", "--seed", type=Number(int, SEED), default=30_000)
    cli.add_argument("--latency_ms", type=Number(float, LATENCY_MS), default=100.0)
    cli.add_argument("--latency_jitter_ms", type=Number(float, LATENCY_MS), default=0.0)
    return cli


def main() -> None:
    args = parser().parse_args()
    dial = LatencyDial(args.latency_ms, args.latency_jitter_ms)
    print("| mode | success | difference to the relay, points (95 %) | delay | missed | starved |")
    print("|---|---|---|---|---|---|", flush=True)
    with ServerProcess(["-m", args.model_name_or_path]) as server:
        direct = EvalSimConfig(
            model_name_or_path=server.address,
            env=load_env_config(args.env, {"task": args.task}),
            seed=args.seed,
            num_rollout=args.num_rollout,
            videos=0,
            realtime=True,
            connection=ConnectionOptions("zmq"),
        )
        with relayed(server.address, args.latency_ms, args.latency_jitter_ms) as address:
            reference = evaluate(dataclasses.replace(direct, model_name_or_path=address))
        print(row("relay, by the wall clock", reference, reference), flush=True)
        dialled = dataclasses.replace(direct, latency=dial)
        for mode, realtime in (("dial, by the wall clock", True), ("dial, in lockstep", False)):
            episodes = evaluate(dataclasses.replace(dialled, realtime=realtime))
            print(row(mode, episodes, reference), flush=True)


if __name__ == "__main__":
    main()
