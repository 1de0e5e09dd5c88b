"""Runs the network on one observation at a time over static buffers.

An engine is what may be swapped for a faster one: it takes pictures of the model's size as they
came, uint8, and a normalized state, and gives normalized actions. ``TorchEngine`` is the reference.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from policies.act.weights import ActWeights
from policies.errors import ContractMismatch, InferenceError

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")


class Engine(Protocol):
    """One network, one thread at a time.

    Attributes:
        name: e.g. ``"torch 2.13.0"``.
        images: One (H, W, 3) uint8 array for each camera, to be written before ``run``.
        state: (S,) float32, normalized, to be written before ``run``.
    """

    name: str
    images: Sequence[NDArray[np.uint8]]
    state: NDArray[np.float32]

    def run(self) -> NDArray[np.float32]:
        """(T, A) float32 normalized actions for what is in the buffers; overwritten by the next.

        Raises:
            InferenceError: The network failed.
        """
        ...


class TorchEngine:
    """The network in eager torch, on the CPU or on CUDA."""

    def __init__(self, weights: ActWeights, device: torch.device, dtype: torch.dtype) -> None:
        config = weights.config
        self.name = f"torch {torch.__version__}"
        self._device, self._dtype = device, dtype
        self._model = weights.inference_model()
        mean, std = self._model.image_mean, self._model.image_std
        self._model.to(device=device, dtype=dtype)
        self._model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Pictures are normalized in float32 and rounded once.
        self._model.image_mean, self._model.image_std = mean.to(device), std.to(device)
        pinned = device.type == "cuda"
        shape = (1, config.n_cameras, *config.image_hw, 3)
        self._host_images = torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned)
        self._host_state = torch.zeros((1, config.state_dim), pin_memory=pinned)
        self.images: Sequence[NDArray[np.uint8]] = list(self._host_images.numpy()[0])
        self.state: NDArray[np.float32] = self._host_state.numpy()[0]

    def run(self) -> NDArray[np.float32]:
        try:
            with torch.inference_mode():
                images = self._host_images.to(self._device, non_blocking=True)
                state = self._host_state.to(self._device, self._dtype, non_blocking=True)
                actions: NDArray[np.float32] = self._model(images, state)[0].float().cpu().numpy()
                return actions
        except (RuntimeError, torch.OutOfMemoryError) as error:
            raise InferenceError(f"{self.name} on {self._device}: {error}") from error


def choose_device(name: str) -> torch.device:
    """The device that ``name`` (``DEVICES``, or ``cuda:N``) means.

    Raises:
        ContractMismatch: An unknown name, or a GPU where torch sees none.
    """
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not (kind == "cuda" and index.isdecimal())):
        raise ContractMismatch("device", repr(name), f"one of {DEVICES}, or cuda:N")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= gpus:
        raise ContractMismatch(
            "device", repr(name), f"'cpu' or one of {gpus} GPUs (torch {torch.__version__})"
        )
    if kind == "cpu" or not gpus:
        return torch.device("cpu")
    return torch.device("cuda", int(index or 0))


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The number format that ``precision`` (one of ``PRECISIONS``) means on ``device``.

    "auto" is bfloat16 where the hardware multiplies it, else float32.

    Raises:
        ContractMismatch: An unknown name, or bf16 on a CPU that would only emulate it.
    """
    if precision not in PRECISIONS:
        raise ContractMismatch("precision", repr(precision), f"one of {PRECISIONS}")
    if precision == "fp32":
        return torch.float32
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_multiplies_bf16()
    if precision == "bf16" and not fast:
        raise ContractMismatch(
            "precision", "'bf16'", f"'fp32' or 'auto': this {device.type} has no bfloat16 units"
        )
    if not fast:
        logger.info("precision auto: fp32, this %s has no bfloat16 units", device.type)
    return torch.bfloat16 if fast else torch.float32


def cpu_multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has AMX or AVX-512 instructions for bfloat16, by what the kernel lists."""
    try:
        words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "avx512_bf16"})


def set_exact(device: torch.device, dtype: torch.dtype) -> None:
    """Make CUDA give the same bits every time, and float32 be float32; all of this process's torch.

    By default torch computes float32 convolutions in TF32, with 10 bits of mantissa, and may
    choose another algorithm in every process.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def set_threads(threads: int | None) -> int:
    """Use ``threads`` CPU threads (default: half the cores) in all of this process's torch.

    Raises:
        ContractMismatch: Less than one.
    """
    count = max(1, (os.cpu_count() or 1) // 2) if threads is None else threads
    if count < 1:
        raise ContractMismatch("threads", str(count), "at least 1")
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
    return count


def make_engine(weights: ActWeights, device: str, precision: str) -> tuple[Engine, dict[str, Any]]:
    """The engine for ``weights``, and what was chosen: ``device``, ``precision``."""
    chosen = choose_device(device)
    dtype = choose_dtype(precision, chosen)
    set_exact(chosen, dtype)
    engine = TorchEngine(weights, chosen, dtype)
    return engine, {
        "device": str(chosen),
        "precision": "fp32" if dtype == torch.float32 else "bf16",
    }
