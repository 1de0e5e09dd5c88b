"""The last step of every layout's loader: combine its results as ``ActWeights``."""

from __future__ import annotations

from torch import Tensor

from policies.act.config import ActConfig
from policies.act.model import IMAGENET_MEAN, IMAGENET_STD
from policies.act.weights import ActWeights, RgbTriples
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
    image_norm: tuple[RgbTriples, RgbTriples] | None = None,
    n_action_steps: int | None = None,
    execution: Execution | None = None,
    assumed: tuple[Assumption, ...] = (),
) -> ActWeights:
    """Return the checkpoint. What ``extras`` says about execution wins over the layout.

    Args:
        config: Sizes.
        tensors: Weights by ``ActModel``'s names.
        extras: The content of ``metronome.yaml``.
        state, action: Normalizers.
        cameras: In the order of the model's inputs.
        image_norm: (mean, std) of each camera; ImageNet's where None.
        n_action_steps: The layout's value; whole chunks where None.
        execution: How the layout says to execute chunks.
        assumed: What the layout does not say, besides the rate.
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
