"""The original ACT's network, computed step by step from a checkpoint's own names.

Nothing of ``policies`` is used: batch-norm is not folded, pictures are joined along their width,
the decoder's first layer attends to its zeros, and all is float64.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS = 1e-5
BATCH_NORM = {
    "weight": (0.4, 0.8),
    "bias": (-0.1, 0.1),
    "running_mean": (-0.2, 0.2),
    "running_var": (0.5, 1.5),
}
"""Its parts, and the range that random ones come from."""
CHANNELS = (16, 32, 64, 128)
"""Of the backbone's stages: a quarter of ResNet18's, see ``tiny_act.narrow_backbones``."""


def random_state(
    *, cameras, backbones, state, action, chunk, width, feedforward, encoders, decoders, style=True
):
    """A state dict by act-plus-plus's names in which every tensor counts, float32."""
    random = torch.Generator().manual_seed(cameras)
    tensors = {}

    def add(name, *shape, low=-0.1, high=0.1):
        tensors[name] = low + (high - low) * torch.rand(shape, generator=random)

    def linear(name, outputs, inputs):
        bound = math.sqrt(3 / inputs)
        add(f"{name}.weight", outputs, inputs, low=-bound, high=bound)
        add(f"{name}.bias", outputs)

    def conv(name, norm, outputs, inputs, kernel):
        bound = math.sqrt(6 / (inputs * kernel**2))
        add(f"{name}.weight", outputs, inputs, kernel, kernel, low=-bound, high=bound)
        for part, (low, high) in BATCH_NORM.items():
            add(f"{norm}.{part}", outputs, low=low, high=high)

    def attention(name):
        add(f"{name}.in_proj_weight", 3 * width, width, low=-0.4, high=0.4)
        add(f"{name}.in_proj_bias", 3 * width)
        linear(f"{name}.out_proj", width, width)

    def norm(name):
        add(f"{name}.weight", width, low=0.8, high=1.2)
        add(f"{name}.bias", width)

    def layer(name, norms, *attentions):
        for each in attentions:
            attention(f"{name}.{each}")
        linear(f"{name}.linear1", feedforward, width)
        linear(f"{name}.linear2", width, feedforward)
        for i in range(norms):
            norm(f"{name}.norm{i + 1}")

    for camera in range(backbones):
        body = f"model.backbones.{camera}.0.body"
        conv(f"{body}.conv1", f"{body}.bn1", CHANNELS[0], 3, 7)
        inputs = CHANNELS[0]
        for stage, outputs in enumerate(CHANNELS, start=1):
            for block in range(2):
                at = f"{body}.layer{stage}.{block}"
                conv(f"{at}.conv1", f"{at}.bn1", outputs, inputs, 3)
                conv(f"{at}.conv2", f"{at}.bn2", outputs, outputs, 3)
                if inputs != outputs:
                    conv(f"{at}.downsample.0", f"{at}.downsample.1", outputs, inputs, 1)
                inputs = outputs
    add("model.input_proj.weight", width, CHANNELS[-1], 1, 1)
    add("model.input_proj.bias", width)
    linear("model.input_proj_robot_state", width, state)
    linear("model.latent_out_proj", width, 32)
    linear("model.action_head", action, width)
    linear("model.is_pad_head", 1, width)
    add("model.query_embed.weight", chunk, width, low=-1, high=1)
    add("model.additional_pos_embed.weight", 2, width, low=-1, high=1)
    for i in range(encoders):
        layer(f"model.transformer.encoder.layers.{i}", 2, "self_attn")
    for i in range(decoders):
        layer(f"model.transformer.decoder.layers.{i}", 3, "self_attn", "multihead_attn")
    norm("model.transformer.decoder.norm")
    add("model.cls_embed.weight", 1, width)
    linear("model.encoder_action_proj", width, action)
    linear("model.encoder_joint_proj", width, state)
    linear("model.latent_proj", 64, width)
    add("model.pos_table", 1, 2 + chunk, width)
    if style:
        for i in range(encoders):
            layer(f"model.encoder.layers.{i}", 2, "self_attn")
    return tensors


def as_agilex(tensors):
    """The same network by cobot_magic's names."""
    renamed = {k: v for k, v in tensors.items() if "is_pad_head" not in k}
    latent, state = renamed.pop("model.additional_pos_embed.weight").split(1)
    renamed["model.latent_pos.weight"], renamed["model.robot_state_pos.weight"] = latent, state
    return renamed


