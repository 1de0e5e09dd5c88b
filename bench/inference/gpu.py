"""The same contest on a GPU: ``python -m bench.inference.gpu``, from ``bench/gpu.sh``.

Ours as a captured graph in each precision, against the plain module in eager torch and compiled,
from pictures in the host's memory to actions in it. Writes ``bench/results/GPU.json`` with the
samples in it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch

from bench.inference.arena import LIMITS, Comparison, compare
from bench.inference.contestants import CONTESTANTS, LEROBOT, PLAIN
from bench.inference.nets import NETS, checkpoint_of, load, observations
from bench.inference.report import RESULTS, goals, record, table
from policies.act.engine import EngineOptions, Frames
from policies.command_line import CommandLine, Number
from policies.errors import PolicyError
from policies.number_ranges import COUNT, DURATION_S

NO_GPU = 3
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
BATCH_CALLS = 200
H200_GOALS_MS = {("full, 1 camera", 50.0): 0.6, ("full, 1 camera", 99.0): 0.7}
H200_GOALS_MS[("full, 4 cameras", 50.0)] = 1.0


def main() -> int:
    cli = CommandLine(description=__doc__.splitlines()[0] if __doc__ else None)
    cli.add_argument(
        "--seconds",
        type=Number(float, DURATION_S),
        default=40.0,
        help="per network, starts not counted",
    )
    cli.add_argument("--calls", type=Number(int, COUNT), default=500)
    cli.add_argument("--tests", default="not run", help="what the CUDA tests said")
    args = cli.parse_args()
    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none", file=sys.stderr)
        return NO_GPU
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    names = [PLAIN, LEROBOT, *(n for n in CONTESTANTS if "compile" in n or "cuda-graph" in n)]
    names = [n for n in names if n not in LIMITS]
    threads = min(4, len(os.sched_getaffinity(0)))
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for net in NETS:
        result = compare(
            net,
            names,
            threads=threads,
            calls=args.calls,
            budget_s=args.seconds,
            device="cuda",
        )
        for line in (*table(result), *goals(result), *_against_h200(result)):
            print(line, flush=True)
        found[net] = {**record(result), "samples_us": _samples_us(result)}
        found[net]["batches"] = _batches(net)
        wrong += _wrong(result)
    path = RESULTS / f"{_slug(name)}.json"
    RESULTS.mkdir(exist_ok=True)
    facts = {"gpu": name, "driver": _driver(), "cuda": torch.version.cuda, "tests": args.tests}
    path.write_text(json.dumps({**facts, "nets": found}, indent=1) + "\n", encoding="utf-8")
    print(path)
    for line in wrong:
        print(f"other actions than the plain module's: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _against_h200(result: Comparison) -> list[str]:
    ours = [e for e in result.entries.values() if e.contestant.side == "ours"]
    if not ours:
        return ["  graph replay: not measurable here: no engine of ours ran"]
    best = min(ours, key=lambda entry: entry.percentile_s(50))
    return [
        f"  {best.contestant.name} p{percent:g}: {1e3 * best.percentile_s(percent):.3f} ms "
        f"(goal on an H200 {goal_ms:g})"
        for (net, percent), goal_ms in H200_GOALS_MS.items()
        if net == result.net
    ]


def _batches(net: str) -> dict[str, dict[str, float]]:
    """Median seconds of a batch, by precision and size; the reason where there is none."""
    from policies.act.engine_selection import make_engine

    with checkpoint_of(net) as folder:
        weights = load(folder)
    images, state = observations(weights.config)[0]
    frames = Frames(list(images), state)
    found: dict[str, dict[str, float]] = {}
    for precision in ("bf16", "fp32", "fp16"):
        options = EngineOptions(device="cuda", engine="cuda-graph", precision=precision)
        try:
            engine = make_engine(weights, options)
        except PolicyError as error:
            print(f"  batches in {precision}: not measurable here: {error}")
            continue
        found[precision] = {}
        for size in engine.sizes:
            samples_s = []
            for _ in range(BATCH_CALLS):
                began_s = time.perf_counter()
                engine.run([frames] * size)
                samples_s.append(time.perf_counter() - began_s)
            found[precision][str(size)] = float(np.median(samples_s[BATCH_CALLS // 10 :]))
        said = ", ".join(f"{n}: {1e3 * s:.3f}" for n, s in found[precision].items())
        print(f"  batches in {precision}, ms: {said}", flush=True)
        engine.close()
    return found


def _samples_us(result: Comparison) -> dict[str, list[float]]:
    return {
        name: [round(1e6 * s, 1) for s in entry.samples_s] for name, entry in result.entries.items()
    }


def _wrong(result: Comparison) -> list[str]:
    """Ours only: what torch's default does to float32 convolutions on a GPU is the peers' own."""
    return [
        f"{result.net}: {name}: {entry.error:.1e}"
        for name, entry in result.entries.items()
        if entry.contestant.side == "ours"
        and not entry.error <= TOLERANCES[entry.contestant.precision]
    ]


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    raise SystemExit(main())
