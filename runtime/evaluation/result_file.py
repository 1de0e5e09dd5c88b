"""Reads a result file of an evaluation, for comparisons."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from runtime.errors import ComparisonError
from runtime.latency_stats import Percentiles

REAL, LOCKSTEP = "real", "lockstep"
"""Values of ``mode``; the third is ``realtime``."""
INFER = "infer"
"""The stage of a request that is the policy's inference."""
OPTIONAL = ("shadows", "msaa")
"""Options of a world that a policy's contract decides if the user does not."""


@dataclass(frozen=True, slots=True)
class ResultFile:
    """What a comparison needs of a result file.

    Attributes:
        path: The file.
        mode: ``lockstep``, ``realtime`` or ``real``.
        repeatable: Whether its seeds alone define its episodes.
        failure: Why the evaluation ended early; empty if it did not.
        outcomes: Success by seed, in the order of the seeds. Rollouts that nobody judged are left
            out.
        errored: The seeds of the episodes that killed their worker. They have no outcome, and are
            left out, too.
        recordings: The name of each rollout's recording, by seed; empty in simulation.
        timing: The result's ``timing``: seconds and counts.
        durations: Percentiles of ``request``, ``inference`` and ``lateness``, in seconds.
        task: Task, environment and limits by field name; a comparison needs equal ones.
        setting: What may differ, and is therefore compared: policy, strategy, versions.
    """

    path: Path
    mode: str
    repeatable: bool
    failure: str
    outcomes: dict[int, bool]
    errored: tuple[int, ...]
    recordings: dict[int, str]
    timing: Mapping[str, Any]
    durations: dict[str, Percentiles]
    task: dict[str, Any]
    setting: dict[str, Any]

    @property
    def successes(self) -> int:
        """The number of successful episodes."""
        return sum(self.outcomes.values())

    def videos(self, seed: int) -> list[Path]:
        """Return the videos of an episode that lie where the evaluation writes them."""
        if seed in self.recordings:
            found = self.path.with_suffix("").glob(f"{escape(self.recordings[seed])}_*.mp4")
            return sorted(found)
        outcome = "success" if self.outcomes[seed] else "failure"
        video = self.path.parent / "video" / self.path.stem / f"seed{seed}_{outcome}.mp4"
        return [video] if video.is_file() else []


