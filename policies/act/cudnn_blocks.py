"""Residual blocks whose convolutions are one cuDNN operation each, with all that follows them.

In eager torch a residual block is seven kernels: twice a convolution and its bias, two activations
and an addition. cuDNN computes ``relu(conv(x) + alpha * z + bias)`` in one, for fp16 and bf16 on
tensor cores, so that a block is two.
"""

from __future__ import annotations

from torch import Tensor, nn, ops

from policies.act.fused_model import FusedAct, FusedBlock


class CudnnBlock(FusedBlock):
    """A ``FusedBlock`` of two cuDNN operations; takes over the modules of ``block``.

    The bias of the skip connection's convolution moves into the second convolution's.
    """

    def __init__(self, block: FusedBlock) -> None:
        super().__init__(block.conv1, block.conv2, block.downsample)
        skip = self.downsample
        if skip is not None and skip.bias is not None and self.conv2.bias is not None:
            self.conv2.bias.data += skip.bias.data
            skip.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """As ``FusedBlock``."""
        skip = x if self.downsample is None else self.downsample(x)
        # cuDNN's operation without an addend adds its own output times zero, which is memory that
        # nobody has written: NaN times zero is NaN. ``skip`` has the same shape and is finite.
        y = _add_relu(self.conv1, x, skip, 0.0)
        return _add_relu(self.conv2, y, skip, 1.0)


def use_cudnn_blocks(fused: FusedAct) -> None:
    """Replace all residual blocks of ``fused``, which is still float32, by ``CudnnBlock``."""
    for backbone in fused.backbones:
        backbone.blocks = nn.ModuleList(CudnnBlock(block) for block in backbone.blocks)  # type: ignore[union-attr]


def _add_relu(conv: nn.Conv2d, x: Tensor, z: Tensor, alpha: float) -> Tensor:
    """Return relu(conv(x) + alpha * z + bias)."""
    result: Tensor = ops.aten.cudnn_convolution_add_relu(
        *(x, conv.weight, z, alpha, conv.bias),
        *(conv.stride, conv.padding, conv.dilation, conv.groups),
    )
    return result
