"""A policy of LeRobot, with its own processors, as a ``Policy``."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.act.hardware import DTYPES, is_lost
from policies.errors import ContractMismatch, DeviceLost, InferenceError
from policies.image_resize import prepare, warm_up
from policies.lerobot_policy.families import Family
from policies.lerobot_policy.random_stream import RandomStream
from policies.observation_check import check_observation
from policies.types import ActionChunk, MetaObs, PolicyContract, PolicyInfo
from policies.weights_hash import BackgroundHash


@dataclass(slots=True)
class LerobotModel:
    """A LeRobot policy and what it needs; shared by its forks, which one thread uses.

    Attributes:
        policy: LeRobot's policy, in evaluation mode on ``device``.
        family: How to call it.
        preprocess, postprocess: LeRobot's pipelines, from observation and to action.
        image_features: The observation's name of each camera's image, in the contract's order.
        state_feature: The observation's name of the state.
        contract, info: Of the ``Policy``.
        device: Where the network is.
        weights_hash: Of the checkpoint's files.
    """

    policy: Any
    family: Family
    preprocess: Callable[[dict[str, Any]], dict[str, Any]]
    postprocess: Callable[[Tensor], Tensor]
    image_features: tuple[str, ...]
    state_feature: str
    contract: PolicyContract
    info: PolicyInfo
    device: torch.device
    weights_hash: BackgroundHash
    images: tuple[NDArray[np.uint8], ...] = field(init=False)

    def __post_init__(self) -> None:
        ticks, cameras = self.contract.n_obs_steps, self.contract.cameras
        warm_up(cameras)
        self.images = tuple(np.empty((ticks, *c.model_hw, 3), np.uint8) for c in cameras)


class LerobotPolicy:
    """A LeRobot policy without randomness. Stateless; used by one thread at a time.

    Every chunk depends only on its own observation: LeRobot's queues of observations and actions
    are not used. The client keeps the former, and its executor has the chunk.

    Args:
        model: The policy; its chunks are cut to the contract's ``chunk_size``.
    """

    def __init__(self, model: LerobotModel) -> None:
        self._model = model

    @property
    def contract(self) -> PolicyContract:
        """What the policy needs and returns."""
        return self._model.contract

    @property
    def info(self) -> PolicyInfo:
        """Checkpoint, device and precision; the engine is LeRobot's release."""
        return self._model.info

    def weights_hash(self) -> str:
        """Return the hash of the checkpoint's files; wait until it is computed."""
        return self._model.weights_hash.wait()

    def infer(self, obs: MetaObs) -> ActionChunk:
        """Return the chunk for ``obs``, whose arrays may be read-only and are not kept.

        Raises:
            ObservationError: NaN or infinity in the state.
            ContractMismatch: A camera, shape or dtype other than the contract's.
            InferenceError: The network failed or returned NaN or infinity; ``DeviceLost`` if its
                device failed for good.
        """
        model, contract = self._model, self._model.contract
        start = time.monotonic_ns()
        check_observation(obs, contract)
        try:
            with torch.inference_mode(), _autocast(model):
                batch = model.preprocess(_tensors(model, obs))
                prepared = time.monotonic_ns()
                with self._randomness():
                    normalized = model.family.predict(model.policy, batch)
                inferred = time.monotonic_ns()
                actions = model.postprocess(normalized.float())[0, : contract.chunk_size].numpy()
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            lost = model.device.type == "cuda" and is_lost(torch.cuda.current_stream(model.device))
            failure = DeviceLost if lost else InferenceError
            raise failure(f"{model.info.engine} on {model.device}: {error}") from error
        if not np.isfinite(actions).all():
            raise InferenceError(f"{model.info.engine}: NaN or infinity among the actions")
        return ActionChunk(
            np.ascontiguousarray(actions, np.float32),
            obs_timestep=obs.timestep,
            t_capture_ns=obs.t_capture_ns,
            ctrl_space=contract.ctrl_space,
            ctrl_type=contract.ctrl_type,
            gripper_continuous=contract.gripper_continuous,
            stages_ns={
                "preprocess": prepared - start,
                "infer": inferred - prepared,
                "postprocess": time.monotonic_ns() - inferred,
            },
        )

    def reset(self) -> None:
        """Does nothing: there is no episode state."""

    def fork(self) -> LerobotPolicy:
        """Return itself: there is no episode state."""
        return self

    def close(self) -> None:
        """Does nothing: the memory is freed with the last fork."""

    def _randomness(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


class SamplingLerobotPolicy(LerobotPolicy):
    """A LeRobot policy that draws random numbers: each fork has a stream of its own.

    A reset without a seed goes on in the stream.

    Args:
        model: As ``LerobotPolicy``.
        seeds: The seeds of this policy and of its forks, one after another.
    """

    def __init__(self, model: LerobotModel, seeds: Iterator[int] | None = None) -> None:
        super().__init__(model)
        self._seeds = itertools.count() if seeds is None else seeds
        self._stream = RandomStream(model.device, next(self._seeds))

    def seed(self, seed: int) -> None:
        """Restart the stream where ``torch.manual_seed(seed)`` would."""
        self._stream.seed(seed)

    def fork(self) -> SamplingLerobotPolicy:
        """Return a policy with the same weights and the next seed's stream."""
        return SamplingLerobotPolicy(self._model, self._seeds)

    def _randomness(self) -> AbstractContextManager[None]:
        return self._stream.use()


def _autocast(model: LerobotModel) -> AbstractContextManager[Any]:
    precision = model.info.precision
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, DTYPES[precision])


def _tensors(model: LerobotModel, obs: MetaObs) -> dict[str, Any]:
    """``obs`` as LeRobot's own loop has it: images (n, 3, H, W) of 0 to 1, and the task."""
    contract, ticks = model.contract, model.contract.n_obs_steps
    tensors: dict[str, Any] = {}
    for camera, feature, own in zip(
        contract.cameras, model.image_features, model.images, strict=True
    ):
        image = obs.images[camera.name]
        frames = image if contract.obs_axes and isinstance(image, np.ndarray) else [image]
        if len(frames) != ticks:
            raise ContractMismatch(f"images.{camera.name}", f"{len(frames)} ticks", f"{ticks}")
        for frame, out in zip(frames, own, strict=True):
            prepare(frame, camera, out)
        pixels = torch.from_numpy(own).to(model.device).permute(0, 3, 1, 2)
        tensors[feature] = pixels.to(torch.float32, memory_format=torch.contiguous_format) / 255
    state = torch.tensor(obs.state).reshape(ticks, contract.state_dim)
    tensors[model.state_feature] = state.to(model.device)
    tensors["task"] = [obs.raw_lang] * ticks
    return tensors
