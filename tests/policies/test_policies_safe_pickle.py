"""Nobody's pickle gets to run anything."""

from __future__ import annotations

import collections
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from policies.checkpoint.safe_pickle import read_pickle
from policies.errors import CheckpointError


class _Gadget:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def write(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


class _Call:
    """Pickled as this very call, so that a pickle may say what numpy itself would not."""

    def __init__(self, function, arguments, *state):
        self.call = (function, arguments, *state)

    def __reduce__(self):
        return self.call


def dtype(code, *state):
    return _Call(np.dtype, (code, False, True), *state)


def array(number, shape, content, fortran=False):
    empty = (np.ndarray, (0,), b"b")
    return _Call(np._core.multiarray._reconstruct, empty, (1, shape, number, fortran, content))


ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "big endian": np.arange(6, dtype=">f8"),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "turned": np.arange(24.0).reshape(2, 3, 4).transpose(1, 2, 0),
    "strided": np.arange(6.0)[::2],
    "bool": np.array([True, False]),
    "int8": np.array([-1, 2], np.int8),
    "uint64": np.array([2**64 - 1], np.uint64),
    "half": np.array([0.5], np.float16),
    "no dimension": np.array(3.0),
    "empty": np.zeros((0, 3)),
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_and_containers_come_back(tmp_path, protocol):
    value = {
        "a": ARRAYS,
        "b": [1, 2.5, "x", None, True, (1,), b"x"],
        "c": np.float64(3.5),
        "d": np.int16(-3),
        "again": ARRAYS["float32"],
    }
    got = read_pickle(write(tmp_path / "s.pkl", value, protocol))
    for name, wanted in ARRAYS.items():
        assert (got["a"][name].dtype, got["a"][name].shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(got["a"][name], wanted)
    assert got["b"] == value["b"]
    assert (got["c"], got["d"]) == (3.5, -3)
    assert got["again"] is got["a"]["float32"]


def test_either_numpys_pickles_are_read(tmp_path):
    new = pickle.dumps(np.arange(3.0), protocol=3)
    old = new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != new
    for content in (new, old):
        (tmp_path / "s.pkl").write_bytes(content)
        np.testing.assert_array_equal(read_pickle(tmp_path / "s.pkl"), np.arange(3.0))


POINTER = b"\x40AAAAAAA"
OBJECT_AS_BYTES = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)

LIES = {
    "objects flagged as bytes": (
        array(dtype("V8", OBJECT_AS_BYTES), (1,), POINTER),
        "the dtype 'V8'",
    ),
    "numbers with fields": (
        array(dtype("f8", (3, "<", None, ("a",), {}, 8, 1, 63)), (1,), POINTER),
        "a f8 with the state",
    ),
    "objects": (np.array(["x", 3], dtype=object), "the dtype 'O8'"),
    "a record": (np.zeros(1, dtype=[("a", "f8")]), "the dtype 'V8'"),
    "text": (np.array(["x"]), "the dtype 'U1'"),
    "a date": (np.array(["2020-01-01"], "M8[D]"), "the dtype 'M8'"),
    "a long double": (np.zeros(1, np.longdouble), "the dtype 'f16'"),
    "a list for content": (array(dtype("f8"), (1,), [1.0]), "something other than numbers"),
    "a short content": (array(dtype("f8"), (2,), POINTER), r"shape \(2,\) and dtype float64 in 8"),
    "a long content": (array(dtype("f4"), (1,), POINTER), r"shape \(1,\) and dtype float32 in 8"),
    "a product beyond 64 bits": (array(dtype("u1"), (2**32, 2**32), b""), "in 0 bytes"),
    "a negative size": (array(dtype("f8"), (-1, -1), POINTER), r"of shape \(-1, -1\)"),
    "a third truth": (array(dtype("b1"), (1,), b"\2"), "neither 0 nor 1"),
    "many bools": (np.zeros(65_537, bool), "it has 65537 bools, expected at most 65536"),
    "no content": (
        _Call(np._core.multiarray._reconstruct, (np.ndarray, (10**11,), b"d")),
        "an array without content",
    ),
    "an array made directly": (_Call(np.ndarray, (10**11,)), "an array without content"),
    "another kind of array": (
        _Call(np._core.multiarray._reconstruct, (np.dtype, (0,), b"b")),
        "a subclass of numpy's arrays",
    ),
    "a scalar of objects": (
        _Call(np._core.multiarray.scalar, (dtype("O8"), POINTER)),
        "the dtype 'O8'",
    ),
    "a set": ({1, 2}, "a set|builtins.set"),
    "a dtype alone": (np.dtype("f8"), "it holds a SafeDtype"),
    "a key of another kind": ({(1,): 2}, "a tuple for a key"),
    "a long number": (1 << 80_000, "a number of 80001 bits"),
}


@pytest.mark.parametrize("case", LIES)
@pytest.mark.parametrize("protocol", [3, 4])
def test_lies_about_arrays_are_refused(tmp_path, case, protocol):
    value, message = LIES[case]
    with pytest.raises(CheckpointError, match=message):
        read_pickle(write(tmp_path / "s.pkl", {"mean": value}, protocol))


def _nested(levels):
    value = ()
    for _ in range(levels):
        value = (value,)
    return value


LAUGHS = [[1.0] * 10]
for _ in range(8):
    LAUGHS.append([LAUGHS[-1]] * 10)
CYCLE: list[object] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # BUILD with a dict and with slots, on what stands for numpy.dtype.
        (b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93}\x8c\x01xK\x01sb.", "it changes a function"),
        (b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93N}\x8c\x01xK\x01s\x86b.", "it changes a function"),
        (b"\x80\x02)" + b"\x85" * 20_000 + b".", "or 32 levels"),
        (b"N0" * 500_001 + b"N.", "more than 1000000 instructions"),
        (pickle.dumps(LAUGHS), "over 1000000 values"),
        (pickle.dumps(CYCLE), "or 32 levels"),
    ],
    ids=["attributes", "slots", "tuples", "instructions", "sharing", "cycle"],
)
def test_small_files_that_are_too_much(tmp_path, content, message):
    (tmp_path / "s.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_pickle(tmp_path / "s.pkl")


def _doubled(levels):
    """A tuple of 2**levels values, in which every level is one tuple twice."""
    return b"N" + b"".join(
        b"q" + bytes((at,)) + b"h" + bytes((at,)) + b"\x86" for at in range(levels)
    )


HASHED = {
    "one key": b"}" + _doubled(60) + b"Ns.",
    "many keys": b"}(" + _doubled(60) + b"Nu.",
    "a dict of protocol 0": b"(" + _doubled(60) + b"Nd.",
    "a key among others": b"}(U\x01aN" + _doubled(60) + b"Nu.",
    "a key of what is dropped": b"}" + _doubled(60) + b"Ns0N.",
    "a key of a state": b"cnumpy\ndtype\nU\x02f8\x85R}" + _doubled(60) + b"Nsb.",
    "a set": b"\x8f(" + _doubled(60) + b"\x90.",
    "a frozen set": b"(" + _doubled(60) + b"\x91.",
    "deep recursion": b"})" + b"\x85" * 900_000 + b"K\x01s.",
    "equal hashes": b"}("
    + b"".join(
        b"\x8a\x0c" + ((2**61 - 1) * (2**30 + n)).to_bytes(12, "little") + b"N"
        for n in range(200_000)
    )
    + b"u.",
}


@pytest.mark.parametrize("case", HASHED)
def test_a_key_that_takes_forever_to_be_hashed(tmp_path, case):
    path = tmp_path / "s.pkl"
    path.write_bytes(b"\x80\x04" + HASHED[case])
    code = "import sys; from pathlib import Path; from policies.checkpoint.safe_pickle import *\n"
    code += "read_pickle(Path(sys.argv[1]))"
    done = subprocess.run(  # hashing cannot be interrupted
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    expected = ("a tuple for a key", "it has a set", "a number of 91 bits", "a number of 92 bits")
    assert any(text in done.stderr for text in expected), done.stderr[-2000:]


@pytest.mark.parametrize("keys", ["ax", [0, 1], [-(2**63), 2**64 - 1]])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_keys_of_every_protocol(tmp_path, keys, protocol):
    for value in (dict.fromkeys(keys, (1, "x")), dict.fromkeys(keys[:1], 0.5), {}):
        assert read_pickle(write(tmp_path / "s.pkl", [value, value], protocol)) == [value, value]


def test_a_memo_with_a_large_index_costs_nothing(tmp_path):
    (tmp_path / "s.pkl").write_bytes(b"\x80\x02Nr\xff\xff\xff\xff.")
    assert read_pickle(tmp_path / "s.pkl") is None


FUZZ = r"""
import pickle, random, sys
from pathlib import Path
import numpy as np
from policies.checkpoint.safe_pickle import read_pickle
from policies.errors import CheckpointError
from policies.normalizer import from_stats

path, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
table = {"mean": np.arange(3, dtype="f4"), "std": np.ones(3, ">f8"), "n": np.int64(4), "t": (1,)}
sources = [pickle.dumps(table, protocol) for protocol in (3, 4, 5)]
draw = random.Random(seed)
taken = 0
for _ in range(count):
    content = bytearray(draw.choice(sources))
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randrange(len(content)), draw.randrange(1, 12)
        kind = draw.randrange(4)
        if kind == 0:
            content[at] = draw.randrange(256)
        elif kind == 1:
            del content[at : at + size]
        elif kind == 2:
            content[at:at] = content[draw.randrange(len(content)) :][:size]
        else:
            content[at] = draw.choice(b"bRst.02]}()KNu\x85\x86\x87\x93\x94\x81\x8c")
        content = content or bytearray(b".")
    path.write_bytes(content)
    try:
        found = read_pickle(path)
        taken += 1
        repr(found)
        if isinstance(found, dict):
            from_stats("zscore", {str(k): v for k, v in found.items()})
    except CheckpointError as error:
        if str(path) not in str(error) and "stats" not in str(error):
            raise
print(taken)
"""


def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path):
    command = [sys.executable, "-W", "error", "-c", FUZZ, str(tmp_path / "s.pkl"), "1500", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < int(done.stdout) < 1500


@pytest.mark.timeout(20)
def test_a_state_whose_text_would_fill_the_memory(tmp_path):
    state = ()
    for _ in range(60):
        state = (state, state)
    with pytest.raises(CheckpointError, match="a f8 with the state"):
        read_pickle(write(tmp_path / "s.pkl", dtype("f8", state)))


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
