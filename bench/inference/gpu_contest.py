"""The contest on a GPU: ours as a captured graph in each precision, against the plain module in
eager torch and compiled, and LeRobot's, from pictures in the host's memory to actions in it.

Run by ``bench.inference.gpu`` as part ``contest``: a network is a step.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bench.inference.arena import Comparison, Entry, Timeouts, compare
from bench.inference.contestants import CONTESTANTS, LEROBOT, PLAIN
from bench.inference.report import BEST, COMPILED, goals, ratio, record, table
from bench.sample_files import kept_ranks

OURS = tuple(name for name in CONTESTANTS if "cuda-graph" in name)
NAMES = (PLAIN, *OURS, LEROBOT, COMPILED)
"""The one that compiles starts last: it may take all the time that is left."""
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
CALLS = 500
PACE_HZ, PACED_CALLS = 50.0, 300
START_WITHIN_S, ANSWER_WITHIN_S = 150.0, 30.0
MOST_THREADS = 8
LEAST_S = 60.0
"""A network is not begun when less time than this is left."""
H200_GOALS_MS = {("full, 1 camera", 50.0): 0.6, ("full, 1 camera", 99.0): 0.7}
H200_GOALS_MS[("full, 4 cameras", 50.0)] = 1.0

Put = Callable[[str, Mapping[str, Any]], None]


def contest(
    nets: Sequence[str],
    put: Put,
    *,
    seconds: float,
    ends_s: float,
    compare: Callable[..., Comparison] = compare,
) -> bool:
    """Compare on each network, and return whether all is well; ``put`` gets each record at once.

    Args:
        seconds: Of measuring each network back to back; starts and paced calls are not counted.
        ends_s: When all must be over, monotonic.
    """
    fine = True
    for number, net in enumerate(nets):
        began_s = time.monotonic()
        within_s = (ends_s - began_s) / (len(nets) - number)
        if within_s < LEAST_S:
            put(net, {"ok": False, "seconds": 0.0, "absent": "no time was left for it"})
            fine = False
            continue
        print(f"{net} (at most {within_s:.0f} s)", flush=True)
        try:
            result = _compare(net, compare, seconds, began_s + within_s)
        except Exception as error:  # whatever it is, the next network may do
            words = f"{type(error).__name__}: {error}"
            put(net, {"ok": False, "seconds": time.monotonic() - began_s, "absent": words})
            print(f"  absent: {words}", flush=True)
            fine = False
            continue
        lines = (*table(result), *_ratios(result), *goals(result), *_against_goals_in_ms(result))
        for line in lines:
            print(line, flush=True)
        wrong = wrong_actions(result)
        for line in wrong:
            print(f"  other actions than the plain module's: {line}", flush=True)
        ok = not wrong and bool(_ours(result))
        fine = fine and ok
        put(net, {"ok": ok, "seconds": time.monotonic() - began_s, **record_of(result)})
    return fine


def record_of(result: Comparison) -> dict[str, Any]:
    """The record of a comparison with its samples, and each row's ratio to eager and compiled."""
    content = record(result)
    for name, entry in result.entries.items():
        p50, p99 = entry.percentile_s(50), entry.percentile_s(99)
        content["rows"][name] |= {
            "p99 / p50": p99 / p50,
            "p50 / eager": _ratio(result, entry, PLAIN),
            "p50 / compiled": _ratio(result, entry, COMPILED),
        }
    content["ours, best / eager"] = ratio(result, BEST, PLAIN)
    content["ours, best / compiled"] = ratio(result, BEST, COMPILED)
    content["samples_us"] = {n: _us(e.samples_s) for n, e in result.entries.items()}
    content["paced_samples_us"] = {n: _us(e.paced_s) for n, e in result.entries.items()}
    return content


def wrong_actions(result: Comparison) -> list[str]:
    """Ours only: what torch's default does to float32 convolutions on a GPU is the peers' own."""
    return [
        f"{name}: {entry.error:.1e}"
        for name, entry in _ours(result).items()
        if not entry.error <= TOLERANCES[entry.contestant.precision]
    ]


def _compare(
    net: str, compare: Callable[..., Comparison], seconds: float, ends_s: float
) -> Comparison:
    os.environ["INFERENCE_COMPILE"] = "1"
    paced_s = len(NAMES) * PACED_CALLS / PACE_HZ
    left_s = ends_s - time.monotonic()
    # What is measured must have its time however long the starts take.
    seconds = min(seconds, left_s / 4)
    paced_calls = PACED_CALLS if paced_s < left_s / 3 else PACED_CALLS // 3
    measuring_s = seconds + paced_s * paced_calls / PACED_CALLS
    return compare(
        net,
        NAMES,
        threads=min(MOST_THREADS, len(os.sched_getaffinity(0))),
        calls=CALLS,
        budget_s=seconds,
        device="cuda",
        pace_hz=PACE_HZ,
        paced_calls=paced_calls,
        timeouts=Timeouts(
            start_s=START_WITHIN_S,
            answer_s=ANSWER_WITHIN_S,
            ends_s=ends_s - measuring_s,
            cached_starts=False,
        ),
    )


def _ours(result: Comparison) -> dict[str, Entry]:
    return {n: e for n, e in result.entries.items() if e.contestant.side == "ours"}


def _ratios(result: Comparison) -> Iterator[str]:
    for name, entry in result.entries.items():
        yield (
            f"  {name:28}p99 / p50 {entry.percentile_s(99) / entry.percentile_s(50):.2f}, "
            f"p50 / eager {_ratio(result, entry, PLAIN):.3f}, "
            f"/ compiled {_ratio(result, entry, COMPILED):.3f}"
        )


def _against_goals_in_ms(result: Comparison) -> Iterator[str]:
    ours = list(_ours(result).values())
    if not ours:
        yield "  graph replay: not measurable here: no engine of ours ran"
        return
    best = min(ours, key=lambda entry: entry.percentile_s(50))
    for (net, percent), goal_ms in H200_GOALS_MS.items():
        if net == result.net:
            yield (
                f"  {best.contestant.name} p{percent:g}: {1e3 * best.percentile_s(percent):.3f} ms "
                f"(goal on an H200 {goal_ms:g})"
            )


def _ratio(result: Comparison, entry: Entry, name: str) -> float:
    other = result.entries.get(name)
    return entry.percentile_s(50) / other.percentile_s(50) if other else math.nan


def _us(samples_s: Sequence[float]) -> list[float]:
    """Sorted, of which ``bench.sample_files`` keeps the percentiles and both ends."""
    kept = np.sort(1e6 * np.asarray(samples_s))[kept_ranks(len(samples_s))]
    return [round(us, 1) for us in kept.tolist()]
