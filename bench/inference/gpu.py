"""The measurements on a GPU, in parts of at most ten minutes.

``python -m bench.inference.gpu PART``; ``bench/gpu.sh`` finds the interpreter and runs this. Every
step has processes of its own and a limit, and its result is in the file ``GPU.json`` when it ends,
so that whatever cuts a part loses the step in progress and no other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.inference.gpu_results import RESULTS, GpuResults
from bench.inference.steps import SUSPECT, Record, Step, run_step
from policies.command_line import CommandLine, Number
from policies.number_ranges import DURATION_S

NO_GPU, FAILED = 3, 1
CHECK, CONTEST, VARIANTS, SERVED = "check", "contest", "variants", "served"
ONE_CAMERA, FOUR_CAMERAS, SMALL = "full, 1 camera", "full, 4 cameras", "shipped"
NETS = (ONE_CAMERA, FOUR_CAMERAS)
FACTS = Step("facts", "bench.inference.gpu_check", "facts", 120.0)
RESTARTS = 3
"""Of the process of the variants, each without the one that ended it."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one command measures.

    Attributes:
        within_s: It ends by then.
    """

    name: str
    within_s: float
    purpose: str


PARTS = (
    Part(CHECK, 360.0, "does it work: versions, ceilings, CUDA tests, one replay, registration"),
    Part(CONTEST, 540.0, "ours against eager, compiled and LeRobot's: back to back and paced"),
    Part(VARIANTS, 480.0, "options of the engine of CUDA graphs, in turns in one process"),
    Part(SERVED, 360.0, "a server at 50 Hz over shared memory, hot swaps, a lost device"),
)


@dataclass(frozen=True, slots=True)
class Command:
    """The command line.

    Attributes:
        ends_s: When the part is over, monotonic.
        seconds: Of measuring, starts not counted.
        device: ``cuda``.
    """

    part: Part
    nets: tuple[str, ...]
    precision: str
    seconds: float
    results: GpuResults
    ends_s: float
    device: str = "cuda"

    def run(self, step: Step) -> Record:
        """Run a step and keep its record."""
        return run_step(
            step,
            lambda record: self.results.put(self.part.name, step.name, record),
            ends_s=self.ends_s,
        )


def check(command: Command) -> bool:
    """Part ``check``."""
    module = "bench.inference.gpu_check"
    steps = [
        Step("ceilings", module, "ceilings", 60.0),
        Step("CUDA tests", module, "tests", 120.0, ("cuda",)),
        *(
            Step(f"replay, {net}", module, "replay", 90.0, (net, command.precision))
            for net in command.nets
        ),
        Step("host registration", module, "registration", 45.0),
        Step("a capture that fails", module, "failed_capture", 45.0),
        # The longest, and none of them needs a GPU.
        Step("other tests", module, "tests", 160.0, ("others",)),
    ]
    return all([command.run(step)["ok"] for step in steps])


def contest(command: Command) -> bool:
    """Part ``contest``."""
    from bench.inference import gpu_contest

    return gpu_contest.contest(
        command.nets,
        lambda net, record: command.results.put(command.part.name, net, record),
        seconds=command.seconds,
        ends_s=command.ends_s,
    )


def variants(command: Command) -> bool:
    """Part ``variants``. A variant that ends the process is left out of the next one."""
    fine = True
    for net in command.nets[:1]:
        left_out: dict[str, str] = {}
        for _ in range(1 + RESTARTS):
            arguments = (net, command.precision, str(command.seconds), *left_out)
            step = Step(net, "bench.inference.variants", "variants", 480.0, arguments)
            record = command.run(step)
            suspect = record.get(SUSPECT)
            if record["ok"] or not suspect:
                break
            left_out[suspect] = record["absent"]
        record["absent variants"] = {**record.get("absent variants", {}), **left_out}
        command.results.put(command.part.name, net, record)
        fine = fine and record["ok"]
    return fine


def served(command: Command) -> bool:
    """Part ``served``."""
    module, device = "bench.inference.gpu_served", command.device
    steps = [
        Step("paced, shipped", module, "paced", 80.0, (SMALL, device)),
        Step("paced, full, 1 camera", module, "paced", 100.0, (ONE_CAMERA, device)),
        Step("hot swaps, full, 1 camera", module, "swaps", 120.0, (ONE_CAMERA, device)),
        Step("a lost device", module, "lost_device", 60.0, (device,)),
    ]
    return all([command.run(step)["ok"] for step in steps])


RUN: Mapping[str, Callable[[Command], bool]] = {
    CHECK: check,
    CONTEST: contest,
    VARIANTS: variants,
    SERVED: served,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a part. Returns the exit status: 0, 1 a step failed, 2 bad usage, 3 no GPU."""
    began_s = time.monotonic()
    cli = CommandLine(description="Measure one part on a GPU.")
    cli.add_argument("part", choices=[part.name for part in PARTS])
    cli.add_argument("--net", action="append", choices=NETS, help="may be given twice; default all")
    cli.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    cli.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    cli.add_argument("--seconds", type=Number(float, DURATION_S), default=40.0)
    cli.add_argument("--within", type=Number(float, DURATION_S), metavar="SECONDS")
    args = cli.parse_args(argv)
    part = next(part for part in PARTS if part.name == args.part)
    ends_s = began_s + (args.within or part.within_s)
    facts: Record = run_step(FACTS, lambda _record: None, ends_s=ends_s)
    if not facts["ok"]:
        print(f"no GPU: {facts['absent']}", file=sys.stderr)
        return NO_GPU
    results = GpuResults(args.out, facts["gpu"])
    results.put(part.name, "facts", facts)
    nets = tuple(args.net or NETS)
    command = Command(part, nets, args.precision, args.seconds, results, ends_s)
    fine = RUN[part.name](command)
    print(f"{results.path}, after {time.monotonic() - began_s:.0f} s", flush=True)
    for words in _absent(results.read()[part.name]):
        print(f"  absent: {words}", flush=True)
    return 0 if fine else FAILED


def _absent(steps: Mapping[str, Any]) -> list[str]:
    """Steps without a result, and rows that a contest is without."""
    found = []
    for name, each in steps.items():
        reason = each.get("absent", {})
        rows = reason if isinstance(reason, dict) else {"": reason}
        found += [f"{name}: {row}{': ' if row else ''}{words}" for row, words in rows.items()]
        found += [f"{name}: {row}: {why}" for row, why in each.get("absent variants", {}).items()]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
