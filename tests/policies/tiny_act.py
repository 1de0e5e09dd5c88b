"""Sizes, cameras and observations of a checkpoint that is made in a moment."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from policies.act import backbone, model
from policies.act.config import CHANNELS, ActConfig
from policies.types import CameraContract, MetaObs, PolicyContract


def needs_gpu(test):
    """Without a GPU the test is skipped; it is not counted among those of ``make test``."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.long(skip(test))


needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)

TINY = ActConfig(
    state_dim=3,
    action_dim=2,
    chunk_size=5,
    n_cameras=2,
    image_hw=(32, 64),
    width=16,
    n_heads=2,
    feedforward=8,
    n_encoder_layers=1,
    n_style_layers=1,
)
CAMERAS = (
    CameraContract("top", source_hw=(40, 64), crop=(4, 0, 32, 64), model_hw=(32, 64)),
    CameraContract("wrist", source_hw=(64, 128), model_hw=(32, 64), resize="area"),
)


@contextlib.contextmanager
def narrow_backbones() -> Iterator[None]:
    """A quarter of the channels, so a sixteenth of the weights: 3 MB instead of 45."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (backbone, model):
            patch.setattr(module, "CHANNELS", tuple(n // 4 for n in CHANNELS))
        yield


def observation(contract: PolicyContract, seed: int = 0) -> MetaObs:
    """A random one of the source sizes."""
    rng = np.random.default_rng(seed)
    images = {
        c.name: rng.integers(0, 256, (*c.source_hw, 3), dtype=np.uint8) for c in contract.cameras
    }
    return MetaObs(images, rng.normal(size=contract.state_dim).astype(np.float32), timestep=7)
