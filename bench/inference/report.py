"""A comparison as a table, as goals met or not, and as files.

Columns of the table, in ms where nothing else is said: ``n`` counted calls, their percentiles and
maximum; ``jitter``, by how much two calls in a row differ on average; ``first``, the first call of
the process; ``cold`` and ``cached``, from the start of the process to its first answer, torch's
import included, with an empty cache and with what the first start left; ``MB``, memory that the
network and its engine hold beyond the imports; ``error``, max|a - b| / max|b| against the plain
module; ``cores``, processor time by time elapsed; ``waited``, time spent waiting for a processor
that other processes had, which should be 0.00 where anything but medians is read; ``roofline``, the
bound by the median, absent where what bounds it could not be measured. Where calls were also paced,
further lines have those.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from bench.inference.arena import CACHED, COLD, Comparison, Entry
from bench.inference.contestants import LEROBOT, PLAIN
from bench.inference.nets import SMALL
from bench.inference.roofline import layered_bound_s, necessary_work
from bench.record_files import write_record
from bench.sample_files import write_samples

RESULTS = Path(__file__).parents[1] / "results"
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FEWEST = {99.0: 100, 99.9: 500}
"""Calls below which that percentile says nothing."""
BEST, BEST_FP32, BEST_BF16 = "ours, best", "ours, best fp32", "ours, best bf16"
_OURS = {BEST: ("fp32", "bf16", "fp16"), BEST_FP32: ("fp32",), BEST_BF16: ("bf16",)}
OPENVINO = "OpenVINO of plain"
COMPILED = "torch.compile of plain fp32"


@dataclass(frozen=True, slots=True)
class Goal:
    """The median of ``ours`` by that of ``theirs``, at most ``at_most``."""

    net: str
    ours: str
    theirs: str
    at_most: float
    threads: tuple[int, ...] = (1, 2)
    device: str = "cpu"


_FULL, _FULL_4 = "full, 1 camera", "full, 4 cameras"
GOALS = (
    Goal(_FULL, BEST, LEROBOT, 0.15),
    Goal(_FULL_4, BEST, LEROBOT, 0.14),
    *(Goal(net, BEST, f"{OPENVINO} bf16", 0.9) for net in (_FULL, _FULL_4, SMALL)),
    *(Goal(net, BEST_FP32, LEROBOT, 0.65) for net in (_FULL, _FULL_4)),
    Goal(SMALL, BEST, PLAIN, 0.12, threads=(1,)),
    *(Goal(net, BEST, PLAIN, 0.15, device="cuda") for net in (_FULL, _FULL_4)),
    *(Goal(net, BEST, COMPILED, 0.7, device="cuda") for net in (_FULL, _FULL_4)),
)


def case_name(comparison: Comparison) -> str:
    """e.g. ``full, 1 camera, 2 threads``; of a GPU, the network alone."""
    if comparison.device != "cpu":
        return comparison.net
    plural = "s" if comparison.threads > 1 else ""
    return f"{comparison.net}, {comparison.threads} thread{plural}"


def ratio(comparison: Comparison, ours: str, theirs: str) -> float:
    """Of medians; NaN where either did not run."""
    return _median_s(comparison, ours) / _median_s(comparison, theirs)


def ratios(comparison: Comparison) -> dict[str, float]:
    """All that a budget may be given for, by ``OURS / THEIRS``."""
    theirs = [n for n, e in comparison.entries.items() if e.contestant.side != "ours"]
    found = {
        f"{ours} / {their}": ratio(comparison, ours, their) for ours in _OURS for their in theirs
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def bound_s(comparison: Comparison, precision: str) -> float:
    """What the measured float32 peak and this precision's bytes allow; NaN without a peak."""
    if comparison.machine is None:
        return math.nan
    return comparison.machine.bound_s(necessary_work(comparison.config, BYTES[precision]))


