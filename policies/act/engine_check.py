"""Measures an engine's error against float32 torch before the first request."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from policies.act.config import ActConfig
from policies.act.engine import Engine, Frames
from policies.act.fused_model import FusedAct

MAX_RELATIVE_ERROR = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
"""Largest error, by precision, that is accepted without a warning."""


def probe(config: ActConfig) -> Frames:
    """Return one fixed observation: each image half smooth and half noise, and a random state."""
    random = np.random.default_rng(0)
    height, width = config.image_hw
    images = []
    for _ in range(config.n_cameras):
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ramp = np.linspace(0, 255, width // 2).astype(np.uint8)
        image[:, : width // 2] = ramp[None, :, None]
        images.append(image)
    return Frames(images, random.normal(size=config.state_dim).astype(np.float32))


def reference_actions(fused: FusedAct) -> NDArray[np.float32]:
    """Return (T, A), the actions of ``fused``, in float32 on the CPU, for ``probe``."""
    frames = probe(fused.config)
    with torch.inference_mode():
        images = torch.from_numpy(np.stack(frames.images)[None])
        state = torch.from_numpy(frames.state[None])
        actions: NDArray[np.float32] = fused(images, state)[0].numpy()
    return actions


def relative_error(engine: Engine, config: ActConfig, reference: NDArray[np.float32]) -> float:
    """Return max |a - b| / max |b| of ``engine`` against ``reference``; infinity if not finite.

    Raises:
        InferenceError: The engine failed.
    """
    actions = engine.run([probe(config)])[0]
    if not np.isfinite(actions).all():
        return float("inf")
    return float(np.abs(actions - reference).max() / max(np.abs(reference).max(), 1e-12))
