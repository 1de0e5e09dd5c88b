"""The fused network is the plain one, to the rounding of float32."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny_act import TINY

from policies.act.config import ActConfig
from policies.act.weight_fusion import fuse
from policies.act.weights import ActWeights
from policies.checkpoint.load import load_weights
from policies.checkpoint.untrained import random_weights
from policies.normalizer import percentile

EXACT = 1e-5
"""Of max|a - b| / max|b|."""


def inputs(config: ActConfig, batch: int = 1, seed: int = 0):
    """Random (B, N, H, W, 3) pictures and (B, S) normalized states."""
    random = torch.Generator().manual_seed(seed)
    shape = (batch, config.n_cameras, *config.image_hw, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    return images, torch.randn((batch, config.state_dim), generator=random)


def plain_actions(weights: ActWeights, images, state):
    """What the reference gives, in physical units."""
    with torch.inference_mode():
        normalized = weights.inference_model()(images, state)
    return weights.action_normalizer.denormalize(normalized.numpy())


def error_of(weights: ActWeights, batch: int = 1, **arguments) -> float:
    """The largest difference between the two, in the network's units: no shift hides it."""
    images, state = inputs(weights.config, batch)
    normalizer = weights.action_normalizer
    plain = plain_actions(weights, images, state)
    with torch.inference_mode():
        fused = fuse(weights, **arguments)(images, state).numpy()
    assert fused.dtype == np.float32
    assert fused.shape == plain.shape
    differences = np.abs(fused - plain) / normalizer.scale
    return float(differences.max() / np.abs((plain - normalizer.shift) / normalizer.scale).max())


SIZES = {
    "two cameras": {},
    "one camera": {"n_cameras": 1},
    "four cameras": {"n_cameras": 4},
    "a backbone for each camera": {"n_cameras": 3, "backbone_per_camera": True},
    "one camera with a backbone of its own": {"n_cameras": 1, "backbone_per_camera": True},
    "sizes that 32 does not divide": {"image_hw": (70, 45)},
    "every decoder layer counts": {"n_decoder_layers": 3},
    "deeper": {"backbone": "resnet34", "n_encoder_layers": 3},
    "gelu": {"activation": "gelu"},
    "heads of 12": {"width": 48, "n_heads": 4},
}


@pytest.mark.parametrize("case", SIZES)
def test_it_is_the_plain_network(case):
    weights = random_weights(dataclasses.replace(TINY, **SIZES[case]))
    assert error_of(weights, batch=2) <= EXACT


@pytest.mark.parametrize("backbone_per_camera", [False, True])
def test_each_camera_is_normalized_by_its_own_statistics(backbone_per_camera):
    weights = dataclasses.replace(
        random_weights(dataclasses.replace(TINY, backbone_per_camera=backbone_per_camera)),
        image_mean=((0.4, 0.5, 0.6), (0.0, 0.0, 0.0)),
        image_std=((0.2, 0.3, 0.1), (1.0, 1.0, 1.0)),
    )
    assert error_of(weights) <= EXACT


@pytest.mark.parametrize("backbone_per_camera", [False, True])
def test_the_unit_of_the_pixels_changes_nothing(backbone_per_camera):
    weights = random_weights(dataclasses.replace(TINY, backbone_per_camera=backbone_per_camera))
    assert error_of(weights, pixel_unit=2**-6) <= EXACT
    assert fuse(weights, pixel_unit=2**-6).features(inputs(TINY)[0]).max() > 0


def test_a_normalizer_that_clips_still_does():
    weights = random_weights(TINY)
    narrow = percentile([-0.01, -3.0], [0.01, 3.0])
    weights = dataclasses.replace(weights, action_normalizer=narrow)
    weights.tensors["action_head.bias"][:] = 2.0
    images, state = inputs(TINY)
    with torch.inference_mode():
        actions = fuse(weights)(images, state).numpy()
    assert np.abs(actions[..., 0]).max() == np.float32(0.01)
    np.testing.assert_allclose(actions, plain_actions(weights, images, state), atol=1e-6)


def test_what_the_first_decoder_layer_does_not_need_is_not_there():
    """Half of the original's transformer is layers that nobody reads and a query of constants."""
    fused = fuse(random_weights(TINY))
    names = dict(fused.named_parameters())
    assert not [name for name in names if name.startswith("later.")]
    assert not [name for name in names if "latent" in name or "query" in name]
    assert fused.first.cross.project.out_features == 2 * TINY.width
    assert not [name for name in names if name.endswith("project.bias")]


def test_bfloat16_is_near_and_its_actions_are_float32():
    weights = random_weights(TINY)
    images, state = inputs(TINY)
    fused = fuse(weights).set_dtype(torch.bfloat16)
    assert fused.dtype == torch.bfloat16
    with torch.inference_mode():
        actions = fused(images, state).numpy()
    plain = plain_actions(weights, images, state)
    assert actions.dtype == np.float32
    assert 0 < np.abs(actions - plain).max() / np.abs(plain).max() <= 2e-2


REFERENCES = [
    ("lerobot_act", {}),
    ("lerobot_act_buffers", {}),
    ("original_act", {"camera_names": ["top", "angle"], "n_heads": 8, "image_hw": (96, 128)}),
    ("ilstudio_act", {"image_hw": (96, 128)}),
    ("ilstudio_act", {"image_hw": (96, 128), "dataset_id": "other_robot"}),
]
"""Checkpoints of others, and what their layout does not say."""


@pytest.mark.needs_reference
@pytest.mark.usefixtures("full_width")
@pytest.mark.parametrize(("folder", "arguments"), REFERENCES)
def test_it_is_the_plain_network_on_reference_checkpoints(reference, folder, arguments):
    weights = load_weights(str(reference / folder / "checkpoint"), **arguments)
    assert error_of(weights, batch=2) <= EXACT