def table(comparison: Comparison) -> Iterator[str]:
    """Lines: the machine, a row for each contestant, and why some are not there."""
    machine, work = comparison.machine, necessary_work(comparison.config, 4)
    yield f"{case_name(comparison)}: ms"
    need = f"one inference needs {work.flops / 1e9:.2f} GFLOP, {work.n_bytes / 1e6:.1f} MB in fp32"
    if machine is None:
        yield f"  no measured peak: a limit is absent; {need}"
    else:
        yield (
            f"  measured peak {machine.flops_per_s / 1e9:.1f} GFLOP/s, "
            f"{machine.bytes_per_s / 1e9:.1f} GB/s; {need}: "
            f"at least {1e3 * bound_s(comparison, 'fp32'):.2f} ms, "
            f"layer by layer {1e3 * layered_bound_s(comparison.config, 4, machine):.2f} ms"
        )
    yield (
        f"  {'':28}{'n':>5}{'p50':>9}{'p99':>9}{'p99.9':>9}{'max':>9}{'jitter':>8}{'first':>8}"
        f"{'cold':>8}{'cached':>8}{'MB':>6}{'error':>9}{'cores':>7}{'waited':>8}"
        f"{'roofline':>10}"
    )
    for name, entry in comparison.entries.items():
        yield f"  {name:28}{_row(comparison, entry)}"
    for name, reason in comparison.absent.items():
        yield f"  {name:28}not measurable here: {reason}"
    yield from _paced_rows(comparison)


def goals(comparison: Comparison) -> Iterator[str]:
    """A line for each goal of this case: the ratio, or why there is none and what bounds it."""
    for goal in GOALS:
        if (goal.net, goal.device) != (comparison.net, comparison.device) or (
            goal.device == "cpu" and comparison.threads not in goal.threads
        ):
            continue
        what = f"  {goal.ours} / {goal.theirs} (goal {goal.at_most:g}): "
        value = ratio(comparison, goal.ours, goal.theirs)
        if math.isfinite(value):
            bound = bound_s(comparison, "fp32") / _median_s(comparison, goal.theirs)
            verdict = "met" if value <= goal.at_most else "not met"
            bounded = comparison.device == "cpu" and math.isfinite(bound)
            limit = f", the fp32 roofline is {bound:.3f}" if bounded else ""
            yield f"{what}{value:.3f}, {verdict}{limit}"
        else:
            yield what + _unmeasurable(comparison, goal)


