"""Loads ``lerobot:PATH``: a checkpoint as a policy of the installed ``lerobot`` package.

Only data is read from the checkpoint: its configuration, processors of known types, and
safetensors. ``lerobot`` is imported only here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from policies.act import hardware
from policies.checkpoint.extras import Extras, read_extras
from policies.checkpoint.file_readers import need, read_json
from policies.checkpoint.lerobot import CONFIG, read_execution, robot_features
from policies.checkpoint.lerobot_config import (
    ACTION,
    STATE,
    Features,
    camera_name,
    read_features,
)
from policies.checkpoint.lerobot_processor import (
    DEVICE,
    POSTPROCESSOR,
    PREPROCESSOR,
    Processors,
    read_processors,
)
from policies.checkpoint.weight_folders import (
    LEROBOT_PREFIX,
    WEIGHTS,
    find_folder,
    user_path,
)
from policies.errors import CheckpointError, ContractMismatch
from policies.execution import Execution
from policies.lerobot_policy.families import FAMILIES, Family
from policies.lerobot_policy.policy import LerobotModel, LerobotPolicy, SamplingLerobotPolicy
from policies.normalizer import normalizer_hash
from policies.types import (
    UNSPECIFIED_DT_S,
    CameraContract,
    Policy,
    PolicyContract,
    PolicyInfo,
)
from policies.weights_hash import HASH_CHARACTERS, BackgroundHash

ENGINES = ("auto", "torch")
"""Engines that may be asked for: LeRobot computes in torch."""


def load_lerobot_package(
    source: str,
    *,
    device: str = "auto",
    engine: str = "auto",
    precision: str = "auto",
    chunk_size: int | None = None,
    threads: int | None = None,
    fps: float | None = None,
) -> Policy:
    """Load the policy that ``source`` names; arguments as ``load_policy``.

    Precision "auto" is what LeRobot would use: fp32, or with ``use_amp`` in the configuration
    torch's automatic precision for the device.

    Raises:
        CheckpointError: ``lerobot`` or a library of the policy is not installed; or the checkpoint
            is of an unknown type, or cannot be loaded.
        ContractMismatch: This machine or the checkpoint does not have what was requested.
    """
    given = user_path(source.removeprefix(LEROBOT_PREFIX))
    folder = find_folder(given)
    extras, path = read_extras(folder, given), folder / CONFIG
    raw = read_json(path)
    family = _family(raw, path)
    features = read_features(raw, path)
    processors = _processors(folder)
    if engine not in ENGINES:
        raise ContractMismatch("engine", repr(engine), f"one of {ENGINES} for {LEROBOT_PREFIX}")
    chosen = hardware.choose_device(device)
    precision = _precision(precision, chosen, amp=bool(raw.get("use_amp")))
    threads = threads or hardware.default_threads()
    hardware.set_threads(threads)
    hardware.configure_cuda(chosen, hardware.DTYPES[precision])
    robot_names = robot_features((*features.images, STATE), processors.rename, folder)
    image_features, state_feature = robot_names[:-1], robot_names[-1]
    cameras = _cameras(tuple(map(camera_name, image_features)), features, extras, path)
    policy, pipelines = _load(folder, family, chosen)
    size = family.chunk_size(policy.config)
    contract = _contract(
        policy_type=raw["type"],
        features=features,
        processors=processors,
        extras=extras,
        cameras=cameras,
        chunk_size=size,
        n_obs_steps=int(policy.config.n_obs_steps),
        execution=_execution(raw, family, size, path),
    )
    model = LerobotModel(
        policy=policy,
        family=family,
        preprocess=pipelines[0],
        postprocess=pipelines[1],
        image_features=image_features,
        state_feature=state_feature,
        contract=_cut(contract, chunk_size).at_rate(fps),
        info=PolicyInfo(
            checkpoint=source,
            device=str(chosen),
            precision=precision,
            engine=f"lerobot {importlib.metadata.version('lerobot')}",
            threads=threads,
            trained=extras.trained,
        ),
        device=chosen,
        weights_hash=BackgroundHash(lambda: hash_files(folder)),
    )
    return SamplingLerobotPolicy(model) if family.samples else LerobotPolicy(model)


def hash_files(folder: Path) -> str:
    """Return the hash of a checkpoint's configuration, processors and tensors.

    Raises:
        OSError: A file cannot be read.
    """
    state = hashlib.sha256()
    for path in sorted(
        (folder / CONFIG, *folder.glob("policy_*.json"), *folder.glob("*.safetensors"))
    ):
        with path.open("rb") as file:
            state.update(f"{path.name}\n".encode())
            hashlib.file_digest(file, lambda: state)  # goes on with it
    return state.hexdigest()[:HASH_CHARACTERS]


def _family(raw: Mapping[str, Any], path: Path) -> Family:
    kind = need(raw, "type", str, path)
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{path}: type: got {kind!r}, expected one of {sorted(FAMILIES)} for {LEROBOT_PREFIX}; "
            "a policy of your own (-m python:MODULE:FACTORY) can run another one"
        )
    return FAMILIES[kind]


def _processors(folder: Path) -> Processors:
    """Check the processor files, which may otherwise name any class of any module."""
    if not (folder / PREPROCESSOR).is_file():
        raise CheckpointError(
            f"{folder}: no {PREPROCESSOR}, expected a checkpoint of LeRobot since 0.4; LeRobot "
            f"converts older ones, and an ACT checkpoint can be loaded without {LEROBOT_PREFIX}"
        )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: no {WEIGHTS}, expected all weights in it")
    return read_processors(folder)


def _load(folder: Path, family: Family, device: torch.device) -> tuple[Any, tuple[Any, Any]]:
    """Return LeRobot's policy and its (pre, post) processors."""
    try:
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors
        from safetensors.torch import load_model

        config = PreTrainedConfig.from_pretrained(str(folder), local_files_only=True)
        config.device = str(device)
        config.pretrained_backbone_weights = None  # else they are downloaded, and overwritten
        family.prepare(config)
        with contextlib.redirect_stdout(sys.stderr):  # some print how large they are
            policy = get_policy_class(config.type)(config)
        load_model(policy, str(folder / WEIGHTS), strict=True, device=str(device))
        overrides = {
            f"{name}_overrides": {DEVICE: {"device": target}}
            for name, file, target in (
                ("preprocessor", PREPROCESSOR, str(device)),
                ("postprocessor", POSTPROCESSOR, "cpu"),
            )
            if any(
                step.get("registry_name") == DEVICE for step in read_json(folder / file)["steps"]
            )
        }
        pipelines = make_pre_post_processors(config, str(folder), **overrides)
    except ImportError as error:
        raise CheckpointError(
            f"{LEROBOT_PREFIX}{folder}: {error}; expected lerobot and the libraries of this policy "
            "to be installed (pip install lerobot)"
        ) from error
    except Exception as error:  # LeRobot's and its parser's own types
        raise CheckpointError(
            f"{LEROBOT_PREFIX}{folder}: LeRobot cannot load it: {error!r}"
        ) from error
    return policy.to(device).eval().requires_grad_(False), pipelines


