"""The result of an evaluation: a JSON file, its raw samples, and a summary for the terminal."""

from __future__ import annotations

import io
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from glob import escape
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.types import PolicyContract, PolicyInfo
from runtime.evaluation.episode_result import Episode
from runtime.latency_stats import REQUEST, Percentiles, StageTimes

PACKAGES = ("metronome", "numpy", "torch", "mujoco", "gymnasium", "gym-aloha", "pyzmq", "numba")


def result_path(folder: str, world: str, task: str) -> Path:
    """Return ``<folder>/<world>/<task>.json``; ``_`` replaces characters unfit for a file name."""
    world, task = (re.sub(r"[^\w.+-]", "_", name) for name in (world, task))
    return Path(folder) / world / f"{task}.json"


def wilson_95(successes: int, total: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927); (0, 1) without trials."""
    if total == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    p = successes / total
    centre = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def summarize(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Return the part of the result that is computed from the episodes."""
    ordered = sorted(episodes, key=lambda episode: episode.seed)
    total, won = len(ordered), sum(episode.success for episode in ordered)
    won_horizons = [episode.horizon for episode in ordered if episode.success]
    return {
        "success_rate": won / total if total else 0.0,
        "wilson_95": wilson_95(won, total),
        "total": total,
        "total_success": won,
        "horizon": [episode.horizon for episode in ordered],
        "horizon_success": float(np.mean(won_horizons)) if won_horizons else None,
        "episodes": [
            {
                "seed": episode.seed,
                "success": episode.success,
                "reward": episode.reward,
                "horizon": episode.horizon,
                "wall_s": round(episode.wall_s, 3),
                "missed_ticks": episode.missed_ticks,
                "starved_ticks": episode.executor.starved_ticks,
                "seam_jump": episode.executor.seam_jump,
                "command_jerk": episode.command_jerk,
                "drawn_latency": Percentiles.of(episode.drawn_latency_s).as_dict(),
                "lost_observations": episode.lost_observations,
            }
            for episode in ordered
        ],
        "timing": timing(ordered),
    }


def timing(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Return the percentiles of all durations, in seconds, and the counts of all episodes."""
    stages = StageTimes()
    for episode in episodes:
        stages.extend(episode.stages_ns)
    percentiles = stages.percentiles()
    request = percentiles.pop(REQUEST, Percentiles.of(()))
    return {
        "unit": "s",
        "stages": {name: p.as_dict() for name, p in percentiles.items()},
        "request": request.as_dict(),
        "action_age": Percentiles.of(_concatenated(episodes, "action_age_s")).as_dict(),
        "lateness": Percentiles.of(_concatenated(episodes, "lateness_s")).as_dict(),
        "answer_delay": Percentiles.of(_concatenated(episodes, "answer_delay_s")).as_dict(),
        "drawn_latency": Percentiles.of(_concatenated(episodes, "drawn_latency_s")).as_dict(),
        "lost_observations": sum(episode.lost_observations for episode in episodes),
        "ticks": sum(episode.horizon for episode in episodes),
        "missed_ticks": sum(episode.missed_ticks for episode in episodes),
        "starved_ticks": sum(episode.executor.starved_ticks for episode in episodes),
        "chunks": sum(episode.executor.chunks for episode in episodes),
        "dropped_stale": sum(episode.executor.dropped_stale for episode in episodes),
        "discarded_actions": sum(episode.executor.discarded_actions for episode in episodes),
        "seam_jump": max((episode.executor.seam_jump for episode in episodes), default=0.0),
        "staleness": max((episode.executor.staleness_ticks for episode in episodes), default=0),
    }


def _concatenated(episodes: Sequence[Episode], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    arrays = [getattr(episode, name) for episode in episodes]
    return np.concatenate(arrays) if arrays else np.empty(0)


def versions() -> dict[str, str]:
    """Return the versions of Python, the machine type and the installed ones of ``PACKAGES``."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def policy_record(contract: PolicyContract, info: PolicyInfo) -> dict[str, Any]:
    """Return the policy's entry in a result file: the fields of ``info`` and the contract."""
    return {
        **{name: getattr(info, name) for name in PolicyInfo.__slots__},
        "contract": json.loads(contract.to_json()),
    }


def write_result(path: Path, result: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
    """Write ``path`` (JSON) and ``<stem>_samples.npz`` beside it, each atomically.

    The samples are in the order of the seeds.

    Raises:
        OSError: A file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=2, ensure_ascii=False).encode())
    episodes = sorted(episodes, key=lambda episode: episode.seed)
    stages = StageTimes()
    for episode in episodes:
        stages.extend(episode.stages_ns)
    arrays = {f"stage_{name}_ns": np.asarray(v) for name, v in stages.samples_ns().items()}
    for name in ("action_age_s", "lateness_s", "answer_delay_s", "drawn_latency_s"):
        arrays[name] = _concatenated(episodes, name)
    write_arrays(path.with_name(f"{path.stem}_samples.npz"), arrays)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an npz file atomically. Raises ``OSError``."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **dict(arrays))
    write_atomically(path, buffer.getbuffer())


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file in full or not at all, by renaming a temporary one. Raises ``OSError``."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what killed writers of the result ``path`` left half written. Raises ``OSError``."""
    for name in (path.name, f"{path.stem}_samples.npz"):
        for unfinished in path.parent.glob(f".{escape(name)}.*.partial"):
            unfinished.unlink()


def format_report(result: Mapping[str, Any]) -> str:
    """Return the summary of a result for the terminal, several lines."""
    low, high = result["wilson_95"]
    t = result["timing"]

    def line(name: str, values: Mapping[str, Any]) -> str:
        return f"  {name:<12} {Percentiles(**values).in_ms()}"

    lines = [
        f"success      {result['total_success']}/{result['total']} = "
        f"{100 * result['success_rate']:.1f} %  (95 %: {100 * low:.1f} to {100 * high:.1f})",
        *_error_lines(result.get("errors", ())),
        f"transport    {result['transport']}: {result['transport_reason']}",
        "timing",
        line("request", t["request"]),
        *(line(name, values) for name, values in t["stages"].items()),
        line("action age", t["action_age"]),
    ]
    lines += [
        line(name.replace("_", " "), t[name])
        for name in ("lateness", "answer_delay", "drawn_latency")
        if t[name]["max"]
    ]
    if t["lost_observations"]:
        lines.append(f"  observations lost by --drop: {t['lost_observations']}")
    lines.append(
        f"  ticks {t['ticks']}, missed {t['missed_ticks']}, starved {t['starved_ticks']}, "
        f"chunks {t['chunks']}, largest seam {t['seam_jump']:.3f}"
    )
    return "\n".join(lines)


def _error_lines(errors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which episodes are in no rate."""
    if not errors:
        return []
    seeds = ", ".join(str(error["seed"]) for error in errors)
    return [f"no outcome   {len(errors)} episodes, not counted above: seeds {seeds}"]
