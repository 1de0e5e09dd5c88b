"""MessagePack with arrays: what openpi writes is read without a copy, all else is refused."""

from __future__ import annotations

import datetime
import struct
import time
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from runtime.wire_formats.bounded_msgpack import (
    MAX_DEPTH,
    MAX_TEXT_BYTES,
    MAX_VALUES,
    MalformedFrame,
)
from runtime.wire_formats.msgpack_arrays import MAX_DIMENSIONS, pack, unpack

ARRAY, SCALAR = b"__ndarray__", b"__npgeneric__"


def array(**changes: Any) -> bytes:
    """A frame with one array under "x", as openpi's client writes it, with changes."""
    valid = {ARRAY: True, b"data": bytes(24), b"dtype": "<f4", b"shape": (2, 3)}
    changed = {**valid, **{key.encode(): value for key, value in changes.items()}}
    return msgpack.packb({"x": {k: v for k, v in changed.items() if v is not None}})


def scalar(data: Any, dtype: Any) -> bytes:
    return msgpack.packb({"x": {SCALAR: True, b"data": data, b"dtype": dtype}})


TEXT = st.text("ax/é語😀\0\n", max_size=40)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | TEXT | st.binary()
    | st.floats(allow_nan=False, width=32),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(TEXT, inner, max_size=20),
    max_leaves=40,
)  # fmt: skip


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (1 + max(map(depth, inner), default=0)) if isinstance(value, dict | list) else 0


@settings(max_examples=25)
@given(st.dictionaries(TEXT, PLAIN).filter(lambda value: depth(value) <= MAX_DEPTH))
def test_plain_values_are_read_as_the_library_reads_them(value: dict[str, Any]) -> None:
    assert unpack(pack(value)) == value
    assert unpack(msgpack.packb(value, use_single_float=True)) == msgpack.unpackb(
        msgpack.packb(value, use_single_float=True)
    )


@given(
    npst.arrays(
        npst.boolean_dtypes()
        | npst.integer_dtypes(endianness="?")
        | npst.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
        npst.array_shapes(min_dims=0, max_dims=5, min_side=0),
    )
)
def test_arrays_are_what_they_were(value: Any) -> None:
    read = unpack(pack({"x": {"y": value}}))["x"]["y"]
    assert (read.dtype, read.shape) == (value.dtype, value.shape)
    np.testing.assert_array_equal(read, value)


