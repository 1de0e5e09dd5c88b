"""What the roofline is drawn from, against torch's own counter and against hand counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.inference.roofline import (
    Machine,
    Work,
    layered_bound_s,
    necessary_work,
    operations,
    plain_flops,
    tokens,
)
from policies.act.config import ActConfig
from policies.act.model import ActModel

FULL = ActConfig(state_dim=14, action_dim=14, chunk_size=100, n_cameras=1, image_hw=(480, 640))
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
)
CONFIGS = {
    "tiny": TINY,
    "full": FULL,
    "full, 4 cameras": dataclasses.replace(FULL, n_cameras=4),
    "a backbone for each camera": dataclasses.replace(TINY, backbone_per_camera=True),
    "odd sizes": dataclasses.replace(TINY, image_hw=(75, 133), n_cameras=3),
    "deep": dataclasses.replace(TINY, backbone="resnet34", n_encoder_layers=3, n_decoder_layers=2),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ActConfig:
    return CONFIGS[request.param]


def model_on_meta(config: ActConfig) -> ActModel:
    with torch.device("meta"):
        model = ActModel(config, folded=True).eval().requires_grad_(False)
    # Positions are computed on the CPU whatever the default device is.
    return model.to("meta")


def test_flops_are_those_that_torch_counts(config: ActConfig) -> None:
    images = torch.zeros((1, config.n_cameras, *config.image_hw, 3), dtype=torch.uint8)
    state = torch.zeros(1, config.state_dim)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model_on_meta(config)(images.to("meta"), state.to("meta"))
    assert counter.get_total_flops() == plain_flops(config)


def test_weights_are_the_models(config: ActConfig) -> None:
    """All that is multiplied by, and its biases; norms and embeddings are not matrix products."""
    held = {
        name: tensor.numel()
        for name, tensor in model_on_meta(config).named_parameters()
        if "norm" not in name and "_pos." not in name and not name.startswith("latent_proj.")
    }
    # Of the first decoder layer's self-attention over zeros, only the output projection is used.
    unused = sum(held[f"decoder.0.self_attn.in_proj_{what}"] for what in ("weight", "bias"))
    assert sum(op.weights for op in operations(config)) == sum(held.values()) - unused


def test_full_size_by_hand() -> None:
    by_name = {op.name: op for op in operations(FULL)}
    assert tokens(FULL) == 2 + 15 * 20
    assert by_name["backbone.conv1"].flops == 2 * 7 * 7 * 3 * 64 * 240 * 320
    assert by_name["backbone.layer4.1.conv2"].flops == 2 * 3 * 3 * 512 * 512 * 15 * 20
    assert by_name["encoder.3.linear1"].flops == 2 * 302 * 512 * 3200
    assert by_name["encoder.0.self_attn.scores"].flops == 2 * 302 * 302 * 512


def test_constants_are_not_necessary() -> None:
    work = necessary_work(FULL, bytes_per_weight=4)
    width, chunk = FULL.width, FULL.chunk_size
    query, value_of_zeros = 2 * chunk * width**2, 2 * width**2
    assert work.flops == plain_flops(FULL) - query - value_of_zeros


def test_halving_the_weights_halves_their_bytes_only() -> None:
    wide, narrow = (necessary_work(FULL, size) for size in (4, 2))
    pictures = 480 * 640 * 3
    numbers = 4 * (14 + 100 * 14)
    assert wide.flops == narrow.flops
    assert wide.n_bytes - pictures - numbers == 2 * (narrow.n_bytes - pictures - numbers)


@pytest.mark.parametrize(
    ("work", "bound_s"), [(Work(200, 10), 2.0), (Work(10, 200), 4.0)], ids=["compute", "memory"]
)
def test_bound_is_the_slower_of_the_two(work: Work, bound_s: float) -> None:
    assert Machine(flops_per_s=100, bytes_per_s=50).bound_s(work) == bound_s


def test_layer_by_layer_takes_the_slower_of_the_two_in_each(config: ActConfig) -> None:
    work = necessary_work(config, bytes_per_weight=4)
    weights = sum(op.weights for op in operations(config) if not op.constant)
    computing, fetching = Machine(1e9, 1e30), Machine(1e30, 1e9)
    assert layered_bound_s(config, 4, computing) == pytest.approx(work.flops / 1e9)
    assert layered_bound_s(config, 4, fetching) == pytest.approx(4 * weights / 1e9)
    both = layered_bound_s(config, 4, Machine(1e9, 1e9))
    assert max(work.flops, 4 * weights) / 1e9 < both < (work.flops + 4 * weights) / 1e9
