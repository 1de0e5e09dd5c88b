"""Builds ``FusedAct`` as an OpenVINO model, operation by operation.

A converter would trace the module and add its own casts, reshapes and shape arithmetic to the
graph. Built by hand, the graph has exactly these operations. It takes one observation and has
static shapes.

Inputs: for each camera (1, H, W, 3) uint8, named ``image_0``..., and ``state`` (1, S) float32,
normalized. Output: ``actions`` (1, T, A) float32, physical units.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from policies.act.fused_model import (
    FirstDecoderLayer,
    FusedAct,
    FusedAttention,
    FusedBackbone,
    FusedBlock,
    FusedEncoderLayer,
    FusedFeedForward,
    LaterDecoderLayer,
)
from policies.act.openvino_import import op, ov

Node = Any
"""``openvino.Node`` or one of its outputs."""


def build_graph(fused: FusedAct) -> ov.Model:
    """Return the model. ``fused`` is float32 on the CPU; the model shares its weights, not copies
    them.
    """
    config = fused.config
    shape = [1, *config.image_hw, 3]
    images = [op.parameter(shape, np.uint8, name=f"image_{i}") for i in range(config.n_cameras)]
    state = op.parameter([1, config.state_dim], np.float32, name="state")
    memory = _tokens(fused, images, state)
    for layer in cast("list[FusedEncoderLayer]", list(fused.encoder)):
        attended = op.add(_attention(layer.attention, memory), memory)
        memory = _feed_forward(layer.feed_forward, _norm(layer.norm, attended))
    y = _first_decoder_layer(fused.first, memory)
    for decoder in cast("list[LaterDecoderLayer]", list(fused.later)):
        y = _later_decoder_layer(decoder, y, memory)
    result = op.result(_physical(fused, _linear(fused.action_head, _norm(fused.norm, y))))
    result.output(0).set_names({"actions"})
    return ov.Model([result], [*images, state], "act")


def _tokens(fused: FusedAct, images: list[Node], state: Node) -> Node:
    features = op.transpose(_features(fused, images), [0, 2, 3, 1])
    flat = op.reshape(features, [1, -1, fused.image_proj.in_features], False)
    width = fused.config.width
    style = _constant(fused.style_token.reshape(1, 1, width))
    state_token = op.reshape(_linear(fused.state_proj, state), [1, 1, width], False)
    return op.concat([style, state_token, _linear(fused.image_proj, flat)], 1)


def _features(fused: FusedAct, images: list[Node]) -> Node:
    """Return (N, 512, h, w); cameras that share a backbone are one batch."""
    backbones = cast("list[FusedBackbone]", list(fused.backbones))
    if not fused.config.backbone_per_camera:
        return _backbone(backbones[0], _pixels(fused, images, slice(None)))
    return _concat(
        [
            _backbone(backbone, _pixels(fused, [image], slice(camera, camera + 1)))
            for camera, (backbone, image) in enumerate(zip(backbones, images, strict=True))
        ]
    )


def _concat(parts: list[Node]) -> Node:
    return parts[0] if len(parts) == 1 else op.concat(parts, 0)


def _pixels(fused: FusedAct, images: list[Node], cameras: slice) -> Node:
    """Return the images of ``cameras`` as float32 (N, 3, H, W), less their means.

    The transposition comes first, while a pixel is still one byte.
    """
    x = op.convert(op.transpose(_concat(images), [0, 3, 1, 2]), np.float32)
    x = op.subtract(x, _per_camera(fused.pixel_mean[cameras]))
    if fused.pixel_scale is not None:
        x = op.multiply(x, _per_camera(fused.pixel_scale[cameras]))
    return x


def _backbone(backbone: FusedBackbone, x: Node) -> Node:
    x = op.relu(_convolution(backbone.stem, x))
    pooled = op.max_pool(x, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3], index_element_type="i64")
    x = pooled.output(0)
    for block in cast("list[FusedBlock]", list(backbone.blocks)):
        y = _convolution(block.conv2, op.relu(_convolution(block.conv1, x)))
        skip = x if block.downsample is None else _convolution(block.downsample, x)
        x = op.relu(op.add(y, skip))
    return x


def _attention(attention: FusedAttention, x: Node, query: Node | None = None) -> Node:
    """Attend to ``x``; ``query`` (heads, T, d) where the queries are not those of ``x``.

    Queries, keys and values have no batch dimension: with one, OpenVINO 2026.4 computes nonsense
    where there are as many tokens as heads.
    """
    project, heads = attention.project, attention.n_heads
    width = attention.out.in_features
    projected = op.add(_linear(project, x), _constant(attention.table))
    parts = op.split(projected, 2, project.out_features // width).outputs()
    own = [_heads(part, heads, width) for part in parts]
    q, k, v = own if query is None else (query, *own)
    attended = op.scaled_dot_product_attention(q, k, v, scale=np.float32(1))
    flat = op.reshape(op.transpose(attended, [1, 0, 2]), [1, -1, width], False)
    return _linear(attention.out, flat)


def _heads(x: Node, heads: int, width: int) -> Node:
    """Reshape (1, tokens, D) to (heads, tokens, d)."""
    return op.transpose(op.reshape(x, [-1, heads, width // heads], False), [1, 0, 2])


def _feed_forward(module: FusedFeedForward, x: Node) -> Node:
    hidden = _linear(module.linear1, x)
    hidden = op.gelu(hidden, "erf") if module.gelu else op.relu(hidden)
    return _norm(module.norm, op.add(_linear(module.linear2, hidden), x))


def _first_decoder_layer(layer: FirstDecoderLayer, memory: Node) -> Node:
    queries, width = layer.query.shape
    heads = layer.cross.n_heads
    query = layer.query.reshape(queries, heads, width // heads).transpose(0, 1)
    y = _norm(layer.norm, _attention(layer.cross, memory, _constant(query)))
    return _feed_forward(layer.feed_forward, y)


def _later_decoder_layer(layer: LaterDecoderLayer, x: Node, memory: Node) -> Node:
    x = _norm(layer.norm1, op.add(_attention(layer.attention, x), x))
    query = op.add(_linear(layer.query, x), _constant(layer.query_table))
    query = _heads(query, layer.cross.n_heads, layer.query.out_features)
    y = _norm(layer.norm2, op.add(_attention(layer.cross, memory, query), x))
    return _feed_forward(layer.feed_forward, y)


def _physical(fused: FusedAct, normalized: Node) -> Node:
    """Convert to physical units, apart from the head's weights: in bfloat16 that keeps the shift
    exact.
    """
    scaled = op.multiply(normalized, _constant(fused.action_scale))
    actions = op.add(scaled, _constant(fused.action_shift))
    if fused.action_lower is None or fused.action_upper is None:
        return actions
    lower, upper = _constant(fused.action_lower), _constant(fused.action_upper)
    return op.minimum(op.maximum(actions, lower), upper)


def _convolution(conv: nn.Conv2d, x: Node) -> Node:
    stride, padding = list(conv.stride), [int(side) for side in conv.padding]
    y = op.convolution(x, _constant(conv.weight), stride, padding, padding, [1, 1])
    return y if conv.bias is None else op.add(y, _constant(conv.bias.reshape(1, -1, 1, 1)))


def _linear(linear: nn.Linear, x: Node) -> Node:
    y = op.matmul(x, _constant(linear.weight), False, True)
    return op.add(y, _constant(linear.bias)) if linear.bias is not None else y


def _norm(norm: nn.LayerNorm, x: Node) -> Node:
    y = op.mvn(x, np.array([-1]), True, norm.eps, "inside_sqrt")
    return op.add(op.multiply(y, _constant(norm.weight)), _constant(norm.bias))


def _per_camera(values: Tensor) -> Node:
    """Return (N, 1, 1, 3) as a constant for (N, 3, H, W); one row where all cameras have equal
    values.
    """
    rows = values.permute(0, 3, 1, 2)
    return _constant(rows[:1] if bool((rows == rows[:1]).all()) else rows)


def _constant(tensor: Tensor) -> Node:
    return op.constant(tensor.detach().contiguous().numpy(), shared_memory=True)
