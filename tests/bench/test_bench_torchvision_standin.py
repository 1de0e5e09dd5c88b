"""The stand-in for torchvision computes what our own backbone does, from the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.inference.torchvision_standin import (
    FrozenBatchNorm2d,
    IntermediateLayerGetter,
    _resnet,
)
from policies.act.backbone import Backbone


@pytest.fixture
def backbone() -> Backbone:
    """With statistics that make a difference."""
    made = Backbone("resnet18", folded=False).eval()
    random = torch.Generator().manual_seed(0)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=random)
    return made.requires_grad_(False)


def test_features_are_the_backbones(backbone: Backbone) -> None:
    made = _resnet("resnet18")(
        weights=None,
        norm_layer=FrozenBatchNorm2d,
        replace_stride_with_dilation=[False, False, False],
    )
    wrapped = IntermediateLayerGetter(made, {"layer4": "feature_map"}).eval().requires_grad_(False)
    weights = {k: v for k, v in backbone.state_dict().items() if "num_batches" not in k}
    wrapped.load_state_dict(weights, strict=True)
    pictures = torch.randn((1, 3, 64, 96), generator=torch.Generator().manual_seed(1))
    features = wrapped(pictures)
    assert set(features) == {"feature_map"}
    torch.testing.assert_close(features["feature_map"], backbone(pictures), rtol=1e-4, atol=1e-4)


def test_downloads_and_dilation_are_refused() -> None:
    with pytest.raises(ValueError, match="neither downloaded weights nor dilation"):
        _resnet("resnet18")(
            weights="DEFAULT", norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=[False]
        )
