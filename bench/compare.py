"""Contestants of your choice, side by side, in a few seconds.

python -m bench.compare --payload 1 --only "floor,shm spin,shm block,pyzmq tcp"
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import numpy as np

from bench.contest import contest
from bench.contestant import HOMES, Absent, check, payloads_of
from bench.payload import PAYLOADS


def main(arguments: Sequence[str] | None = None) -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--payload", choices=tuple(PAYLOADS), default="1", help="images, or 64B")
    cli.add_argument(
        "--only", help=f"of {', '.join(HOMES)}; all that take the payload if not given"
    )
    cli.add_argument("--blocks", type=_count, default=20)
    cli.add_argument("--block", type=_count, default=200, help="exchanges per block, at most")
    cli.add_argument("--block_s", type=_seconds, default=0.1, help="seconds per block, at most")
    cli.add_argument("--no_gc", action="store_true", help="collector off on both sides")
    args = cli.parse_args(arguments)
    names = [name for name in HOMES if args.payload in payloads_of(name)]
    if args.only is not None:
        # Hyphens are spared the quotes a shell wants around a space.
        names = list(dict.fromkeys(_named(each) for each in args.only.split(",")))
    try:
        for name in names:
            check(name, args.payload)
    except ValueError as error:
        cli.error(f"{error}")
    try:
        with contest(names, args.payload, gc_on=not args.no_gc) as opened:
            samples = opened.rounds(blocks=args.blocks, block=args.block, block_s=args.block_s)
    except Absent as error:
        cli.error(str(error))
    if samples:
        first = next(iter(samples))
        base = np.median(samples[first])
        print(f"µs, payload {args.payload}, {args.blocks} blocks; ratio of medians to {first}")
        print(f"{'':24}{'p50':>9}{'p99':>9}{'p99.9':>9}{'max':>9}{'count':>8}{'ratio':>8}")
    for name, values in samples.items():
        p50, p99, p999 = np.percentile(values, (50, 99, 99.9))
        print(
            f"{name:24}{p50:9.1f}{p99:9.1f}{p999:9.1f}{values.max():9.1f}"
            f"{values.size:8}{p50 / base:8.3f}"
        )
    for name, reason in opened.absent.items():
        print(f"{name:24}absent: {reason}")
    if not samples:
        sys.exit(1)


def _named(text: str) -> str:
    matches = [name for name in HOMES if name.replace(" ", "-") == text.strip()]
    return matches[0] if matches else text.strip()


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number of seconds")
    return seconds


if __name__ == "__main__":
    main()
