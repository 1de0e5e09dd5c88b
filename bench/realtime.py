"""The shipped checkpoints in simulation by the wall clock, served on this host and from another.

    python -m bench.realtime --episodes 100

``eval_sim.py --realtime`` with the seeds from 3,000,000 on and the execution that the checkpoint
recommends: with a policy server on this host, over shared memory; and with one on another host (a
network namespace), over ZMQ, through a relay that delays each way by 5 ± 2 ms. Results land in
``bench/results/realtime.json``, each run as soon as it is done; ``--tasks`` and ``--ways`` pick
some. Another host needs root.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from bench.record_files import write_record
from bench.records import RESULTS, Records
from bench.rollouts import relayed_server, run_command, summary, table
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT, SEED
from runtime.server.server_process import ServerProcess
from tests.hosts import other_host

CHECKPOINTS = {
    "sim_transfer_cube": "ckpt/act_sim_transfer_cube_scripted_zscore_example",
    "sim_insertion": "ckpt/act_sim_insertion_scripted_zscore_example",
}
OUTPUT = RESULTS / "realtime.json"


@contextmanager
def on_this_host(checkpoint: str) -> Iterator[str]:
    with ServerProcess(["-m", checkpoint]) as server:
        yield server.address


@contextmanager
def on_another_host(checkpoint: str) -> Iterator[str]:
    with other_host() as prefix, relayed_server(prefix, checkpoint) as address:
        yield address


WAYS: Mapping[str, Callable[[str], AbstractContextManager[str]]] = {
    "this host": on_this_host,
    "other host": on_another_host,
}


def evaluate(task: str, way: str, episodes: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, WAYS[way](CHECKPOINTS[task]) as address:
        began_s = time.monotonic()
        run_command(
            "eval_sim.py", "-m", address, "-e", "aloha", "--env.task", task, "--realtime",
            "-n", str(episodes), "--seed", str(seed), "--videos", "0", "-o", folder,
        )  # fmt: skip
        return summary(Path(folder) / "aloha" / f"{task}.json", time.monotonic() - began_s)


def main() -> int:
    cli = CommandLine(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cli.add_argument("--episodes", type=Number(int, COUNT), default=100)
    cli.add_argument("--seed", type=Number(int, SEED), default=3_000_000)
    cli.add_argument("--tasks", nargs="+", choices=tuple(CHECKPOINTS), default=list(CHECKPOINTS))
    cli.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    args = cli.parse_args()
    facts = Records().facts
    for task in args.tasks:
        for way in args.ways:
            row = {"facts": facts, "seeds_from": args.seed}
            row |= evaluate(task, way, args.episodes, args.seed)
            # Read late: another call may have measured the other rows meanwhile.
            rows = json.loads(OUTPUT.read_text(encoding="utf-8"))["rows"] if OUTPUT.exists() else {}
            rows[f"{task}, {way}"] = row
            write_record(OUTPUT, {"rows": rows})
            print(table(rows), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
