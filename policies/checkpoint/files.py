"""Reading a checkpoint's files: every foreign error becomes a ``CheckpointError`` with the name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from policies.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ``CheckpointError``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got {type(value).__name__}, expected an object")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors, as float32 on the CPU. Raises ``CheckpointError``, also for NaN or infinity."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: truncated, or no safetensors file: {error}") from error
    return _checked(path, tensors)


def read_torch(path: Path) -> dict[str, Tensor]:
    """A state dict that ``torch.save`` wrote, read with ``weights_only``; else as above."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch lets its parsers' errors through: anything
        lines = str(error).splitlines() or [repr(error)]
        raise CheckpointError(f"{path}: truncated, or no plain state dict: {lines[0]}") from error
    if not isinstance(tensors, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
    ):
        raise CheckpointError(f"{path}: expected a state dict of names to tensors")
    return _checked(path, tensors)


def _checked(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    checked = {}
    for key, tensor in tensors.items():
        plain = tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.device.type != "cpu" or tensor.is_complex():
            raise CheckpointError(
                f"{path}: {key}: got a {tensor.layout} {tensor.dtype} tensor on {tensor.device}, "
                "expected plain numbers"
            )
        if tensor.is_floating_point():
            # First to float32: a larger number is infinity there.
            tensor = tensor.float()  # noqa: PLW2901
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{path}: {key}: NaN or infinity among the weights")
        checked[key] = tensor
    return checked


def need(table: Any, key: str, kind: type | tuple[type, ...], path: Path) -> Any:
    """``table[key]``, which has to be a ``kind``; else ``CheckpointError`` with file and key."""
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{path}: got {table!r:.80}, expected an object with {key!r}")
    if key not in table:
        raise CheckpointError(f"{path}: key {key!r} is missing")
    value = table[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(k.__name__ for k in kinds)
        raise CheckpointError(f"{path}: {key}: got {value!r}, expected {names}")
    return value