def read_result(path: Path) -> ResultFile:
    """Read a result file that ``eval-sim`` or ``eval-real`` wrote.

    Raises:
        ComparisonError: No such file, no JSON, a key is missing or of another type, no episode, or
            a seed that occurs twice.
    """
    raw = _read_object(path)
    mode = _need(raw, "mode", str, path)
    entries = _judged_entries(raw, path)
    timing = _need(raw, "timing", dict, path)
    return ResultFile(
        path=path,
        mode=mode,
        repeatable=mode == LOCKSTEP and raw.get("deterministic") is True,
        failure=_need(raw, "failure", str, path),
        outcomes={entry["seed"]: entry["success"] for entry in entries},
        errored=_errored(raw, path),
        recordings={
            entry["seed"]: Path(_need(entry, "recording", str, path, "episodes: ")).name
            for entry in entries
            if mode == REAL
        },
        timing=timing,
        durations={
            "request": _percentiles(timing, "request", path),
            "inference": _percentiles(_need(timing, "stages", dict, path, "timing."), INFER, path),
            "lateness": _percentiles(timing, "lateness", path),
        },
        task=_real_task(raw, path) if mode == REAL else _simulated_task(raw, path),
        setting=_setting(raw, path),
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ComparisonError(f"{path}: {error.strerror}, expected a result file") from error
    if not content.strip():
        raise ComparisonError(f"{path}: got an empty file, expected a result in JSON")
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ComparisonError(f"{path}: truncated, or no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ComparisonError(f"{path}: got {type(raw).__name__}, expected an object")
    return raw


def _need(table: Mapping[str, Any], name: str, kind: type, path: Path, at: str = "") -> Any:
    if name not in table:
        raise ComparisonError(
            f"{path}: {at}{name}: got none, expected a {kind.__name__}: no result file, or one of "
            "an older version; repeat the evaluation"
        )
    value = table[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ComparisonError(f"{path}: {at}{name}: got {value!r:.80}, expected a {kind.__name__}")
    return value


def _percentiles(table: Mapping[str, Any], name: str, path: Path) -> Percentiles:
    """Return those of ``table[name]``; of no samples if the key is absent."""
    values = table.get(name, Percentiles.of(()).as_dict())
    known = Percentiles.__slots__
    numbers = isinstance(values, dict) and all(
        isinstance(value, int | float) for value in values.values()
    )
    if not numbers or set(values) != set(known):
        raise ComparisonError(
            f"{path}: timing: {name}: got {values!r:.80}, expected numbers {', '.join(known)}"
        )
    return Percentiles(**values)


def _judged_entries(raw: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """Return the entries of all judged episodes in the order of their seeds."""
    entries = []
    for index, entry in enumerate(_need(raw, "episodes", list, path)):
        at = f"episodes[{index}]"
        if not isinstance(entry, dict):
            raise ComparisonError(f"{path}: {at}: got {entry!r:.80}, expected an object")
        _need(entry, "seed", int, path, f"{at}.")
        _need(entry, "success", bool, path, f"{at}.")
        if entry.get("judged", True):
            entries.append(entry)
    if not entries:
        raise ComparisonError(f"{path}: episodes: got none that was judged, expected at least one")
    twice = [seed for seed, n in Counter(e["seed"] for e in entries).items() if n > 1]
    if twice:
        raise ComparisonError(
            f"{path}: episodes: got seed {twice[0]} more than once, expected each seed once"
        )
    return sorted(entries, key=lambda entry: int(entry["seed"]))


def _errored(raw: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    """Return the seeds of ``errors``, which results of a robot do not have."""
    entries = _need(raw, "errors", list, path) if "errors" in raw else []
    for entry in entries:
        if not isinstance(entry, dict):
            raise ComparisonError(f"{path}: errors: got {entry!r:.80}, expected objects")
    return tuple(_need(entry, "seed", int, path, "errors: ") for entry in entries)


def _simulated_task(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    _need(raw, "config", dict, path)
    env = _need(raw, "env", dict, path)
    world = _need(raw, "world", dict, path)
    task = {
        "env.kind": _need(env, "kind", str, path, "env."),
        "env.task": _need(env, "task", str, path, "env."),
        "env.success_reward": env.get("success_reward"),
        "env.gym": env.get("gym"),
    }
    task |= {f"world.{name}": world.get(name) for name in ("max_timesteps", "dt_s")}
    # As given, and as it was; equal either way is equal.
    task |= {f"env.{name}": (env.get(name), world.get(name)) for name in OPTIONAL}
    return task


def _real_task(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    robot = _need(raw, "robot", dict, path)
    config = _need(raw, "config", dict, path)
    task = _need(raw, "task", dict, path)
    contract = _need(_need(raw, "policy", dict, path), "contract", dict, path, "policy.")
    return {
        "robot.name": _need(robot, "name", str, path, "robot."),
        "robot.config": robot.get("config"),
        "config.overrides": config.get("overrides"),
        **{f"task.{name}": value for name, value in task.items() if name != "max_timesteps"},
        "max_timesteps": config.get("max_timesteps") or task.get("max_timesteps"),
        "policy.contract.dt_s": contract.get("dt_s"),
    }


def _setting(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    policy = {k: v for k, v in _need(raw, "policy", dict, path).items() if k != "contract"}
    setting: dict[str, Any] = {}
    for name, table in (
        ("policy", policy),
        ("action_manager", _need(raw, "action_manager", dict, path)),
        ("versions", _need(raw, "versions", dict, path)),
    ):
        setting |= {f"{name}.{key}": value for key, value in table.items()}
    config = _need(raw, "config", dict, path)
    if "latency" in config:  # older files have none
        dial = _need(config, "latency", dict, path, "config.")
        setting |= {f"latency.{name}": value for name, value in dial.items()}
    setting |= {name: raw.get(name) for name in ("mode", "transport", "pictures")}
    return setting


def check_same_task(first: ResultFile, second: ResultFile) -> None:
    """Raise ``ComparisonError`` for the first field in which the two files' tasks differ."""
    if (first.mode == REAL) != (second.mode == REAL):
        raise ComparisonError(
            f"{second.path}: mode: got {second.mode}, expected "
            f"{'real' if first.mode == REAL else 'lockstep or realtime'}, as in {first.path}"
        )
    for name in [*first.task, *(name for name in second.task if name not in first.task)]:
        expected, got = first.task.get(name), second.task.get(name)
        if name.removeprefix("env.") in OPTIONAL:
            if any(e == g for e, g in zip(expected or (), got or (), strict=True)):
                continue
            expected, got = (expected or (None,))[0], (got or (None,))[0]
        if got != expected:
            raise ComparisonError(
                f"{second.path}: {name}: got {got!r}, expected {expected!r}, as in {first.path}: "
                "success rates of different tasks are not comparable"
            )
