"""Large bfloat16 tensors in two thirds of their size, in an ordinary safetensors file; lossless.

The exponents of trained weights take few values, so they compress well; sign and mantissa do not.
A packed tensor NAME is two tensors:

* ``NAME.packed_exponents``: a zlib stream of its exponents, one byte each.
* ``NAME.packed_rest``: uint8 of its shape; the upper bit is the sign, the others the mantissa.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from policies.errors import CheckpointError

EXPONENTS, REST = ".packed_exponents", ".packed_rest"
PACKED_FROM = 2_000_000
"""Elements of a tensor that is packed: reading one costs time; few large ones have most bytes."""
LEVEL = 9


def pack(tensors: Mapping[str, Tensor], packed_from: int = PACKED_FROM) -> dict[str, Tensor]:
    """Return ``tensors`` with the bfloat16 ones of ``packed_from`` elements or more packed."""
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bfloat16 or tensor.numel() < packed_from:
            packed[name] = tensor
            continue
        bits = tensor.contiguous().view(torch.uint16).numpy()
        exponents = zlib.compress((bits >> 7).astype(np.uint8).tobytes(), LEVEL)
        rest = (bits >> 8 & 0x80 | bits & 0x7F).astype(np.uint8)
        packed[name + EXPONENTS] = torch.frombuffer(bytearray(exponents), dtype=torch.uint8)
        packed[name + REST] = torch.from_numpy(rest)
    return packed


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` with the packed ones as bfloat16 again.

    Raises:
        CheckpointError: Half of a packed tensor is missing or is not what ``pack`` makes.
    """
    unpacked: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(EXPONENTS) and name.removesuffix(EXPONENTS) + REST not in tensors:
            raise CheckpointError(f"{name}: got exponents alone, expected {REST!r}, too")
        if name.endswith(REST):
            whole = name.removesuffix(REST)
            unpacked[whole] = _joined(whole, tensors.get(whole + EXPONENTS), tensor)
        elif not name.endswith(EXPONENTS):
            unpacked[name] = tensor
    return unpacked


def _joined(name: str, deflated: Tensor | None, rest: Tensor) -> Tensor:
    if deflated is None or deflated.dtype != torch.uint8 or rest.dtype != torch.uint8:
        kinds = [None if each is None else each.dtype for each in (deflated, rest)]
        raise CheckpointError(f"{name}: packed: got {kinds}, expected two tensors of uint8")
    stream = zlib.decompressobj()
    try:
        # One byte more than expected is enough to notice a longer stream.
        content = stream.decompress(deflated.numpy().tobytes(), rest.numel() + 1)
    except zlib.error as error:
        raise CheckpointError(f"{name}: packed: {error}") from error
    if len(content) != rest.numel() or not stream.eof:
        raise CheckpointError(
            f"{name}: packed: got {len(content)} exponents or more, expected {rest.numel()}"
        )
    bits = np.frombuffer(content, np.uint8).reshape(tuple(rest.shape)).astype(np.uint16)
    bits <<= 7
    low = rest.numpy().astype(np.uint16)
    bits |= low & 0x7F
    bits |= (low & 0x80) << 8
    return torch.from_numpy(bits).view(torch.bfloat16)
