"""What one replay of a captured graph consists of, and how long it takes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench.inference.nets import checkpoint_of, load, observations
from bench.inference.steps import Record, Say
from bench.inference.variants import replay_of
from policies.act.engine import EngineOptions, Frames
from policies.act.engine_selection import make_engine

REPLAYS = 500
KEPT_ROWS = 30
"""Rows of the table of kernels that are printed; all are in the record."""
TRACED = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace that are the device's own work."""


def replay(say: Say, arguments: Sequence[str]) -> Mapping[str, Any]:
    """One replay taken apart, and ``REPLAYS`` of them by events and by wall clock.

    Arguments: network, precision.
    """
    net, precision = arguments
    with checkpoint_of(net) as folder:
        weights = load(folder)
    began_s = time.monotonic()
    options = EngineOptions(device="cuda", engine="cuda-graph", precision=precision)
    engine = make_engine(weights, options)
    found: Record = {"engine": engine.name, "made_s": time.monotonic() - began_s}
    say(found)
    graph, stream = replay_of(engine)
    [(images, state), *_] = observations(weights.config)
    frames = Frames(list(images), state)
    engine.run([frames])

    def replay_and_wait() -> None:
        with torch.cuda.stream(stream):
            graph()
        stream.synchronize()

    found["event_s"] = _percentiles(_event_times_s(graph, stream))
    found["replay_wall_s"] = _percentiles(times_s(replay_and_wait, REPLAYS))
    found["run_wall_s"] = _percentiles(times_s(lambda: engine.run([frames]), REPLAYS))
    say(found)
    for name in ("event_s", "replay_wall_s", "run_wall_s"):
        print(f"  {name:14} {_in_us(found[name])}", flush=True)
    found |= nodes_of(_trace(replay_and_wait))
    for row in found["table"][:KEPT_ROWS]:
        print(f"  {row['us']:9.1f} µs {row['count']:4}  {row['name'][:110]}", flush=True)
    print(f"  {found['nodes']}, span {found['span_us']} µs, busy {found['busy_us']} µs", flush=True)
    return found


def nodes_of(trace: Mapping[str, Any]) -> Record:
    """Count what the device did in a trace of torch's profiler (chrome's format).

    Returns:
        ``nodes``: by kind, and ``all``. ``table``: by name, the longest first. ``span_us``: from
        the first start to the last end. ``busy_us``: without the gaps.
    """
    events = [each for each in trace["traceEvents"] if each.get("cat") in TRACED and "dur" in each]
    counts = {kind: sum(each["cat"] == kind for each in events) for kind in TRACED}
    by_name: dict[str, list[float]] = {}
    for each in events:
        by_name.setdefault(each["name"], []).append(float(each["dur"]))
    rows = [{"name": n, "count": len(us), "us": round(sum(us), 2)} for n, us in by_name.items()]
    rows.sort(key=lambda row: -row["us"])  # type: ignore[operator]
    busy_us, end_us = 0.0, -np.inf
    for start_us, us in sorted((float(each["ts"]), float(each["dur"])) for each in events):
        busy_us += max(0.0, start_us + us - max(start_us, end_us))
        end_us = max(end_us, start_us + us)
    span_us = end_us - min(float(each["ts"]) for each in events) if events else 0.0
    return {
        "nodes": {**counts, "all": len(events)},
        "table": rows,
        "span_us": round(float(span_us), 1),
        "busy_us": round(busy_us, 1),
        **({} if events else {"why": "the profiler saw no work of the device"}),
    }


def times_s(action: Callable[[], Any], count: int) -> list[float]:
    """Of ``count`` calls, after some that are not counted."""
    samples_s = []
    for number in range(-max(3, count // 10), count):
        began_s = time.perf_counter()
        action()
        if number >= 0:
            samples_s.append(time.perf_counter() - began_s)
    return samples_s


def _event_times_s(graph: Callable[[], None], stream: Any) -> list[float]:
    cuda: Any = torch.cuda  # hardly typed
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    samples_s = []
    for number in range(-REPLAYS // 10, REPLAYS):
        with torch.cuda.stream(stream):
            start.record(stream)
            graph()
            end.record(stream)
        end.synchronize()
        if number >= 0:
            samples_s.append(start.elapsed_time(end) / 1e3)
    return samples_s


def _trace(action: Callable[[], None]) -> Mapping[str, Any]:
    """The second of two profiles: the first one's time goes to starting the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with TemporaryDirectory(prefix="metronome-trace-") as folder:
        path = Path(folder) / "trace.json"
        for _ in range(2):
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                action()
                torch.cuda.synchronize()
            profiled.export_chrome_trace(str(path))
        trace: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    return trace


def _percentiles(samples_s: Sequence[float]) -> dict[str, float]:
    found = {f"p{each}": float(np.percentile(samples_s, each)) for each in (1, 50, 99)}
    return {**found, "p99 / p50": found["p99"] / found["p50"], "max": max(samples_s)}


def _in_us(figures: Mapping[str, float]) -> str:
    said = ", ".join(f"{n} {1e6 * s:.1f}" for n, s in figures.items() if "/" not in n)
    return f"{said} µs, p99 / p50 {figures['p99 / p50']:.2f}"
