"""Converts a checkpoint's weights to ``FusedAct``. Every step is exact algebra, no approximation.

* Batch-norm goes into the convolutions, and so does the division of the images by 255 and by their
  standard deviation. The mean is still subtracted from the image, because the convolution pads
  after that.
* A projection of ``x + pos`` is a projection of ``x`` plus a table of constants. So an attention's
  queries, keys and values are one product. 1 / sqrt(d) goes into the queries.
* A bias of the keys adds one number to all scores of a query, which softmax ignores. A bias of the
  values passes unchanged through attention, which is an average, into the bias after it.
* The first decoder layer's input is zero. So its self-attention is a constant, and so are the
  queries of its cross-attention.

Constants are computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policies.act.backbone import fold_batch_norm
from policies.act.config import BLOCKS, CHANNELS, ActConfig
from policies.act.fused_model import (
    BLOCK_CHANNELS,
    FirstDecoderLayer,
    FusedAct,
    FusedAttention,
    FusedBackbone,
    FusedBlock,
    FusedEncoderLayer,
    FusedFeedForward,
    LaterDecoderLayer,
)
from policies.act.transformer import grid_positions
from policies.act.weights import ActWeights

Doubles = Mapping[str, Tensor]
"""Weights in float64, by ``ActModel``'s names."""


def fuse(weights: ActWeights, *, pixel_unit: float = 1.0, space_to_depth: bool = False) -> FusedAct:
    """Return the network of ``weights``, float32 on the CPU, with channels-last convolutions.

    Args:
        weights: The checkpoint.
        pixel_unit: Input of the first convolution for a pixel difference of 1. A number format of
            narrow range needs a power of two below 1, which makes the images' values small and the
            weights large.
        space_to_depth: The first convolution is one of 2 x 2 blocks of pixels; see
            ``policies.act.fused_model.space_to_depth``.
    """
    config = weights.config
    trunk = {k: v.double() for k, v in weights.tensors.items() if not k.startswith("style.")}
    doubles = fold_batch_norm(trunk)
    mean, std = (_double(x) for x in (weights.image_mean, weights.image_std))
    # The standard deviation of a backbone's first camera goes into the weights. Another camera of
    # that backbone with its own deviation has its images rescaled.
    for name, deviation in zip(config.backbone_names, std, strict=False):
        doubles[f"{name}.conv1.weight"] /= 255 * pixel_unit * deviation[:, None, None]
    scale = pixel_unit * (torch.ones_like(std) if config.backbone_per_camera else std[0] / std)
    pos = torch.cat(
        (
            doubles["token_pos.weight"],
            grid_positions(*config.features_hw, config.width).repeat(config.n_cameras, 1).double(),
        )
    )
    normalizer = weights.action_normalizer
    limits = _double(normalizer.lower), _double(normalizer.upper)
    fused = FusedAct(
        config,
        pixel_mean=_single((255 * mean)[:, None, None, :]),
        pixel_scale=None if bool((scale == 1).all()) else _single(scale[:, None, None, :]),
        backbones=[
            _backbone(config, doubles, name, space_to_depth=space_to_depth)
            for name in config.backbone_names
        ],
        image_proj=_linear(doubles["image_proj.weight"].flatten(1), doubles["image_proj.bias"]),
        style_token=_single(doubles["latent_proj.bias"]),
        state_proj=_named_linear(doubles, "state_proj"),
        encoder=[
            FusedEncoderLayer(
                _self_attention(config, doubles, f"encoder.{i}.self_attn", pos),
                _norm(doubles, f"encoder.{i}.norm1"),
                _feed_forward(config, doubles, f"encoder.{i}", "norm2"),
            )
            for i in range(config.n_encoder_layers)
        ],
        first=_first_decoder_layer(config, doubles, pos),
        later=[
            _later_decoder_layer(config, doubles, f"decoder.{i}", pos)
            for i in range(1, config.n_decoder_layers)
        ],
        norm=_norm(doubles, "decoder_norm"),
        action_head=_named_linear(doubles, "action_head"),
        action_scale=_single(_double(normalizer.scale)),
        action_shift=_single(_double(normalizer.shift)),
        action_limits=(
            (_single(limits[0]), _single(limits[1]))
            if any(bool(torch.isfinite(limit).any()) for limit in limits)
            else None
        ),
        space_to_depth=space_to_depth,
    )
    return fused.eval().requires_grad_(False)


def _backbone(
    config: ActConfig, doubles: Doubles, name: str, *, space_to_depth: bool
) -> FusedBackbone:
    blocks = []
    for stage, count in enumerate(BLOCKS[config.backbone][: len(CHANNELS)], start=1):
        for block in range(count):
            at = f"{name}.layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            downsample = _conv(doubles, f"{at}.downsample.0", stride=2) if stride == 2 else None
            blocks.append(
                FusedBlock(
                    _conv(doubles, f"{at}.conv1", stride=stride),
                    _conv(doubles, f"{at}.conv2", stride=1),
                    downsample,
                )
            )
    stem = _block_stem if space_to_depth else partial(_conv, stride=2)
    return FusedBackbone(stem(doubles, f"{name}.conv1"), blocks)


def _block_stem(doubles: Doubles, name: str) -> nn.Conv2d:
    """Return the 7 x 7 convolution with stride 2 as one of ``space_to_depth``."""
    weight = F.pad(doubles[f"{name}.weight"], (1, 0, 1, 0))
    outputs = len(weight)
    # (outputs, colours, 4, row, 4, column) to (outputs, row, column, colours, 4, 4)
    blocks = weight.reshape(outputs, -1, 4, 2, 4, 2).permute(0, 3, 5, 1, 2, 4)
    blocks = blocks.reshape(outputs, -1, 4, 4)
    weight = F.pad(blocks, (0, 0, 0, 0, 0, BLOCK_CHANNELS - blocks.shape[1]))
    return _convolution(weight, doubles[f"{name}.bias"], stride=1, padding=0)


