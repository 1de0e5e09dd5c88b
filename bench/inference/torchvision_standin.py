"""What LeRobot's ACT uses of torchvision, where there is no torchvision for this torch.

The same operations in the same order, written from the published structure (He et al.,
https://arxiv.org/abs/1512.03385) and torchvision's documented interface: a ResNet with a frozen
batch-norm that is computed at every call, and a wrapper that stops at a named layer. Frozen
batch-norm is one multiply-add per element with scale and shift from the stored statistics.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_STAGES = (64, 128, 256, 512)
_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


class FrozenBatchNorm2d(nn.Module):
    """Statistics and affine parameters are buffers; nothing is folded beforehand."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0.0),
            ("running_var", 1.0),
        ):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = norm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = norm(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        way_around = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += way_around
        return self.relu(y)  # type: ignore[no-any-return]


class _ResNet(nn.Module):
    """Its children in the order in which they are called, as the wrapper needs them."""

    def __init__(self, blocks: Sequence[int], norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STAGES[0], 7, 2, padding=3, bias=False)
        self.bn1 = norm(_STAGES[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        inputs = _STAGES[0]
        for stage, (outputs, count) in enumerate(zip(_STAGES, blocks, strict=True), start=1):
            layers = nn.Sequential()
            for block in range(count):
                stride = 2 if stage > 1 and block == 0 else 1
                layers.append(_Block(inputs, outputs, stride, norm))
                inputs = outputs
            self.add_module(f"layer{stage}", layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(_STAGES[-1], 1000)


class IntermediateLayerGetter(nn.ModuleDict):
    """The children of ``model`` up to the last one of ``return_layers``; gives their outputs."""

    def __init__(self, model: nn.Module, return_layers: Mapping[str, str]) -> None:
        children, wanted = {}, set(return_layers)
        for name, child in model.named_children():
            children[name] = child
            wanted.discard(name)
            if not wanted:
                break
        super().__init__(children)
        self.return_layers = dict(return_layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, child in self.items():
            x = child(x)
            if name in self.return_layers:
                found[self.return_layers[name]] = x
        return found


def _resnet(name: str) -> Any:
    def make(
        *,
        weights: str | None,
        norm_layer: type[nn.Module],
        replace_stride_with_dilation: Sequence[bool],
    ) -> nn.Module:
        if weights is not None or any(replace_stride_with_dilation):
            raise ValueError(f"{name}: neither downloaded weights nor dilation here")
        return _ResNet(_BLOCKS[name], norm_layer)

    return make


def install() -> None:
    """Make ``import torchvision`` find this, in this process."""
    contents: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.models": {name: _resnet(name) for name in _BLOCKS},
        "torchvision.models._utils": {"IntermediateLayerGetter": IntermediateLayerGetter},
        "torchvision.ops": {},
        "torchvision.ops.misc": {"FrozenBatchNorm2d": FrozenBatchNorm2d},
    }
    for name, names in contents.items():
        module = ModuleType(name, __doc__)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(names)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
