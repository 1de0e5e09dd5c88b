"""Who keeps time, and how well: ``python -m bench.pacing.measure --hz 50 --load loaded``.

The ways take turns, one block each, on the same core, under the same load. Figures, the picture
and what ``bench.sample_files`` keeps of the samples lie in ``bench/results/jitter.*``; ``--add``
adds to the samples that are there, so that a long measurement can be done in pieces.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import numpy as np

from bench.pacing.block import run_block
from bench.pacing.load import LOADS, load
from bench.pacing.picture import draw
from bench.pacing.ways import PRIVILEGED, UNPRIVILEGED, WAYS
from bench.records import Records
from bench.sample_files import FINE
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT, DURATION_S, RATE_HZ

STEM = "jitter"
RATES = (50, 200, 500)
SETS = {"privileged": PRIVILEGED, "unprivileged": UNPRIVILEGED, "all": tuple(WAYS)}


def group_of(hz: int, load_name: str) -> str:
    return f"lateness {hz} Hz {load_name}"


def core() -> int:
    """The last one this process may use: interrupts prefer the first."""
    return max(os.sched_getaffinity(0))


def measure(
    records: Records,
    hz: int,
    load_name: str,
    *,
    ways: Sequence[str] = tuple(WAYS),
    block_s: float,
    rounds: int = 1,
    under_load: bool = False,
) -> None:
    """Add one cell's samples to ``records``, in µs, and drift and missed ticks as values.

    Args:
        under_load: The load is there already.
    """
    if not under_load:
        with load(load_name):
            measure(
                records, hz, load_name, ways=ways, block_s=block_s, rounds=rounds, under_load=True
            )
        return
    group = group_of(hz, load_name)
    samples: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in ways:
            if WAYS[name].kind == "cyclictest" and shutil.which("cyclictest") is None:
                records.absent[f"{group}/{name}"] = "cyclictest is not installed (rt-tests)"
                continue
            try:
                block = run_block(WAYS[name], hz, block_s, core())
            except (RuntimeError, OSError) as error:
                records.absent[f"{group}/{name}"] = str(error)
                continue
            samples[name].append(block.lateness_us)
            drift, missed = f"{group}/{name}: drift, ticks", f"{group}/{name}: missed ticks"
            if WAYS[name].kind != "cyclictest":
                records.values[drift] = records.values.get(drift, 0.0) + block.drift_ticks
            if WAYS[name].kind == "ours":
                records.values[missed] = records.values.get(missed, 0.0) + block.missed_ticks
            if block.refused:
                records.facts[f"not had by {name}"] = block.refused
    held = {name: np.concatenate(blocks) for name, blocks in samples.items() if blocks}
    for name, values in held.items():
        key = f"{group}/{name}"
        if key in records.samples:
            held[name] = np.concatenate([records.samples[key], values])
    records.add(group, held)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = CommandLine(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--hz", type=Number(int, RATE_HZ), nargs="+", default=[50], help="ticks per second"
    )
    parser.add_argument("--load", choices=LOADS, nargs="+", default=list(LOADS))
    parser.add_argument("--ways", choices=SETS, default="all")
    parser.add_argument(
        "--block_s", type=Number(float, DURATION_S), default=60.0, help="seconds per block"
    )
    parser.add_argument("--rounds", type=Number(int, COUNT), default=4, help="blocks per way")
    parser.add_argument("--add", action="store_true", help="add to the samples that are there")
    args = parser.parse_args(arguments)
    records = Records()
    if args.add:
        records.load(STEM)
    for load_name in args.load:
        with load(load_name):
            for hz in args.hz:
                measure(
                    records,
                    hz,
                    load_name,
                    ways=SETS[args.ways],
                    block_s=args.block_s,
                    rounds=args.rounds,
                    under_load=True,
                )
                records.save(STEM, group_of(hz, load_name), growth=FINE)
                print(records.table(group_of(hz, load_name)), end="\n\n")
    for name, value in records.values.items():
        print(f"{name}: {value:.4g}")
    draw(records)


if __name__ == "__main__":
    main()
