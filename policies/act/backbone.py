"""ResNet18/34 without the classifier, with batch-norm (training) or with it folded (inference).

He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from policies.act.config import BLOCKS, CHANNELS

BATCH_NORM_EPS = 1e-5
BATCH_NORM_KEYS = ("weight", "bias", "running_mean", "running_var")
"""Tensors of a batch-norm."""
PREFIXES = ("backbone.", "backbones.")
"""Prefixes of the backbones' parameters in ``ActModel``: one for all cameras, or one for each
camera.
"""


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int, *, folded: bool
) -> tuple[nn.Conv2d, nn.Module]:
    """Return a convolution and its batch-norm, or an identity where that is folded into it."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=folded)
    return conv, nn.Identity() if folded else nn.BatchNorm2d(outputs, eps=BATCH_NORM_EPS)


class BasicBlock(nn.Module):
    """A residual block: two 3x3 convolutions and a skip connection.

    Args:
        inputs, outputs: Channels.
        stride: Stride of the first convolution and of the skip connection.
        folded: Batch-norm is folded into the convolutions.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, folded: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(inputs, outputs, 3, stride, folded=folded)
        self.conv2, self.bn2 = _convolution(outputs, outputs, 3, 1, folded=folded)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                *_convolution(inputs, outputs, 1, stride, folded=folded)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, ceil(H/stride), ceil(W/stride))."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Backbone(nn.Module):
    """The feature extractor of one camera's images, or of all cameras' images.

    Args:
        name: A key of ``BLOCKS``.
        folded: Batch-norm is folded into the convolutions.
    """

    def __init__(self, name: str, *, folded: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(3, CHANNELS[0], 7, 2, folded=folded)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = CHANNELS[0]
        for stage, (outputs, blocks) in enumerate(zip(CHANNELS, BLOCKS[name], strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            layer = nn.Sequential()
            for stride in strides:
                layer.append(BasicBlock(inputs, outputs, stride, folded=folded))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", layer)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as He et al.; each block starts as the identity (the scale of its last norm is
        0).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock) and isinstance(module.bn2, nn.BatchNorm2d):
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalized images to (B, 512, ceil(H/32), ceil(W/32)) features."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for stage in range(len(CHANNELS)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x


def fold_batch_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``weights`` with each batch-norm of a backbone folded into the convolution before it.

    y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta is a convolution again. It is computed in
    float64 and rounded once. The images' mean is not folded: the convolution pads after that
    normalization, so the result would differ at the borders.
    """
    folded = dict(weights)
    for conv, norm in _pairs(weights):
        gamma, beta, mean, var = (folded.pop(f"{norm}.{key}").double() for key in BATCH_NORM_KEYS)
        folded.pop(f"{norm}.num_batches_tracked", None)
        weight = weights[f"{conv}.weight"]
        factor = gamma / torch.sqrt(var + BATCH_NORM_EPS)
        folded[f"{conv}.weight"] = (weight.double() * factor[:, None, None, None]).to(weight.dtype)
        folded[f"{conv}.bias"] = (beta - mean * factor).to(weight.dtype)
    return folded


def _pairs(weights: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Return the (convolution, batch-norm) module names."""
    pairs = []
    for key in weights:
        if key.startswith(PREFIXES) and key.endswith(".running_mean"):
            norm = key.removesuffix(".running_mean")
            parent, _, name = norm.rpartition(".")
            conv = f"{parent}.0" if name == "1" else f"{parent}.{name.replace('bn', 'conv')}"
            pairs.append((conv, norm))
    return pairs
