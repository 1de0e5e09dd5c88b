"""The networks that are timed: ACT as published, and the checkpoint that is shipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from policies.act.config import ActConfig
from policies.act.weights import ActWeights
from policies.checkpoint.extras import Extras
from policies.checkpoint.load import load_weights
from policies.checkpoint.save import Saved, save_ilstudio
from policies.checkpoint.untrained import random_weights

SHIPPED = Path(__file__).parents[2] / "ckpt" / "act_sim_transfer_cube_scripted_zscore_example"
FULL = ActConfig(state_dim=14, action_dim=14, chunk_size=100, n_cameras=1, image_hw=(480, 640))
"""As published: 51.6 million parameters with the style encoder, 34.2 million without it."""

SIZES: dict[str, ActConfig] = {
    "full, 1 camera": FULL,
    "full, 4 cameras": dataclasses.replace(FULL, n_cameras=4),
}
SMALL = "shipped"
NETS = (SMALL, *SIZES)
N_OBSERVATIONS = 4


@contextmanager
def checkpoint_of(net: str) -> Iterator[Path]:
    """The folder of one of ``NETS``; a network without a checkpoint gets random weights."""
    if net == SMALL:
        yield SHIPPED
        return
    with TemporaryDirectory(prefix="metronome-bench-") as folder:
        weights = random_weights(SIZES[net])
        statistics = {
            "state": _statistics(weights.state_normalizer.shift, weights.state_normalizer.scale),
            "action": _statistics(weights.action_normalizer.shift, weights.action_normalizer.scale),
        }
        save_ilstudio(
            Path(folder),
            Saved(
                config=weights.config,
                tensors=weights.tensors,
                stats=statistics,
                dataset_id="random",
                extras=Extras(cameras=weights.cameras, trained=False),
            ),
        )
        yield Path(folder)


def load(folder: Path) -> ActWeights:
    return load_weights(str(folder))


def observations(
    config: ActConfig, seed: int = 0
) -> list[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    """``N_OBSERVATIONS`` of (N, H, W, 3) uint8 pictures and (S,) normalized states."""
    rng = np.random.default_rng(seed)
    shape = (config.n_cameras, *config.image_hw, 3)
    return [
        (
            rng.integers(0, 256, shape, dtype=np.uint8),
            rng.normal(size=config.state_dim).astype(np.float32),
        )
        for _ in range(N_OBSERVATIONS)
    ]


def _statistics(mean: NDArray[np.float64], std: NDArray[np.float64]) -> dict[str, list[float]]:
    """All that a layout may ask for, of a normal distribution."""
    sigmas = {"mean": 0.0, "min": -3.0, "max": 3.0, "q01": -2.3, "q99": 2.3}
    return {
        **{name: (mean + k * std).tolist() for name, k in sigmas.items()},
        "std": std.tolist(),
    }