def actions(tensors, images, state, *, n_heads):
    """(N, H, W, 3) uint8 and (S,) normalized to (T, A) normalized, float64.

    Camera i has backbone i, or the only one.
    """
    net = {k: v.double() for k, v in tensors.items()}
    per_camera = any(k.startswith("model.backbones.1.") for k in net)

    def conv(name, norm, x, stride):
        weight = net[f"{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        gamma, beta, mean, var = (net[f"{norm}.{part}"][:, None, None] for part in BATCH_NORM)
        return (x - mean) / torch.sqrt(var + EPS) * gamma + beta

    def backbone(body, x):
        x = F.relu(conv(f"{body}.conv1", f"{body}.bn1", x, 2))
        x = F.max_pool2d(x, 3, 2, 1)
        for stage in range(1, 5):
            for block in range(2):
                at, stride = f"{body}.layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                y = F.relu(conv(f"{at}.conv1", f"{at}.bn1", x, stride))
                y = conv(f"{at}.conv2", f"{at}.bn2", y, 1)
                if f"{at}.downsample.0.weight" in net:
                    x = conv(f"{at}.downsample.0", f"{at}.downsample.1", x, stride)
                x = F.relu(x + y)
        return x

    def linear(name, x):
        return F.linear(x, net[f"{name}.weight"], net[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], net[f"{name}.weight"], net[f"{name}.bias"], EPS)

    def attend(name, query, key, value):
        weights, biases = (net[f"{name}.in_proj_{k}"].chunk(3) for k in ("weight", "bias"))
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (n_heads, -1)).transpose(0, 1)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        return linear(f"{name}.out_proj", (scores @ v).transpose(0, 1).flatten(1))

    def feed_forward(name, x):
        return linear(f"{name}.linear2", F.relu(linear(f"{name}.linear1", x)))

    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (MEAN, STD))
    maps, places = [], []
    for camera, image in enumerate(images):
        picture = (image.permute(2, 0, 1).double() / 255 - mean) / std
        found = backbone(f"model.backbones.{camera if per_camera else 0}.0.body", picture[None])
        weight, bias = net["model.input_proj.weight"], net["model.input_proj.bias"]
        maps.append(F.conv2d(found, weight, bias)[0])
        places.append(_places(*found.shape[2:], len(bias)))
    # As the original: one wide picture, its rows running through all cameras.
    pictures, where = (torch.cat(x, 2).flatten(1).T for x in (maps, places))
    style = net["model.latent_out_proj.bias"]
    tokens = torch.stack((style, linear("model.input_proj_robot_state", state.double())))
    x = torch.cat((tokens, pictures))
    pos = torch.cat((net["model.additional_pos_embed.weight"], where))
    for i in range(_layers(net, "model.transformer.encoder.layers.")):
        at = f"model.transformer.encoder.layers.{i}"
        x = norm(f"{at}.norm1", x + attend(f"{at}.self_attn", x + pos, x + pos, x))
        x = norm(f"{at}.norm2", x + feed_forward(at, x))
    queries = net["model.query_embed.weight"]
    # The original takes the first layer's output, whatever the number of layers.
    at, y = "model.transformer.decoder.layers.0", torch.zeros_like(queries)
    y = norm(f"{at}.norm1", y + attend(f"{at}.self_attn", y + queries, y + queries, y))
    y = norm(f"{at}.norm2", y + attend(f"{at}.multihead_attn", y + queries, x + pos, x))
    y = norm(f"{at}.norm3", y + feed_forward(at, y))
    return linear("model.action_head", norm("model.transformer.decoder.norm", y))


def _layers(net, prefix):
    return len({key.removeprefix(prefix).split(".")[0] for key in net if key.startswith(prefix)})


def _places(height, width, dim):
    """(dim, h, w): sines and cosines of the row, then of the column, each from 1/n to 1 turn."""
    half = dim // 2
    table = torch.zeros(dim, height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            for offset, at, n in ((0, row, height), (half, column, width)):
                turn = (at + 1) / (n + 1e-6) * 2 * math.pi
                for i in range(half):
                    angle = turn / 10000 ** (2 * (i // 2) / half)
                    table[offset + i, row, column] = (math.cos if i % 2 else math.sin)(angle)
    return table
