"""Reads LeRobot's ``policy_preprocessor.json`` and ``policy_postprocessor.json``.

They list the steps before and after the policy. Every step, every key of a step and every statistic
in use is either applied as LeRobot does or refused by name. The known steps are those that LeRobot
saves with an ACT policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.checkpoint.file_readers import need, read_json, read_safetensors, refuse_unknown
from policies.checkpoint.lerobot_config import FEATURE_TYPES, check_modes
from policies.checkpoint.lerobot_stats import EPS, Statistics
from policies.errors import CheckpointError

PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"

RENAME = "rename_observations_processor"
DEVICE = "device_processor"
RELATIVE, ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"
NORMALIZE, UNNORMALIZE = "normalizer_processor", "unnormalizer_processor"
IDENTITY_CLASS = "lerobot.processor.pipeline.IdentityProcessorStep"

_NORMALIZER_KEYS = frozenset({"eps", "features", "norm_map", "normalize_observation_keys"})
STEPS: Mapping[str, frozenset[str]] = {
    RENAME: frozenset({"rename_map"}),
    DEVICE: frozenset({"device", "float_dtype"}),
    "to_batch_processor": frozenset(),
    "to_batch_processor_action": frozenset(),
    "to_batch_processor_observation": frozenset(),
    "to_batch_processor_complementary_data": frozenset(),
    RELATIVE: frozenset({"enabled", "exclude_joints", "action_names"}),
    ABSOLUTE: frozenset({"enabled"}),
    NORMALIZE: _NORMALIZER_KEYS,
    UNNORMALIZE: _NORMALIZER_KEYS,
    IDENTITY_CLASS: frozenset(),
}
"""Known steps, and the keys of their settings."""
ADVICE = {
    "image_crop_resize_processor": "crop and resize with cameras in metronome.yaml instead, and "
    "remove the step",
}
"""Advice for steps that are not supported, by name."""
ANY_ADVICE = "a policy of your own (-m python:MODULE:FACTORY) can run it"


@dataclass(frozen=True, slots=True)
class Processors:
    """Content of the two files.

    Attributes:
        rename: The robot's name of an observation to the policy's.
        inputs, outputs: Statistics for the network's inputs and outputs.
        action_names: Names of the actions' dimensions, empty where no step has them.
    """

    rename: Mapping[str, str]
    inputs: Statistics
    outputs: Statistics
    action_names: tuple[str, ...]


def read_processors(folder: Path) -> Processors:
    """Read both files in ``folder``.

    Raises:
        CheckpointError: A file, a normalizer or its statistics are missing; or a step, key or value
            is unknown or not supported.
    """
    pre, post = folder / PREPROCESSOR, folder / POSTPROCESSOR
    for present, missing in ((pre, post), (post, pre)):
        if present.is_file() and not missing.is_file():
            raise CheckpointError(f"{missing}: missing; LeRobot writes it beside {present.name}")
    before, after = _steps(pre, unexpected=UNNORMALIZE), _steps(post, unexpected=NORMALIZE)
    for step in after:
        if step.config.get("rename_map"):
            raise CheckpointError(
                f"{post}: {RENAME}: got {step.config['rename_map']!r}, expected none after the "
                "policy"
            )
    return Processors(
        rename=_rename_map(before, pre),
        inputs=_normalizer(before, NORMALIZE, pre),
        outputs=_normalizer(after, UNNORMALIZE, post),
        action_names=_action_names(before, pre),
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """A known step; apart from what its name says, it changes nothing."""

    name: str
    config: Mapping[str, Any]
    state: Path | None


def _steps(path: Path, *, unexpected: str) -> list[_Step]:
    raw = read_json(path)
    refuse_unknown(raw, {"name", "steps"}, path)
    found = []
    for step in need(raw, "steps", list, path):
        by_class = isinstance(step, Mapping) and "registry_name" not in step and "class" in step
        name = need(step, "class" if by_class else "registry_name", str, path)
        keys = {"registry_name", "class", "config", "state_file"}
        refuse_unknown(step, keys, path, at=f"{name}: ")
        if name not in STEPS or name == unexpected:
            known = sorted(STEPS.keys() - {unexpected})
            raise CheckpointError(
                f"{path}: step {name!r} is not supported, expected {known}; "
                f"{ADVICE.get(name, ANY_ADVICE)}"
            )
        config = need({"config": {}, **step}, "config", dict, path)
        refuse_unknown(config, STEPS[name], path, at=f"{name}: ")
        if name == DEVICE and config.get("float_dtype") not in (None, "float32", "float"):
            raise CheckpointError(
                f"{path}: {name}: float_dtype: got {config['float_dtype']!r}, expected null or "
                "'float32' (--precision says how the policy computes)"
            )
        if name in (RELATIVE, ABSOLUTE) and config.get("enabled"):
            raise CheckpointError(
                f"{path}: {name}: enabled: got {config['enabled']!r}, expected false: actions "
                f"relative to the state are not supported; {ANY_ADVICE}"
            )
        found.append(_Step(name, config, _state_file(step, path)))
    return found


def _state_file(step: Mapping[str, Any], path: Path) -> Path | None:
    if step.get("state_file") is None:
        return None
    name = need(step, "state_file", str, path)
    if name != Path(name).name:
        raise CheckpointError(f"{path}: state_file: got {name!r}, expected a plain file name")
    return path.parent / str(name)


def _rename_map(steps: Sequence[_Step], path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    normalized = False
    for step in steps:
        normalized |= step.name == NORMALIZE
        if not step.config.get("rename_map"):
            continue
        if table or normalized:
            raise CheckpointError(
                f"{path}: {RENAME}: got a second rename_map, or one after {NORMALIZE!r}, "
                "expected one before it"
            )
        table = need(step.config, "rename_map", dict, path)
        if not all(isinstance(name, str) for name in table.values()):
            raise CheckpointError(f"{path}: rename_map: got {table}, expected names to names")
    return table


def _action_names(steps: Sequence[_Step], path: Path) -> tuple[str, ...]:
    """Return the actions' names. Newer policies than ACT store them here; ACT's steps have none."""
    for step in steps:
        if step.name == RELATIVE and step.config.get("action_names"):
            names = need(step.config, "action_names", list, path)
            if not all(isinstance(name, str) for name in names):
                raise CheckpointError(f"{path}: action_names: got {names}, expected names")
            return tuple(names)
    return ()


def _normalizer(steps: Sequence[_Step], name: str, path: Path) -> Statistics:
    found = [step for step in steps if step.name == name]
    if len(found) != 1:
        raise CheckpointError(f"{path}: got {len(found)} steps {name!r}, expected one")
    config, state = found[0].config, found[0].state
    modes = need(config, "norm_map", dict, path)
    check_modes(modes, f"{path}: norm_map")
    eps = need({"eps": EPS, **config}, "eps", (int, float), path)
    if not (math.isfinite(eps) and eps >= 0):
        raise CheckpointError(f"{path}: eps: got {eps}, expected 0 or more")
    types = {
        feature: need(entry, "type", str, path)
        for feature, entry in need(config, "features", dict, path).items()
    }
    for feature, group in types.items():
        if group not in FEATURE_TYPES:
            raise CheckpointError(
                f"{path}: features: {feature}: got type {group!r}, expected one of {FEATURE_TYPES}"
            )
    observations = config.get("normalize_observation_keys")
    if observations is not None and not isinstance(observations, list):
        raise CheckpointError(
            f"{path}: normalize_observation_keys: got {observations!r}, expected a list of features"
        )
    return Statistics(
        # Without a file there are no statistics. That is valid where nothing is normalized.
        tensors={} if state is None else read_safetensors(state, unchecked=""),
        source=state or path,
        modes=modes,
        modes_source=path,
        types=types,
        observations=None if observations is None else frozenset(map(str, observations)),
        eps=float(eps),
    )
