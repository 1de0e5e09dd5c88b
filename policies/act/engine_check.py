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


PROBES = 2
"""Number of different observations."""


def probe(config: ActConfig, seed: int = 0) -> Frames:
    """Return a fixed observation: each image half smooth and half noise, and a random state."""
    random = np.random.default_rng(seed)
    height, width = config.image_hw
    images = []
    for _ in range(config.n_cameras):
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ramp = np.linspace(0, 255, width // 2).astype(np.uint8)
        image[:, : width // 2] = ramp[None, :, None]
        images.append(image)
    return Frames(images, random.normal(size=config.state_dim).astype(np.float32))


def reference_actions(fused: FusedAct) -> NDArray[np.float32]:
    """Return (``PROBES``, T, A), the actions of ``fused`` for each ``probe``, which is float32 on
    the CPU.
    """
    actions = []
    for seed in range(PROBES):
        frames = probe(fused.config, seed)
        with torch.inference_mode():
            images = torch.from_numpy(np.stack(frames.images)[None])
            state = torch.from_numpy(frames.state[None])
            actions.append(fused(images, state)[0].numpy())
    return np.stack(actions)


def relative_error(engine: Engine, config: ActConfig, reference: NDArray[np.float32]) -> float:
    """Return max |a - b| / max |b| of ``engine`` against ``reference``; infinity if not finite.

    Every prepared batch size runs, with the second probe in each place of the batch in turn: sizes
    may have other algorithms, and places may be mistaken for each other.

    Raises:
        InferenceError: The engine failed.
    """
    probes = [probe(config, seed) for seed in range(PROBES)]
    largest = 0.0
    for size in engine.sizes:
        for place in range(-1, size):
            members = [int(place == i) for i in range(size)]
            actions = engine.run([probes[member] for member in members])
            if not np.isfinite(actions).all():
                return float("inf")
            largest = max(largest, float(np.abs(actions - reference[members]).max()))
    return largest / max(float(np.abs(reference).max()), 1e-12)
