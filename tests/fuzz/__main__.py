"""Fuzz the wire parsers: ``python -m tests.fuzz --runs 1000000 [TARGET ...]``.

Every target runs under libFuzzer in a process of its own, one after the other. An input that breaks
a promise, takes too long or too much memory is kept, its path is printed, and the status is not 0.
"""

# ruff: noqa: T201  a command line
from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.record_files import write_record
from tests.fuzz.targets import BROKEN, TARGETS

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).with_name("corpus")
RESULTS = ROOT / "bench" / "results" / "fuzz.json"
CRASHES = Path(tempfile.gettempdir()) / "metronome-fuzz"
CRASHED, BAD_INPUT = 1, 2
MAX_BYTES, MAX_STEPS_BYTES = 2048, 256
"""Length of an input; the second for targets that end after a few steps anyway."""
STEPPED = (
    "session",
    "segments",
    "handshake",
    "listener",
    "shm_acceptor",
    "dialer",
    "client_handshake",
)
_STAT = re.compile(r"^stat::(\w+):\s+(\d+)", re.MULTILINE)
_COVERED = re.compile(r"cov: (\d+)")
TAIL = 4000


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one target.

    Attributes:
        runs: Inputs that were tried.
        peak_rss_mb: Of the process, its imports among it.
        covered: Edges of our own bytecode that were seen.
        reached: How often which gate was passed.
        crashes: Files of the inputs that ended it.
    """

    target: str
    runs: int
    seconds: float
    peak_rss_mb: int
    covered: int
    reached: dict[str, int]
    crashes: list[str] = field(default_factory=list)
    said: str = ""


def fuzz(name: str, args: argparse.Namespace) -> Outcome:
    """Run one target to its end, or to its first violation."""
    kept = args.crashes / name
    kept.mkdir(parents=True, exist_ok=True)
    known = set(kept.iterdir())
    with tempfile.TemporaryDirectory() as work:
        tally, found = Path(work, "reached.json"), Path(work, "found")
        found.mkdir()
        flags = {
            "runs": args.runs,
            "seed": args.seed,
            "max_total_time": args.max_s,
            "timeout": args.timeout_s,
            "rss_limit_mb": args.max_rss_mb,
            "max_len": MAX_STEPS_BYTES if name in STEPPED else MAX_BYTES,
            "artifact_prefix": f"{kept}/",
            "print_final_stats": 1,
        }
        command = [sys.executable, "-m", "tests.fuzz.one", name, str(tally)]
        command += [f"-{flag}={value}" for flag, value in flags.items()]
        began_s = time.monotonic()
        done = subprocess.run(
            [*command, str(found), *([str(CORPUS / name)] if (CORPUS / name).is_dir() else [])],
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        seconds = time.monotonic() - began_s
        reached = json.loads(tally.read_text()) if tally.exists() else {}
    said = done.stdout + done.stderr
    stats = {key: int(value) for key, value in _STAT.findall(said)}
    crashes = sorted(str(path) for path in set(kept.iterdir()) - known)
    if done.returncode and not crashes:
        crashes = [f"exit status {done.returncode}"]
    return Outcome(
        name,
        stats.get("number_of_executed_units", 0),
        round(seconds, 1),
        stats.get("peak_rss_mb", 0),
        int((_COVERED.findall(said) or ["0"])[-1]),
        reached,
        crashes,
        _essence(said) if crashes else "",
    )


def _essence(said: str) -> str:
    """What libFuzzer and Python said, without the progress."""
    lines = (line for line in said.splitlines() if not line.startswith(("INFO:", "WARNING:", "#")))
    return "\n".join(lines)[-TAIL:]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    cli = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    cli.add_argument("targets", metavar="TARGET", nargs="*", help=", ".join(TARGETS))
    cli.add_argument("--runs", type=int, default=1_000_000, help="inputs per target")
    cli.add_argument("--seed", type=int, default=1, help="of libFuzzer, 1 or more")
    cli.add_argument("--max_rss_mb", type=int, default=1024)
    cli.add_argument("--timeout_s", type=int, default=5, help="for one input")
    cli.add_argument("--max_s", type=int, default=0, help="for each target; 0: as long as it takes")
    cli.add_argument("--results", type=Path, default=RESULTS, help="JSON")
    cli.add_argument("--crashes", type=Path, default=CRASHES, help="folder for what broke it")
    args = cli.parse_args(argv)
    unknown = [name for name in args.targets if name not in {**TARGETS, **BROKEN}]
    if unknown:
        print(f"error: got {unknown}, expected some of {list(TARGETS)}", file=sys.stderr)
        return BAD_INPUT
    outcomes = []
    row = "{:<12} {:>9} {:>8} {:>9} {:>6} {:>8}  {}"
    print(row.format("target", "runs", "seconds", "peak MB", "edges", "crashes", "reached"))
    for name in args.targets or TARGETS:
        one = fuzz(name, args)
        outcomes.append(one)
        gates = ", ".join(f"{gate} {count}" for gate, count in sorted(one.reached.items()))
        figures = (one.runs, one.seconds, one.peak_rss_mb, one.covered, len(one.crashes))
        print(row.format(name, *figures, gates), flush=True)
        for crash in one.crashes:
            print(f"{one.said}\n{name}: {crash}", flush=True)
    settings = {"seed": args.seed, "timeout_s": args.timeout_s, "max_rss_mb": args.max_rss_mb}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    rows = [{k: v for k, v in asdict(one).items() if k != "said"} for one in outcomes]
    write_record(args.results, {"settings": settings, "targets": rows})
    return CRASHED if any(one.crashes for one in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
