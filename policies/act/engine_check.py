"""How far an engine is from float32 torch, measured before anybody is served."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from policies.act.config import ActConfig
from policies.act.engine import Engine, Frames
from policies.act.fused_model import FusedAct

LIMITS = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
"""Largest error, by precision, that is taken without a word."""


def probe(config: ActConfig) -> Frames:
    """One observation: smooth in one half of each picture and noise in the other; any state."""
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
    """(T, A) what ``fused``, in float32 on the CPU, says to ``probe``."""
    frames = probe(fused.config)
    with torch.inference_mode():
        images = torch.from_numpy(np.stack(frames.images)[None])
        state = torch.from_numpy(frames.state[None])
        actions: NDArray[np.float32] = fused(images, state)[0].numpy()
    return actions


def error_of(engine: Engine, config: ActConfig, reference: NDArray[np.float32]) -> float:
    """max |a - b| / max |b| of ``engine`` against ``reference``; infinity where it is not finite.

    Raises:
        InferenceError: The engine failed.
    """
    actions = engine.run([probe(config)])[0]
    if not np.isfinite(actions).all():
        return float("inf")
    return float(np.abs(actions - reference).max() / max(np.abs(reference).max(), 1e-12))
