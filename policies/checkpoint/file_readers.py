"""Reads a checkpoint's files; every foreign error becomes a ``CheckpointError`` that names the
file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from policies.checkpoint.hub_snapshot import refuse_hub_pickle
from policies.checkpoint.packed_weights import unpack
from policies.checkpoint.weight_folders import ADAPTERS, INDEX, WEIGHTS
from policies.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs"
"""First bytes of a Git LFS pointer file."""


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        CheckpointError: No such file, not a JSON object, or a duplicate key.
    """
    try:
        # Given bytes, json detects the encoding.
        value = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got {type(value).__name__}, expected an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"key {key!r} is given twice")
        table[key] = value
    return table


def read_weights(folder: Path, *, unchecked: str | tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Return the tensors of ``model.safetensors``, or of all the files that its index names.

    Args:
        folder: The checkpoint's folder.
        unchecked: As for ``read_safetensors``.

    Raises:
        CheckpointError: No weights (the message lists the files instead), or not as expected.
    """
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS, unchecked=unchecked)
    if (folder / INDEX).is_file():
        return _read_sharded(folder / INDEX, unchecked)
    if any((folder / name).is_file() for name in ADAPTERS):
        raise CheckpointError(
            f"{folder}: got adapter weights only (PEFT, LoRA), expected {WEIGHTS}: merge them into "
            "the base model (PEFT's merge_and_unload()) and save that"
        )
    got = sorted(path.name for path in folder.iterdir())[:12] if folder.is_dir() else []
    raise CheckpointError(f"{folder / WEIGHTS}: missing; got {got}, expected {WEIGHTS} or {INDEX}")


def _read_sharded(index: Path, unchecked: str | tuple[str, ...]) -> dict[str, Tensor]:
    shards = need(read_json(index), "weight_map", dict, index)
    tensors: dict[str, Tensor] = {}
    for name in sorted({str(shard) for shard in shards.values()}):
        if name != Path(name).name:
            raise CheckpointError(f"{index}: weight_map: got {name!r}, expected a plain file name")
        for key, tensor in read_safetensors(index.parent / name, unchecked=unchecked).items():
            if shards.get(key) != name:
                raise CheckpointError(
                    f"{index}: {key}: got {shards.get(key)!r}, but it is in {name!r}"
                )
            tensors[key] = tensor
    missing = sorted(shards.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{index}: {missing[0]}: not in {shards[missing[0]]!r}")
    return tensors


def read_safetensors(path: Path, *, unchecked: str | tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Return all tensors on the CPU, as float32, packed ones unpacked; integers keep their dtype.

    Args:
        path: The file.
        unchecked: Prefixes of names that may hold NaN and infinity; "" for all. Statistics that are
            not used may hold anything, and the code that uses one checks it.

    Raises:
        CheckpointError: No such file, not readable, or NaN or infinity.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        if path.is_file() and _begins_with(path, LFS_POINTER):
            raise CheckpointError(
                f"{path}: a Git LFS pointer, the file itself was not downloaded: run git lfs pull"
            ) from error
        raise CheckpointError(f"{path}: truncated, or no safetensors file: {error}") from error
    try:
        tensors = unpack(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return _checked(path, tensors, unchecked)


def _begins_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def read_torch(path: Path) -> dict[str, Tensor]:
    """Return a state dict that ``torch.save`` wrote, read with ``weights_only``.

    Raises:
        CheckpointError: No such file, one of the hub's cache, not a plain state dict, or NaN or
            infinity.
    """
    refuse_hub_pickle(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch passes on any error of its parsers
        lines = str(error).splitlines() or [repr(error)]
        raise CheckpointError(f"{path}: truncated, or no plain state dict: {lines[0]}") from error
    if not isinstance(tensors, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
    ):
        raise CheckpointError(f"{path}: expected a state dict of names to tensors")
    return _checked(path, tensors, ())


def _checked(
    path: Path, tensors: Mapping[str, Tensor], unchecked: str | tuple[str, ...]
) -> dict[str, Tensor]:
    checked = {}
    for key, tensor in tensors.items():
        plain = tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.device.type != "cpu" or tensor.is_complex():
            raise CheckpointError(
                f"{path}: {key}: got a {tensor.layout} {tensor.dtype} tensor on {tensor.device}, "
                "expected plain numbers"
            )
        if tensor.is_floating_point():
            # Convert first: a number too large for float32 becomes infinity.
            tensor = tensor.float()  # noqa: PLW2901
            if not key.startswith(unchecked) and not torch.isfinite(tensor).all():
                raise CheckpointError(f"{path}: {key}: NaN or infinity among the weights")
        checked[key] = tensor
    return checked


def need(table: Any, key: str, kind: type | tuple[type, ...], path: Path) -> Any:
    """Return ``table[key]``, which must be a ``kind``; else raise ``CheckpointError`` with file and
    key.
    """
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


def refuse_unknown(
    table: Mapping[str, Any], known: frozenset[str] | set[str], path: Path, *, at: str = ""
) -> None:
    """Raise ``CheckpointError`` for the first key of ``table`` that is not ``known``."""
    unknown = sorted(table.keys() - known)
    if unknown:
        raise CheckpointError(
            f"{path}: {at}{unknown[0]}: unknown key (got {table[unknown[0]]!r:.80}), expected "
            f"{sorted(known) or 'none'}"
        )
