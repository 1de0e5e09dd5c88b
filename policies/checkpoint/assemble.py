"""What all layouts' loaders end with."""

from __future__ import annotations

from torch import Tensor

from policies.act.config import ActConfig
from policies.act.model import IMAGENET_MEAN, IMAGENET_STD
from policies.act.weights import ActWeights, Triples
from policies.checkpoint.extras import Extras
from policies.normalize import Normalizer
from policies.types import CameraContract


def assemble(
    config: ActConfig,
    tensors: dict[str, Tensor],
    extras: Extras,
    *,
    state: Normalizer,
    action: Normalizer,
    cameras: tuple[CameraContract, ...],
    image_norm: tuple[Triples, Triples] | None = None,
    n_action_steps: int | None = None,
) -> ActWeights:
    """The checkpoint; what ``extras`` says of its execution wins.

    Args:
        config, tensors: Sizes, and weights by ``ActModel``'s names.
        extras: What lies beside the checkpoint.
        state, action: Normalizers.
        cameras: In the order the model sees them.
        image_norm: (mean, std) of each camera; ImageNet's where None.
        n_action_steps: What the layout says; whole chunks where None.
    """
    mean, std = image_norm or (
        (IMAGENET_MEAN,) * len(cameras),
        (IMAGENET_STD,) * len(cameras),
    )
    return ActWeights(
        config=config,
        tensors=tensors,
        state_normalizer=state,
        action_normalizer=action,
        image_mean=mean,
        image_std=std,
        cameras=cameras,
        n_action_steps=extras.n_action_steps or n_action_steps or config.chunk_size,
        dt_s=extras.dt_s,
        rendering=extras.rendering,
        trained=extras.trained,
        state_names=extras.state_names,
        action_names=extras.action_names,
    )
