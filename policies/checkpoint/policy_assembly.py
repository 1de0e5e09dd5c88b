"""What all layouts' loaders end with."""

from __future__ import annotations

from torch import Tensor

from policies.act.config import ActConfig
from policies.act.model import IMAGENET_MEAN, IMAGENET_STD
from policies.act.weights import ActWeights, Triples
from policies.checkpoint.extras import Extras
from policies.execution import Assumption, Execution
from policies.normalizer import Normalizer
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
    execution: Execution | None = None,
    assumed: tuple[Assumption, ...] = (),
) -> ActWeights:
    """The checkpoint; what ``extras`` says of its execution wins.

    Args:
        config, tensors: Sizes, and weights by ``ActModel``'s names.
        extras: What lies beside the checkpoint.
        state, action: Normalizers.
        cameras: In the order the model sees them.
        image_norm: (mean, std) of each camera; ImageNet's where None.
        n_action_steps: What the layout says; whole chunks where None.
        execution: How the layout says that chunks are to be played.
        assumed: What the layout does not say, beside the rate.
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
        n_action_steps=next(
            steps
            for steps in (extras.n_action_steps, n_action_steps, config.chunk_size)
            if steps is not None
        ),
        dt_s=extras.dt_s,
        rendering=extras.rendering,
        trained=extras.trained,
        state_names=extras.state_names,
        action_names=extras.action_names,
        execution=extras.recommended() or execution,
        assumed=assumed,
    )
