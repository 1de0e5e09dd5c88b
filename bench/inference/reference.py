"""The plain module in torch, as it is and compiled: what everything else is held against."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from bench.inference.contestants import Absent, Run, Setting
from policies.act.weights import ActWeights


def plain(weights: ActWeights, setting: Setting) -> Run:
    """The readable reference, called as anyone would."""
    torch.set_num_threads(setting.threads)
    return _runner(weights, weights.inference_model().to(setting.device), setting.device)


def compiled(weights: ActWeights, setting: Setting) -> Run:
    """``torch.compile`` at its best for one shape; wants a C++ compiler, and a minute.

    Raises:
        Absent: It was not asked for.
    """
    if os.environ.get("INFERENCE_COMPILE") != "1":
        raise Absent("compiles for a minute: INFERENCE_COMPILE=1 asks for it")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(setting.cache)
    import torch._inductor.config

    torch.set_num_threads(setting.threads)
    torch._inductor.config.freezing = True
    model = weights.inference_model().to(setting.device)
    mode = "reduce-overhead" if setting.device == "cuda" else None
    return _runner(weights, torch.compile(model, dynamic=False, mode=mode), setting.device)


def _runner(weights: ActWeights, model: Callable[..., torch.Tensor], device: str) -> Run:
    denormalize = weights.action_normalizer.denormalize

    def run(images: NDArray[np.uint8], state: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            actions = model(
                torch.from_numpy(images)[None].to(device), torch.from_numpy(state)[None].to(device)
            )
            return denormalize(actions[0].cpu().numpy())

    return run