def _self_attention(config: ActConfig, doubles: Doubles, name: str, pos: Tensor) -> FusedAttention:
    q, k, v = doubles[f"{name}.in_proj_weight"].chunk(3)
    query_bias, _, value_bias = doubles[f"{name}.in_proj_bias"].chunk(3)
    scale = _query_scale(config)
    table = torch.cat(((pos @ q.T + query_bias) * scale, pos @ k.T, torch.zeros_like(pos)), dim=1)
    return FusedAttention(
        config.n_heads,
        _linear(torch.cat((q * scale, k, v)), None),
        _single(table),
        _attention_out(doubles, name, value_bias),
    )


def _cross_attention(
    config: ActConfig, doubles: Doubles, name: str, pos: Tensor, added: Tensor | None = None
) -> FusedAttention:
    """Fuse a cross-attention's keys and values; ``added`` (D,) is added to its output."""
    _, k, v = doubles[f"{name}.in_proj_weight"].chunk(3)
    _, _, value_bias = doubles[f"{name}.in_proj_bias"].chunk(3)
    table = torch.cat((pos @ k.T, torch.zeros_like(pos)), dim=1)
    return FusedAttention(
        config.n_heads,
        _linear(torch.cat((k, v)), None),
        _single(table),
        _attention_out(doubles, name, value_bias, added),
    )


def _cross_query(config: ActConfig, doubles: Doubles, name: str) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a cross-attention's queries, scaled by 1 / sqrt(d)."""
    weight = doubles[f"{name}.in_proj_weight"].chunk(3)[0]
    bias = doubles[f"{name}.in_proj_bias"].chunk(3)[0]
    scale = _query_scale(config)
    return weight * scale, bias * scale


def _first_decoder_layer(config: ActConfig, doubles: Doubles, pos: Tensor) -> FirstDecoderLayer:
    at = "decoder.0"
    own = f"{at}.self_attn"
    value_bias = doubles[f"{own}.in_proj_bias"].chunk(3)[2]
    attended = doubles[f"{own}.out_proj.weight"] @ value_bias + doubles[f"{own}.out_proj.bias"]
    x = F.layer_norm(
        attended,
        attended.shape,
        doubles[f"{at}.norm1.weight"],
        doubles[f"{at}.norm1.bias"],
    )
    weight, bias = _cross_query(config, doubles, f"{at}.multihead_attn")
    return FirstDecoderLayer(
        _single((x + doubles["query_pos.weight"]) @ weight.T + bias),
        _cross_attention(config, doubles, f"{at}.multihead_attn", pos, added=x),
        _norm(doubles, f"{at}.norm2"),
        _feed_forward(config, doubles, at, "norm3"),
    )


def _later_decoder_layer(
    config: ActConfig, doubles: Doubles, at: str, pos: Tensor
) -> LaterDecoderLayer:
    query_pos = doubles["query_pos.weight"]
    weight, bias = _cross_query(config, doubles, f"{at}.multihead_attn")
    return LaterDecoderLayer(
        attention=_self_attention(config, doubles, f"{at}.self_attn", query_pos),
        norm1=_norm(doubles, f"{at}.norm1"),
        query=_linear(weight, None),
        query_table=_single(query_pos @ weight.T + bias),
        cross=_cross_attention(config, doubles, f"{at}.multihead_attn", pos),
        norm2=_norm(doubles, f"{at}.norm2"),
        feed_forward=_feed_forward(config, doubles, at, "norm3"),
    )


def _query_scale(config: ActConfig) -> float:
    return 1 / math.sqrt(config.width // config.n_heads)


def _attention_out(
    doubles: Doubles, name: str, value_bias: Tensor, added: Tensor | None = None
) -> nn.Linear:
    weight, bias = doubles[f"{name}.out_proj.weight"], doubles[f"{name}.out_proj.bias"]
    bias = bias + weight @ value_bias
    return _linear(weight, bias if added is None else bias + added)


def _feed_forward(config: ActConfig, doubles: Doubles, at: str, norm: str) -> FusedFeedForward:
    return FusedFeedForward(
        _named_linear(doubles, f"{at}.linear1"),
        _named_linear(doubles, f"{at}.linear2"),
        _norm(doubles, f"{at}.{norm}"),
        gelu=config.activation == "gelu",
    )


def _conv(doubles: Doubles, name: str, stride: int) -> nn.Conv2d:
    weight = doubles[f"{name}.weight"]
    bias = doubles[f"{name}.bias"]
    return _convolution(weight, bias, stride=stride, padding=weight.shape[-1] // 2)


def _convolution(weight: Tensor, bias: Tensor, *, stride: int, padding: int) -> nn.Conv2d:
    outputs, inputs, kernel, _ = weight.shape
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, device="meta")
    conv.weight = nn.Parameter(_single(weight).contiguous(memory_format=torch.channels_last))
    conv.bias = nn.Parameter(_single(bias))
    return conv


def _named_linear(doubles: Doubles, name: str) -> nn.Linear:
    return _linear(doubles[f"{name}.weight"], doubles[f"{name}.bias"])


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(_single(weight))
    if bias is not None:
        linear.bias = nn.Parameter(_single(bias))
    return linear


def _norm(doubles: Doubles, name: str) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(doubles[f"{name}.weight"]), device="meta")
    norm.weight = nn.Parameter(_single(doubles[f"{name}.weight"]))
    norm.bias = nn.Parameter(_single(doubles[f"{name}.bias"]))
    return norm


def _double(values: object) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _single(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()