def _precision(name: str, device: torch.device, *, amp: bool) -> str:
    if name == "auto":
        return {"cuda": "fp16", "cpu": "bf16"}[device.type] if amp else "fp32"
    supported = hardware.precisions(device)
    if name not in supported:
        raise ContractMismatch(
            "precision",
            repr(name),
            f"one of {('auto', *supported)}: this {device.type} has no units for it",
        )
    return name


def _cameras(
    names: tuple[str, ...], features: Features, extras: Extras, path: Path
) -> tuple[CameraContract, ...]:
    cameras = extras.camera_contracts(names, None if extras.cameras else features.image_hw, path)
    for camera in cameras:
        if tuple(camera.model_hw) != features.image_hw:
            raise CheckpointError(
                f"{path}: cameras.{camera.name}.model_hw: got {camera.model_hw}, expected "
                f"{features.image_hw}, the size in input_features"
            )
    return cameras


def _execution(raw: Mapping[str, Any], family: Family, size: int, path: Path) -> Execution:
    if family.steps_key == "n_action_steps":
        return read_execution(raw, size, path)[1]
    return Execution("sequential", None, size, f"{CONFIG}: {family.steps_key}")


def _contract(
    *,
    policy_type: str,
    features: Features,
    processors: Processors,
    extras: Extras,
    cameras: tuple[CameraContract, ...],
    chunk_size: int,
    n_obs_steps: int,
    execution: Execution,
) -> PolicyContract:
    """Return the contract. What ``extras`` says wins over the checkpoint."""
    state = processors.inputs.normalizer(STATE, features.state_dim)
    action = processors.outputs.normalizer(ACTION, features.action_dim)
    sequential = execution.action_manager == "sequential"
    steps = extras.n_action_steps or (execution.n_action_steps if sequential else None)
    return PolicyContract(
        policy_type=policy_type,
        cameras=cameras,
        state_dim=features.state_dim,
        action_dim=features.action_dim,
        chunk_size=chunk_size,
        n_action_steps=steps or chunk_size,
        dt_s=UNSPECIFIED_DT_S if extras.dt_s is None else extras.dt_s,
        normalizer_hash=normalizer_hash(state, action),
        rendering=extras.rendering,
        state_names=extras.state_names,
        action_names=extras.action_names or processors.action_names,
        execution=extras.recommended() or execution,
        n_obs_steps=n_obs_steps,
    )


def _cut(contract: PolicyContract, chunk_size: int | None) -> PolicyContract:
    """``contract`` with chunks of at most ``chunk_size`` actions."""
    if chunk_size is None:
        return contract
    if not 1 <= chunk_size <= contract.chunk_size:
        raise ContractMismatch("chunk_size", str(chunk_size), f"1 to {contract.chunk_size}")
    execution = contract.execution
    if execution is not None and execution.n_action_steps is not None:
        steps = min(execution.n_action_steps, chunk_size)
        execution = dataclasses.replace(execution, n_action_steps=steps)
    return dataclasses.replace(
        contract,
        chunk_size=chunk_size,
        n_action_steps=min(contract.n_action_steps, chunk_size),
        execution=execution,
    )
