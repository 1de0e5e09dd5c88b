"""Nobody's pickle gets to run anything."""

from __future__ import annotations

import collections
import os
import pickle

import numpy as np
import pytest

from policies.checkpoint.pickles import read_pickle
from policies.errors import CheckpointError


class _Gadget:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def write(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_and_containers_come_back(tmp_path, protocol):
    value = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": [1, 2.5, "x", None, True, (1,)],
        "c": np.float64(3.5),
    }
    got = read_pickle(write(tmp_path / "s.pkl", value, protocol))
    np.testing.assert_array_equal(got["a"], value["a"])
    assert got["b"] == value["b"]
    assert got["c"] == 3.5


def test_a_command_is_refused_before_it_runs(tmp_path):
    witness = tmp_path / "owned"
    path = write(tmp_path / "s.pkl", {"mean": _Gadget(os.system, f"touch {witness}")})
    with pytest.raises(CheckpointError, match=r"s.pkl: refused, it asks for (posix|nt).system"):
        read_pickle(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    "gadget",
    [
        _Gadget(eval, "1+1"),
        _Gadget(getattr, "x", "upper"),
        _Gadget(np.load, "x.npy"),
        _Gadget(collections.Counter),
        _Gadget(__import__, "os"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_anything_else_is_refused_too(tmp_path, gadget, protocol):
    with pytest.raises(CheckpointError, match=r"refused, it asks for"):
        read_pickle(write(tmp_path / "s.pkl", [gadget], protocol))


def test_dotted_names_do_not_climb_out(tmp_path):
    # STACK_GLOBAL with "numpy" / "ndarray.__class__.mro": find_class would follow the dots.
    name = b"ndarray.__class__"
    stream = b"\x80\x04\x8c\x05numpy\x8c" + bytes([len(name)]) + name + b"\x93."
    (tmp_path / "s.pkl").write_bytes(stream)
    with pytest.raises(CheckpointError, match=r"refused"):
        read_pickle(tmp_path / "s.pkl")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04}", b"\x80\x04\x8c\xff"])
def test_broken_files_are_named(tmp_path, content):
    (tmp_path / "s.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"s.pkl"):
        read_pickle(tmp_path / "s.pkl")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone.pkl"):
        read_pickle(tmp_path / "gone.pkl")
