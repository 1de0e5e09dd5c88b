"""Writes a checkpoint that was never trained. Everything works with it except the task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from policies.act.backbone import PREFIXES
from policies.act.config import ActConfig
from policies.act.model import IMAGENET_MEAN, IMAGENET_STD, ActModel
from policies.act.weights import ActWeights
from policies.checkpoint.extras import Extras
from policies.checkpoint.save import Saved, StoredAs, save_ilstudio
from policies.normalizer import zscore
from policies.types import CameraContract, Rendering

START_ARM = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.1)
"""One ALOHA arm at the start of an episode: six joints in rad, gripper from 0 to 1."""
SIGMA = 0.1
"""Spread of the made-up statistics, so that the arms move a few milliradians."""

CAMERA = CameraContract("top", source_hw=(240, 320), crop=(44, 48, 160, 224), model_hw=(160, 224))
"""Camera of the simulated ALOHA tasks."""
DT_S = 0.02
"""Seconds per tick of the simulation."""
RENDERING = Rendering(shadows=False, msaa=0)


def sim_config(*, image_hw: tuple[int, int] = CAMERA.model_hw, n_cameras: int = 1) -> ActConfig:
    """Return the sizes for the simulated ALOHA tasks: about 15 million parameters."""
    return ActConfig(
        state_dim=14,
        action_dim=14,
        chunk_size=100,
        n_cameras=n_cameras,
        image_hw=image_hw,
        width=256,
        feedforward=1024,
        n_encoder_layers=4,
        n_style_layers=2,
    )


def make_untrained(
    path: Path | str,
    *,
    task: str = "sim_transfer_cube",
    seed: int = 0,
    config: ActConfig | None = None,
    cameras: tuple[CameraContract, ...] = (CAMERA,),
    stored_as: StoredAs = "bf16",
) -> None:
    """Write a checkpoint to the folder ``path``, in ILStudio's layout, flagged as untrained.

    Args:
        path: The folder.
        task: The data set's id.
        seed: Seed of the weights; the same seed gives the same file.
        config: Sizes; ``sim_config`` where None.
        cameras: Their model size must be ``config.image_hw``.
        stored_as: Number format of the weights.
    """
    sizes = config or sim_config(image_hw=cameras[0].model_hw, n_cameras=len(cameras))
    start = np.resize(np.array(START_ARM), sizes.state_dim)
    save_ilstudio(
        Path(path),
        Saved(
            config=sizes,
            tensors=initial_weights(sizes, seed),
            stats={"state": _stats(start), "action": _stats(start[: sizes.action_dim])},
            dataset_id=task,
            extras=Extras(
                cameras=cameras,
                dt_s=DT_S,
                rendering=RENDERING,
                trained=False,
                training={"note": "weights as initialized, never trained", "seed": seed},
            ),
        ),
        stored_as=stored_as,
    )


def initial_weights(config: ActConfig, seed: int) -> dict[str, Tensor]:
    """Return initial weights by ``ActModel``'s names; does not change torch's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = ActModel(config).state_dict()
    return {k: v for k, v in state.items() if not k.endswith(".num_batches_tracked")}


def random_weights(config: ActConfig, seed: int = 0) -> ActWeights:
    """Return weights in which every tensor affects the result, without writing a checkpoint.

    Initial weights have zero biases, residual blocks that are the identity, and neutral batch-norm
    statistics; these have none of that. For measuring and comparing engines.
    """
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in initial_weights(config, seed).items():
        noise = torch.randn(tensor.shape, generator=random)
        if name.endswith("running_var"):
            tensors[name] = (0.3 * noise).exp()
        elif name.startswith(PREFIXES) and name.endswith("bn2.weight"):
            tensors[name] = 0.3 + 0.05 * noise
        else:
            tensors[name] = tensor + 0.1 * noise if tensor.ndim == 1 else tensor
    start = np.resize(np.array(START_ARM), max(config.state_dim, config.action_dim))
    return ActWeights(
        config=config,
        tensors=tensors,
        state_normalizer=zscore(start[: config.state_dim], np.full(config.state_dim, SIGMA)),
        action_normalizer=zscore(start[: config.action_dim], np.full(config.action_dim, SIGMA)),
        image_mean=(IMAGENET_MEAN,) * config.n_cameras,
        image_std=(IMAGENET_STD,) * config.n_cameras,
        cameras=tuple(
            CameraContract(f"camera_{i}", config.image_hw, config.image_hw)
            for i in range(config.n_cameras)
        ),
        n_action_steps=config.chunk_size,
        trained=False,
    )


def _stats(mean: np.ndarray) -> dict[str, list[float]]:
    spread = {"mean": 0, "std": None, "min": -3, "max": 3, "q01": -2.3, "q99": 2.3}
    return {
        name: [SIGMA] * len(mean) if sigmas is None else (mean + sigmas * SIGMA).tolist()
        for name, sigmas in spread.items()
    }
