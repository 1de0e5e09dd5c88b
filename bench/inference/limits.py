"""What the machine can do at best: the limits that a roofline is drawn from.

They take their turns among the contestants, so that they meet the same clock frequency and the same
neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from bench.inference.contestants import (
    CONVOLUTION_SHAPE,
    COPY_BYTES,
    CUDA_COPY_BYTES,
    CUDA_GEMM_SIDE,
    GEMM_SIDE,
    Run,
    Setting,
)

_NOTHING = np.zeros((0, 0), np.float32)


def matrix_product(setting: Setting) -> Run:
    """One square float32 product that fits the caches."""
    torch.set_num_threads(setting.threads)
    a, b = (torch.rand(GEMM_SIDE, GEMM_SIDE) for _ in range(2))
    out = torch.empty_like(a)

    def run(_images: NDArray[np.uint8], _state: NDArray[np.float32]) -> NDArray[np.float32]:
        torch.mm(a, b, out=out)
        return _NOTHING

    return run


def convolution(setting: Setting) -> Run:
    """A 3x3 convolution of the backbone, channels last: most of the network is that."""
    torch.set_num_threads(setting.threads)
    channels, height, width = CONVOLUTION_SHAPE
    x = torch.rand(1, channels, height, width).to(memory_format=torch.channels_last)
    weight = torch.rand(channels, channels, 3, 3).to(memory_format=torch.channels_last)

    def run(_images: NDArray[np.uint8], _state: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            torch.conv2d(x, weight, padding=1)
        return _NOTHING

    return run


def copy(setting: Setting) -> Run:
    """Memory to memory, beyond any cache; each byte is read once and written once."""
    torch.set_num_threads(setting.threads)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)

    def run(_images: NDArray[np.uint8], _state: NDArray[np.float32]) -> NDArray[np.float32]:
        target.copy_(source)
        return _NOTHING

    return run


def cuda_matrix_product(setting: Setting) -> Run:
    """One square bfloat16 product on the tensor cores."""
    sides = (CUDA_GEMM_SIDE, CUDA_GEMM_SIDE)
    a, b = (torch.rand(sides, dtype=torch.bfloat16, device=setting.device) for _ in range(2))
    out = torch.empty_like(a)

    def run(_images: NDArray[np.uint8], _state: NDArray[np.float32]) -> NDArray[np.float32]:
        torch.mm(a, b, out=out)
        torch.cuda.synchronize()
        return _NOTHING

    return run


def cuda_copy(setting: Setting) -> Run:
    """The device's memory to itself."""
    source = torch.ones(CUDA_COPY_BYTES, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)

    def run(_images: NDArray[np.uint8], _state: NDArray[np.float32]) -> NDArray[np.float32]:
        target.copy_(source)
        torch.cuda.synchronize()
        return _NOTHING

    return run
