"""Packed weights are the same weights; broken ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from policies.checkpoint.file_readers import read_safetensors
from policies.checkpoint.packed_weights import EXPONENTS, REST, pack, unpack
from policies.errors import CheckpointError

EXAMPLE = Path("ckpt/act_sim_transfer_cube_scripted_zscore_example/model.safetensors")


def every_bf16() -> Tensor:
    """Each of the 65,536 bit patterns, infinities and NaNs included."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint16), b.view(torch.uint16))


def test_every_number_survives() -> None:
    tensors = {"w": every_bf16().reshape(64, 1024), "v": torch.ones(9)}
    packed = pack(tensors, packed_from=1000)
    assert packed.keys() == {"w" + EXPONENTS, "w" + REST, "v"}
    again = unpack(packed)
    assert again.keys() == tensors.keys() and again["w"].shape == (64, 1024)
    assert same_bits(again["w"], tensors["w"])


def test_small_and_float32_tensors_are_left() -> None:
    tensors = {"small": torch.ones(9, dtype=torch.bfloat16), "large": torch.ones(2000)}
    assert pack(tensors, packed_from=1000) == tensors


def test_the_shipped_weights_are_packed_and_smaller() -> None:
    stored = load_file(EXAMPLE)
    packed = [name.removesuffix(REST) for name in stored if name.endswith(REST)]
    assert packed
    weights = read_safetensors(EXAMPLE)
    for name in packed:
        assert weights[name].shape == stored[name + REST].shape
        assert stored[name + EXPONENTS].numel() < 0.5 * weights[name].numel()
        assert 0 < weights[name].std() < 1


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda t: t.pop("w" + EXPONENTS), r"w: packed: got \[None, torch.uint8\], expected two"),
        (lambda t: t.pop("w" + REST), "got exponents alone"),
        (lambda t: t.update({"w" + EXPONENTS: t["w" + EXPONENTS][:-9]}), "exponents or more"),
        (lambda t: t.update({"w" + REST: t["w" + REST][:5].clone()}), "got 5121 exponents or more"),
        (lambda t: t.update({"w" + EXPONENTS: torch.zeros(9, dtype=torch.uint8)}), "packed: Error"),
        (lambda t: t.update({"w" + REST: t["w" + REST].float()}), "expected two tensors of uint8"),
    ],
    ids=["no exponents", "exponents alone", "cut", "too many", "no stream", "another type"],
)
def test_what_is_broken_is_refused(
    tmp_path: Path, breaks: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = pack({"w": every_bf16().reshape(64, 1024)}, packed_from=1000)
    breaks(tensors)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=message) as error:
        read_safetensors(path)
    assert str(path) in str(error.value)