def test_a_picture_is_a_view_of_the_frame_that_nobody_can_write() -> None:
    picture = np.arange(480 * 640 * 3, dtype=np.uint32).astype(np.uint8).reshape(480, 640, 3)
    frame = bytearray(pack({"x": picture}))
    tracemalloc.start()
    read = unpack(frame)["x"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    assert np.shares_memory(read, np.frombuffer(frame, np.uint8)) and not read.flags.writeable
    np.testing.assert_array_equal(read, picture)


@pytest.mark.parametrize(
    ("data", "dtype"), [(1.5, "<f4"), (3, "<i8"), (True, "|b1"), (2, "<f8"), (1, "<f2")]
)
def test_scalars_are_numbers(data: Any, dtype: str) -> None:
    read = unpack(scalar(data, dtype))["x"]
    assert (read, type(read)) == (data, type(data))


REFUSED = {
    "object": (array(dtype="|O"), "x/dtype: got '|O', expected booleans, integers or floats"),
    "void": (array(dtype="|V4"), "x/dtype: got '|V4', expected booleans, integers or floats"),
    "complex": (array(dtype="<c8"), "x/dtype: got '<c8', expected booleans, integers or floats"),
    "text": (array(dtype="<U4"), "x/dtype: got '<U4', expected booleans, integers or floats"),
    "date": (array(dtype="<M8[s]"), "x/dtype: got '<M8[s]', expected booleans, integers or"),
    "fields": (array(dtype="f4,O"), "x/dtype: got 'f4,O', expected booleans, integers or floats"),
    "sub-array": (array(dtype="(6,)f4"), "x/dtype: got '(6,)f4', expected booleans, integers or"),
    "no dtype": (array(dtype=3), "x/dtype: got 3, expected booleans, integers or floats"),
    "data too short": (array(data=bytes(23)), "x/data: got 23 bytes, expected 24 for float32"),
    "data too long": (array(data=bytes(25)), "x/data: got 25 bytes, expected 24 for float32"),
    "shape too large": (array(shape=(2**62, 2**62)), "x/data: got 24 bytes, expected 8507059"),
    "empty but huge": (array(data=b"", shape=(0, 2**62, 2**62)), "x/shape: got [0, 46116860184"),
    "negative shape": (array(shape=(-2, -3)), "x/shape: got [-2, -3], expected a list of"),
    "shape of floats": (array(shape=(2.0, 3)), "x/shape: got [2.0, 3], expected a list of"),
    "shape of truths": (array(shape=(True, 6)), "x/shape: got [True, 6], expected a list of"),
    "shape is a number": (array(shape=6), "x/shape: got 6, expected a list of"),
    "many dimensions": (array(shape=(1,) * (MAX_DIMENSIONS + 1)), "x/shape: got [1, 1, 1"),
    "data is text": (array(data="x" * 24), "x/data: got str, expected binary data"),
    "no shape": (array(shape=None), "x: got an array with keys [b'__ndarray__', b'data', b'dtyp"),
    "more keys": (array(more=1), "x: got an array with keys [b'__ndarray__', b'data', b'dtype'"),
    "scalar of text": (scalar("1", "<f4"), "x/data: got '1', expected float"),
    "scalar of a float": (scalar(1.5, "<i4"), "x/data: got 1.5, expected int"),
    "scalar object": (scalar(1, "|O"), "x/dtype: got '|O', expected booleans, integers or"),
    "bytes key": (msgpack.packb({b"x": 1}), "frame: got the bytes key b'x', expected a text key"),
    "number as a key": (msgpack.packb({1: 1}), "frame: got a key 1, expected text"),
    "an array as a key": (
        b"\x81" + pack({"x": np.zeros((2, 2))})[3:] + b"\1",
        "frame: got a key array([[0., 0.], [0., 0.]]), expected text",
    ),
    "map as a key": (b"\x81\x80\x01", "frame: got a key {}, expected text"),
    "a key twice": (b"\x82\xa1x\1\xa1x\2", "frame: got the key 'x' twice, expected once"),
    "extension": (
        msgpack.packb({"x": msgpack.ExtType(5, b"data")}),
        "x: got type 0xd6, expected numbers, text",
    ),
    "time": (
        msgpack.packb({"x": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)}, datetime=True),
        "x: got type 0xd6, expected numbers, text",
    ),
    "not UTF-8": (b"\x81\xa1x\xa1\xff", "x: got text that is not UTF-8, expected UTF-8"),
    "long text": (
        msgpack.packb({"x": "y" * (MAX_TEXT_BYTES + 1)}),
        f"x: got a text of {MAX_TEXT_BYTES + 1} bytes, expected at most {MAX_TEXT_BYTES}",
    ),
    "ending": (b"\x81\xa1x\xc6\xff\xff\xff\xff", "x: got an end after 8 bytes, expected the"),
    "many claimed": (b"\x81\xa1x\xdd\xff\xff\xff\xff", "x: got 4294967295 values, expected at mo"),
    "more claimed than left": (b"\x81\xa1x\xdc\x10\0\1", "x: got 4096 values in 1 bytes, expected"),
    "many pairs claimed": (b"\xdf\xff\xff\xff\xff", "frame: got 8589934590 values, expected at m"),
    "many": (
        msgpack.packb({"x": [[0] * 1000] * 20}),
        f"x: got more than {MAX_VALUES} values, expected fewer",
    ),
    "deep": (b"\x81\xa1x" + b"\x91" * 100_000, f"x: got more than {MAX_DEPTH} levels, expected"),
    "deep in maps": (b"\x81\xa1x" * 100_000, "x/x/x/x/x/x/x/x: got more than 8 levels, expected"),
    "control characters": (b"\x81\xa4\x1b[2J\xc1", r"'\x1b[2J': got type 0xc1, expected numbers"),
    "nothing": (b"", "frame: got an end after 0 bytes, expected the whole value"),
    "two maps": (b"\x80\x80", "frame: got 1 bytes after the map, expected none"),
    "an array at the top": (pack({"x": np.zeros(1)})[3:], "frame: got ndarray, expected a map"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_with_the_place(name: str) -> None:
    frame, error = REFUSED[name]
    with pytest.raises(MalformedFrame) as caught:
        unpack(frame)
    assert str(caught.value).startswith(error)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


def test_every_end_of_a_frame_is_refused() -> None:
    frame = pack({"images": {"top": np.zeros((2, 3, 3), np.uint8)}, "state": [1.0, 2], "p": "x"})
    for end in range(len(frame)):
        with pytest.raises(MalformedFrame):
            unpack(frame[:end])


@pytest.mark.parametrize("width", ["many lists", "many maps", "many texts"])
def test_a_large_frame_costs_little(width: str) -> None:
    """Five megabytes, each byte a value."""
    fill = {"many lists": b"\x90", "many maps": b"\x80", "many texts": b"\xa0"}[width]
    frame = b"\x81\xa1x\xdd" + struct.pack(">I", MAX_VALUES - 10) + fill * 5_000_000
    began_s = time.process_time()
    tracemalloc.start()
    with pytest.raises(MalformedFrame):
        unpack(frame)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000
    assert time.process_time() - began_s < 5.0


@pytest.mark.parametrize("value", [np.zeros(1, complex), np.array([None]), object(), {1, 2}])
def test_only_numbers_are_written(value: Any) -> None:
    with pytest.raises(TypeError, match="expected numbers, text"):
        pack({"x": value})
