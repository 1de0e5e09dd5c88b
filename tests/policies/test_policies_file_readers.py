"""Whatever a file holds, its reader gives tensors or an error that names the file."""

from __future__ import annotations

import pytest
import torch

from policies.checkpoint.file_readers import read_json, read_safetensors, read_torch
from policies.errors import CheckpointError

# Each makes torch's parser stumble in another way, over its own stack or a number's bytes.
BROKEN = [
    b"",
    b"\x80\x02.",
    b"\x80\x02a.",
    b"\x80\x02J\x01",
    b"\x80\x02K\x01K\x02s.",
    b"PK\x03\x04",
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_ckpt_is_named_with_its_cause(tmp_path, content):
    path = tmp_path / "policy_best.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"policy_best.ckpt: truncated, or no plain") as error:
        read_torch(path)
    assert error.value.__cause__ is not None


def test_a_damaged_ckpt_is_read_or_refused_and_nothing_else(tmp_path):
    path = tmp_path / "policy_best.ckpt"
    tensors = {"a": torch.ones(2), "b": torch.zeros(1)}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x1F]) + whole[at + 1 :])
        try:
            read_torch(path)
        except CheckpointError:
            refused += 1
    assert 0 < refused < len(whole) // 3


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.eye(3).to_sparse(), "a: got a torch.sparse_coo torch.float32 tensor on cpu"),
        (torch.zeros(3, device="meta"), "a: got a torch.strided torch.float32 tensor on meta"),
        (torch.zeros(3, dtype=torch.complex64), "a: got a torch.strided torch.complex64"),
        (torch.tensor([1e300], dtype=torch.float64), "a: NaN or infinity"),
        (torch.tensor([torch.nan]), "a: NaN or infinity"),
    ],
)
def test_only_finite_plain_numbers_are_weights(tmp_path, tensor, message):
    torch.save({"a": tensor}, tmp_path / "w.ckpt")
    with pytest.raises(CheckpointError, match=rf"w.ckpt: {message}"):
        read_torch(tmp_path / "w.ckpt")


def test_eight_bit_floats_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "w.safetensors")
    assert read_safetensors(tmp_path / "w.safetensors")["a"].tolist() == [1, 1]


def test_json_that_is_too_deep_is_named(tmp_path):
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"c.json: maximum recursion"):
        read_json(tmp_path / "c.json")