def record(comparison: Comparison) -> dict[str, Any]:
    """Everything but the samples, as JSON has it; None for what a limit would have to say."""
    machine = comparison.machine
    peaks: tuple[float | None, ...] = (None,) * 4
    if machine is not None:
        layered_s = layered_bound_s(comparison.config, 4, machine)
        peaks = machine.flops_per_s, machine.bytes_per_s, bound_s(comparison, "fp32"), layered_s
    names = "peak_flops_per_s", "peak_bytes_per_s", "bound_s", "layered_bound_s"
    return {
        "case": case_name(comparison),
        "device": comparison.device,
        "threads": comparison.threads,
        **dict(zip(names, peaks, strict=True)),
        "ratios": ratios(comparison),
        "absent": comparison.absent,
        "rows": {name: _record(comparison, e) for name, e in comparison.entries.items()},
        "versions": versions(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
    }


def save(comparison: Comparison, folder: Path = RESULTS) -> Path:
    """The record as JSON, and beside it what ``bench.sample_files`` keeps of the samples."""
    folder.mkdir(exist_ok=True)
    stem = "inference_" + case_name(comparison).replace(", ", "_").replace(" ", "-")
    path = folder / f"{stem}.json"
    write_record(path, record(comparison))
    samples = {name: np.array(e.samples_s) * 1e6 for name, e in comparison.entries.items()}
    write_samples(path.with_suffix(".npz"), samples)
    return path


def versions() -> dict[str, str]:
    """Of what computes."""
    found = {"python": platform.python_version()}
    for name in ("torch", "openvino", "lerobot", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As the kernel has it; empty where it does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else ""


def _median_s(comparison: Comparison, name: str) -> float:
    if name not in _OURS:
        entry = comparison.entries.get(name)
        return entry.percentile_s(50) if entry else math.nan
    ours = [
        entry.percentile_s(50)
        for entry in comparison.entries.values()
        if entry.contestant.side == "ours" and entry.contestant.precision in _OURS[name]
    ]
    return min(ours, default=math.nan)


def _unmeasurable(comparison: Comparison, goal: Goal) -> str:
    if goal.theirs not in comparison.absent:
        return "not measurable here: ours did not run"
    said = f"not measurable here: {comparison.absent[goal.theirs]}"
    if comparison.machine is not None:
        n_bytes = necessary_work(comparison.config, BYTES["bf16"]).n_bytes
        least_ms = 1e3 * n_bytes / comparison.machine.bytes_per_s
        said += (
            f"; bf16 reads at least {n_bytes / 1e6:.1f} MB, "
            f"{least_ms:.2f} ms at the measured bandwidth"
        )
    wide = ratio(comparison, BEST_FP32, f"{OPENVINO} fp32")
    return said + (f"; both in fp32: {wide:.3f}" if math.isfinite(wide) else "")


def _row(comparison: Comparison, entry: Entry) -> str:
    decimals = 2 if comparison.device == "cpu" else 3

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:9.{decimals}f}"

    def start(kind: str) -> str:
        return f"{entry.starts[kind].ready_s:7.1f}s" if kind in entry.starts else f"{'-':>8}"

    count, last = len(entry.samples_s), next(reversed(entry.starts.values()))
    tails = "".join(
        ms(entry.percentile_s(percent)) if count >= fewest else f"{'-':>9}"
        for percent, fewest in FEWEST.items()
    )
    return (
        f"{count:5}{ms(entry.percentile_s(50))}{tails}{ms(max(entry.samples_s))}"
        f"{1e3 * entry.jitter_s:8.2f}{1e3 * last.first_s:8.1f}{start(COLD)}{start(CACHED)}"
        f"{(last.resident_bytes - last.base_bytes) / 1e6:6.0f}{entry.error:9.1e}"
        f"{np.mean(entry.cores):7.2f}{np.mean(entry.waited):8.2f}"
        f"{'-' if comparison.machine is None else f'{_attained(comparison, entry):.2f}':>10}"
    )


def _paced_rows(comparison: Comparison) -> Iterator[str]:
    for name, entry in comparison.entries.items():
        if entry.paced_s:
            p50, p99 = (1e3 * float(np.percentile(entry.paced_s, each)) for each in (50, 99))
            rate = f"at {comparison.pace_hz:g} Hz"
            yield f"  {name:28}{rate}: p50 {p50:.3f}, p99 {p99:.3f}, p99 / p50 {p99 / p50:.2f}"


def _attained(comparison: Comparison, entry: Entry) -> float:
    """Roofline by time: 1 is the limit. Always the fp32 peak on a CPU: no other was measured."""
    return bound_s(comparison, entry.contestant.precision) / entry.percentile_s(50)


def _record(comparison: Comparison, entry: Entry) -> Mapping[str, Any]:
    return {
        "side": entry.contestant.side,
        "precision": entry.contestant.precision,
        "count": len(entry.samples_s),
        **{
            f"p{percent:g}_s": entry.percentile_s(percent)
            for percent in (50.0, 99.0, 99.9)
            if len(entry.samples_s) >= FEWEST.get(percent, 1)
        },
        "max_s": max(entry.samples_s),
        "jitter_s": entry.jitter_s,
        "error": entry.error,
        "cores": float(np.mean(entry.cores)),
        "waited": float(np.mean(entry.waited)),
        "roofline": None if comparison.machine is None else _attained(comparison, entry),
        **_paced_record(comparison, entry),
        "starts": {
            kind: {
                "imported_s": each.imported_s,
                "built_s": each.built_s,
                "first_s": each.first_s,
                "ready_s": each.ready_s,
                "base_bytes": each.base_bytes,
                "resident_bytes": each.resident_bytes,
            }
            for kind, each in entry.starts.items()
        },
    }


def _paced_record(comparison: Comparison, entry: Entry) -> Mapping[str, Any]:
    if not entry.paced_s:
        return {}
    p50, p99 = (float(np.percentile(entry.paced_s, percent)) for percent in (50, 99))
    figures = {"count": len(entry.paced_s), "p50_s": p50, "p99_s": p99, "p99 / p50": p99 / p50}
    return {"paced": {"rate_hz": comparison.pace_hz, **figures}}
