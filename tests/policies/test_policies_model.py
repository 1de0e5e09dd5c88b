"""The shortcuts of the network are exact."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_act import TINY
from torch import nn

from policies.act.backbone import Backbone, fold_batch_norm
from policies.act.config import ActConfig
from policies.act.model import ActModel
from policies.act.transformer import Attention, DecoderLayer, EncoderLayer, grid_positions
from policies.errors import CheckpointError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.usefixtures("full_width")
def test_folding_batch_norm_changes_nothing():
    plain = Backbone("resnet18", folded=False).eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    weights = {f"backbone.{k}": v for k, v in plain.state_dict().items()}
    folded = Backbone("resnet18", folded=True).eval()
    folded.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in fold_batch_norm(weights).items()}
    )
    x = torch.randn(2, 3, 64, 96)
    expected, got = plain(x), folded(x)
    assert got.shape == (2, 512, 2, 3)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_attention_over_zeros_is_a_constant():
    attention = Attention(16, 2, 0.0)
    nn.init.normal_(attention.in_proj_bias)
    zeros, queries = torch.zeros(1, 7, 16), torch.randn(1, 5, 16)
    full = attention(queries, torch.randn(1, 7, 16), zeros)
    torch.testing.assert_close(full, attention.zero_value_output().expand(1, 5, -1))


def test_the_first_decoder_layer_sees_zeros():
    layer = DecoderLayer(TINY).eval()
    memory, keys, query_pos = torch.randn(2, 7, 16), torch.randn(2, 7, 16), torch.randn(5, 16)
    shortcut = layer(None, query_pos, memory, keys)
    torch.testing.assert_close(shortcut, layer(torch.zeros(2, 5, 16), query_pos, memory, keys))


def test_encoder_layer_is_torchs_where_there_are_no_positions():
    ours = EncoderLayer(TINY).eval()
    theirs = nn.TransformerEncoderLayer(16, 2, 8, batch_first=True).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 16)
    hidden = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    # Gradients on keep torch off its fused path, which zeroes hidden tokens.
    expected = theirs(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(ours(x, torch.zeros(7, 16), hidden), expected)


def test_cameras_as_one_batch_are_cameras_one_by_one():
    model = ActModel(TINY).eval()
    images = torch.randint(0, 256, (3, 2, 32, 64, 3), dtype=torch.uint8)
    together = model.image_tokens(images)
    assert together.shape == (3, 2 * 1 * 2, 16)
    alone = [model.image_proj(model.backbone(model.normalize_images(images)[i::2])) for i in (0, 1)]
    tokens = torch.cat([a.flatten(2).transpose(1, 2) for a in alone], 1)
    torch.testing.assert_close(together, tokens)


def test_each_camera_has_its_backbone():
    model = ActModel(dataclasses.replace(TINY, backbone_per_camera=True)).eval()
    images = torch.randint(0, 256, (3, 2, 32, 64, 3), dtype=torch.uint8)
    pictures = model.normalize_images(images).reshape(3, 2, 3, 32, 64)
    alone = [model.image_proj(model.backbones[i](pictures[:, i])) for i in (0, 1)]
    assert not torch.allclose(alone[0], model.image_proj(model.backbones[1](pictures[:, 0])))
    tokens = torch.cat([a.flatten(2).transpose(1, 2) for a in alone], 1)
    torch.testing.assert_close(model.image_tokens(images), tokens)


@pytest.mark.parametrize("backbone_per_camera", [False, True])
def test_every_input_counts(backbone_per_camera):
    model = ActModel(dataclasses.replace(TINY, backbone_per_camera=backbone_per_camera)).eval()
    images = torch.randint(0, 256, (1, 2, 32, 64, 3), dtype=torch.uint8)
    state = torch.randn(1, 3)
    base = model(images, state)
    assert base.shape == (1, 5, 2)
    for camera in (0, 1):
        other = images.clone()
        other[:, camera] = 255 - other[:, camera]
        assert not torch.equal(model(other, state), base)
    assert not torch.equal(model(images, state + 1), base)
    assert not torch.equal(model(images, state, torch.ones(1, 32)), base)
    torch.testing.assert_close(model(images, state, torch.zeros(1, 32)), base)
    assert not torch.equal(model(images.flip(1), state), base)


def test_grid_positions_are_all_different_and_bounded():
    grid = grid_positions(5, 7, 16)
    assert grid.shape == (35, 16)
    assert grid.abs().max() <= 1
    assert len(torch.unique(grid, dim=0)) == 35


def test_resnet34_is_deeper():
    model = ActModel(dataclasses.replace(TINY, backbone="resnet34"))
    assert len(model.get_submodule("backbone.layer3")) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 3}, "n_heads: got 3 for width 16, expected a divisor"),
        ({"image_hw": (31, 64)}, r"image_hw: got \(31, 64\), expected 32 to 8192"),
        ({"backbone": "vit"}, "backbone: got 'vit', expected one of"),
        ({"activation": "glu"}, "activation: got 'glu', expected one of"),
        ({"image_hw": (32, 10**6)}, r"image_hw: got \(32, 1000000\), expected 32 to 8192"),
        ({"width": 10**30}, "width: got 1000000000000000000000000000000, expected 1 to"),
        ({"n_encoder_layers": 10**9}, "n_encoder_layers: got 1000000000, expected 1 to 64"),
        ({"chunk_size": 0}, "chunk_size: got 0, expected 1 to 16384"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        ActConfig(**{**dataclasses.asdict(TINY), **change})
