"""Contestants of your choice, side by side, in a few seconds.

python -m bench.compare --payload 1 --only "floor,shm spin,shm block,pyzmq tcp"
"""

from __future__ import annotations

import argparse

import numpy as np

from bench.contest import contest
from bench.contestant import HOMES
from bench.payload import PAYLOADS


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--payload", choices=tuple(PAYLOADS), default="1", help="images, or 64B")
    cli.add_argument("--only", default=",".join(HOMES), help=f"of {', '.join(HOMES)}")
    cli.add_argument("--blocks", type=int, default=20)
    cli.add_argument("--block", type=int, default=200, help="exchanges per block, at most")
    cli.add_argument("--block_s", type=float, default=0.1, help="seconds per block, at most")
    cli.add_argument("--no_gc", action="store_true", help="collector off on both sides")
    args = cli.parse_args()
    # Hyphens are spared the quotes a shell wants around a space.
    names = [_named(each) for each in args.only.split(",")]
    with contest(names, args.payload, gc_on=not args.no_gc) as opened:
        samples = opened.rounds(blocks=args.blocks, block=args.block, block_s=args.block_s)
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


def _named(text: str) -> str:
    matches = [name for name in HOMES if name.replace(" ", "-") == text]
    return matches[0] if matches else text


if __name__ == "__main__":
    main()
