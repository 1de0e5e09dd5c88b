"""Arrays as openpi's clients write them: MessagePack maps with bytes keys.

An array is a map with the bytes keys ``__ndarray__``, ``data``, ``dtype`` and ``shape``; a numpy
scalar is one with ``__npgeneric__``, ``data`` and ``dtype``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from runtime.wire_formats import bounded_msgpack
from runtime.wire_formats.bounded_msgpack import MAX_SHOWN, MalformedFrame, shown

__all__ = ["MAX_DIMENSIONS", "MalformedFrame", "pack", "unpack"]

MAX_DIMENSIONS = 8
"""Most dimensions of an array."""

_DTYPES = {
    order + kind: np.dtype(order + kind)
    for order in ("", "<", ">", "=", "|")
    for kind in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
}
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_ARRAY_KEYS = {_ARRAY, b"data", b"dtype", b"shape"}
_SCALAR_KEYS = {_SCALAR, b"data", b"dtype"}


def pack(value: Mapping[str, Any] | np.ndarray[Any, Any]) -> bytes:
    """Return ``value`` as MessagePack; it may have arrays of booleans, integers and floats."""
    packed: bytes = msgpack.packb(value, default=_plain)
    return packed


def unpack(frame: bytes | bytearray) -> dict[str, Any]:
    """Return the map in ``frame``: text keys to None, booleans, numbers, text, bytes, lists, maps
    and read-only arrays, which are views of ``frame``.

    Raises:
        MalformedFrame: Not exactly one map, something else inside it, or more than the limits.
    """
    return bounded_msgpack.unpack(frame, _decode)


def _plain(value: object) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray) or value.dtype.str not in _DTYPES:
        raise TypeError(f"got {value!r:.60}, expected numbers, text, lists, maps or arrays of them")
    return {
        _ARRAY: True,
        b"data": value.tobytes(),
        b"dtype": value.dtype.str,
        b"shape": value.shape,
    }


def _decode(read: dict[Any, Any]) -> Any:
    if _ARRAY in read:
        return _array(read)
    if _SCALAR in read:
        return _scalar(read)
    return read


def _array(read: Mapping[Any, Any]) -> np.ndarray[Any, Any]:
    _check_keys(read, _ARRAY_KEYS)
    data, dtype, shape = read[b"data"], _dtype(read[b"dtype"]), read[b"shape"]
    if type(data) is not memoryview:
        raise MalformedFrame("data", type(data).__name__, "binary data")
    if (
        type(shape) is not list
        or len(shape) > MAX_DIMENSIONS
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise MalformedFrame(
            "shape", shown(shape), f"a list of at most {MAX_DIMENSIONS} natural numbers"
        )
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise MalformedFrame(
            "data", f"{len(data)} bytes", f"{expected} for {dtype} {tuple(shape)!s:.{MAX_SHOWN}}"
        )
    try:
        return np.frombuffer(data, dtype).reshape(shape)
    except ValueError as error:  # no values, and sizes that numpy cannot multiply
        raise MalformedFrame("shape", shown(shape), "sizes of an array") from error


def _scalar(read: Mapping[Any, Any]) -> bool | int | float:
    """Return the scalar as a Python number."""
    _check_keys(read, _SCALAR_KEYS)
    kind, data = _dtype(read[b"dtype"]).kind, read[b"data"]
    types: tuple[type, ...] = {"b": (bool,), "f": (float, int)}.get(kind, (int,))
    if type(data) not in types:
        raise MalformedFrame("data", shown(data), types[0].__name__)
    number: bool | int | float = data
    return number


def _check_keys(read: Mapping[Any, Any], expected: set[bytes]) -> None:
    if read.keys() != expected:
        raise MalformedFrame("", f"an array with keys {shown(list(read))}", f"{sorted(expected)}")


def _dtype(name: Any) -> np.dtype[Any]:
    text = bytes(name).decode("latin-1") if type(name) is memoryview else name
    if type(text) is not str or text not in _DTYPES:
        raise MalformedFrame("dtype", shown(text), "booleans, integers or floats such as '<f4'")
    return _DTYPES[text]
