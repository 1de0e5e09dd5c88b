"""What is particular to each type of LeRobot's policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STATE, IMAGES = "observation.state", "observation.images"
"""Keys of a batch for the networks that take stacked images."""

Batch = Mapping[str, Tensor]
"""Feature to (n, ...), n being ``n_obs_steps``; preprocessed."""


@dataclass(frozen=True, slots=True)
class Family:
    """A type of policy; ``policy`` and ``config`` are LeRobot's objects of that type.

    Attributes:
        prepare: Change a configuration, before the policy is made of it.
        chunk_size: The number of actions that ``predict`` returns, from a configuration.
        steps_key: The configuration's key of the actions to execute before the next chunk.
        samples: Whether ``predict`` draws random numbers.
        predict: (policy, batch) to normalized actions (1, chunk_size, A), the newest tick's first.
    """

    prepare: Callable[[Any], None]
    chunk_size: Callable[[Any], int]
    steps_key: str
    samples: bool
    predict: Callable[[Any, Batch], Tensor]


def _stacked(policy: Any, batch: Batch) -> dict[str, Tensor]:
    """State (1, n, S) and images (1, n, cameras, 3, H, W), as LeRobot's queues give them."""
    images = torch.stack([batch[name] for name in policy.config.image_features], dim=-4)
    return {STATE: batch[STATE][None], IMAGES: images[None]}


def _keep(config: Any) -> None:
    """Change nothing."""


def _predict_act(policy: Any, batch: Batch) -> Tensor:
    actions: Tensor = policy.predict_action_chunk(dict(batch))
    return actions


def _diffusion_chunk_size(config: Any) -> int:
    return int(config.horizon - config.n_obs_steps + 1)


def _return_whole_horizon(config: Any) -> None:
    """LeRobot cuts what it has computed to the actions that its own loop executes."""
    config.n_action_steps = _diffusion_chunk_size(config)


def _predict_diffusion(policy: Any, batch: Batch) -> Tensor:
    actions: Tensor = policy.diffusion.generate_actions(_stacked(policy, batch))
    return actions


def _predict_vqbet(policy: Any, batch: Batch) -> Tensor:
    actions: Tensor = policy.vqbet(_stacked(policy, batch), rollout=True)
    return actions[:, : policy.config.action_chunk_size]


FAMILIES: Mapping[str, Family] = {
    "act": Family(
        _keep, lambda config: int(config.chunk_size), "n_action_steps", False, _predict_act
    ),
    "diffusion": Family(
        _return_whole_horizon, _diffusion_chunk_size, "n_action_steps", True, _predict_diffusion
    ),
    "vqbet": Family(
        _keep,
        lambda config: int(config.action_chunk_size),
        "action_chunk_size",
        True,
        _predict_vqbet,
    ),
}
"""Families by ``type`` in ``config.json``."""
