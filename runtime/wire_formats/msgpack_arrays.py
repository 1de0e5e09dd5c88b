"""MessagePack with numpy arrays, as openpi's clients write it.

An array is a map with the bytes keys ``__ndarray__``, ``data``, ``dtype`` and ``shape``; a numpy
scalar is one with ``__npgeneric__``, ``data`` and ``dtype``.

The reader is our own, because a foreign frame needs limits that the library does not have: depth
and number of values are bounded for the whole frame, nothing is allocated by a length that the
frame only claims, and arrays are views of the frame, so no picture is copied.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

MAX_DEPTH = 8
"""Most maps and arrays inside each other."""
MAX_VALUES = 16_384
"""Most values of a frame, keys included. An array of numpy counts as a few."""
MAX_DIMENSIONS = 8
"""Most dimensions of an array."""
MAX_SHOWN = 60
"""Most characters of a foreign value in an error."""

_DTYPES = {
    order + kind: np.dtype(order + kind)
    for order in ("", "<", ">", "=", "|")
    for kind in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
}
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_ARRAY_KEYS = {_ARRAY, b"data", b"dtype", b"shape"}
_SCALAR_KEYS = {_SCALAR, b"data", b"dtype"}
_NUMBERS: Mapping[int, struct.Struct] = {
    0xCA: struct.Struct(">f"),
    0xCB: struct.Struct(">d"),
    0xCC: struct.Struct(">B"),
    0xCD: struct.Struct(">H"),
    0xCE: struct.Struct(">I"),
    0xCF: struct.Struct(">Q"),
    0xD0: struct.Struct(">b"),
    0xD1: struct.Struct(">h"),
    0xD2: struct.Struct(">i"),
    0xD3: struct.Struct(">q"),
}
_BYTE, _SHORT, _LONG = struct.Struct(">B"), struct.Struct(">H"), struct.Struct(">I")
_BINARY = {0xC4: _BYTE, 0xC5: _SHORT, 0xC6: _LONG}
_TEXT = {0xD9: _BYTE, 0xDA: _SHORT, 0xDB: _LONG}
_LISTS = {0xDC: _SHORT, 0xDD: _LONG}
_MAPS = {0xDE: _SHORT, 0xDF: _LONG}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class MalformedFrame(Exception):
    """A frame that is not what openpi's clients write.

    Attributes:
        field: Where: the keys, separated by ``/``.
        got, expected: What was found there, and what belongs there.
    """

    def __init__(self, field: str, got: str, expected: str) -> None:
        super().__init__(f"{field or 'frame'}: got {got}, expected {expected}")
        self.field, self.got, self.expected = field, got, expected


def pack(value: Mapping[str, Any] | np.ndarray[Any, Any]) -> bytes:
    """Return ``value`` as MessagePack; it may have arrays of booleans, integers and floats."""
    packed: bytes = msgpack.packb(value, default=_plain)
    return packed


def _plain(value: object) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray) or value.dtype.str not in _DTYPES:
        raise TypeError(f"got {value!r:.60}, expected numbers, text, lists, maps or arrays of them")
    return {
        _ARRAY: True,
        b"data": value.tobytes(),
        b"dtype": value.dtype.str,
        b"shape": value.shape,
    }


def unpack(frame: bytes | bytearray) -> dict[str, Any]:
    """Return the map in ``frame``: text keys to None, booleans, numbers, text, bytes, lists, maps
    and read-only arrays, which are views of ``frame``.

    Raises:
        MalformedFrame: Not exactly one map, something else inside it, or more than the limits.
    """
    reader = _Reader(frame)
    value = reader.value(0)
    if type(value) is not dict:
        raise MalformedFrame("", type(value).__name__, "a map")
    if reader.left:
        raise MalformedFrame("", f"{reader.left} bytes after the map", "none")
    return value


class _Reader:
    """Reads values from the front of ``frame``.

    The commonest types are read in ``value`` itself: a frame has some thirty small values beside
    its pictures, and calls are most of their cost.
    """

    def __init__(self, frame: bytes | bytearray) -> None:
        self._frame = memoryview(frame).toreadonly()
        self._end = len(frame)
        self._at = 0
        self._values = 0

    @property
    def left(self) -> int:
        """Bytes that are not read yet."""
        return self._end - self._at

    def value(self, depth: int) -> Any:
        """Return the next value; binary data as a view."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise MalformedFrame("", f"more than {MAX_VALUES} values", "fewer")
        at = self._at
        if at >= self._end:
            raise self._cut_off()
        code = self._frame[at]
        self._at = at + 1
        if code < 0x80:
            return code
        if code < 0x90:
            return self._map(code & 0x0F, depth)
        if code < 0xA0:
            return self._list(code & 0x0F, depth)
        if code < 0xC0:
            return self._text(code & 0x1F)
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _BINARY:
            return self._take(self._number(_BINARY[code]))
        if code in _NUMBERS:
            return self._number(_NUMBERS[code])
        if code in _TEXT:
            return self._text(self._number(_TEXT[code]))
        if code in _LISTS:
            return self._list(self._number(_LISTS[code]), depth)
        if code in _MAPS:
            return self._map(self._number(_MAPS[code]), depth)
        if code >= 0xE0:
            return code - 0x100
        raise MalformedFrame(
            "", f"type 0x{code:02x}", "numbers, text, binary data, lists, maps and arrays"
        )

    def _cut_off(self) -> MalformedFrame:
        return MalformedFrame("", f"an end after {self._end} bytes", "the whole value")

    def _take(self, count: int) -> memoryview:
        start = self._at
        stop = start + count
        if stop > self._end:
            raise self._cut_off()
        self._at = stop
        return self._frame[start:stop]

    def _number(self, layout: struct.Struct) -> Any:
        at = self._at
        stop = at + layout.size
        if stop > self._end:
            raise self._cut_off()
        self._at = stop
        return layout.unpack_from(self._frame, at)[0]

    def _text(self, count: int) -> str:
        try:
            return str(self._take(count), "utf-8")
        except UnicodeDecodeError as error:
            raise MalformedFrame("", "text that is not UTF-8", "UTF-8") from error

    def _list(self, count: int, depth: int) -> list[Any]:
        self._enter(count, depth)
        return [_kept(self.value(depth + 1)) for _ in range(count)]

    def _map(self, count: int, depth: int) -> Any:
        self._enter(2 * count, depth)
        read: dict[Any, Any] = {}
        for _ in range(count):
            key = _key(self.value(depth + 1))
            if key in read:
                raise MalformedFrame("", f"the key {_shown(key)} twice", "once")
            try:
                read[key] = self.value(depth + 1)
            except MalformedFrame as error:
                raise _inside(key, error) from error
        if _ARRAY in read:
            return _array(read)
        if _SCALAR in read:
            return _scalar(read)
        for key, value in read.items():
            if type(key) is bytes:
                raise MalformedFrame("", f"the bytes key {_shown(key)}", "a text key")
            read[key] = _kept(value)
        return read

    def _enter(self, count: int, depth: int) -> None:
        """Refuse before reading: every value takes a byte at least."""
        if depth >= MAX_DEPTH:
            raise MalformedFrame("", f"more than {MAX_DEPTH} levels", "fewer")
        if count > MAX_VALUES:
            raise MalformedFrame("", f"{count} values", f"at most {MAX_VALUES}")
        if count > self.left:
            raise MalformedFrame("", f"{count} values in {self.left} bytes", "the whole value")


def _kept(value: Any) -> Any:
    """Return a copy of binary data outside of an array."""
    return bytes(value) if type(value) is memoryview else value


def _key(key: Any) -> str | bytes:
    key = _kept(key)
    if type(key) not in (str, bytes):
        raise MalformedFrame("", f"a key {_shown(key)}", "text")
    result: str | bytes = key
    return result


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
            "shape", _shown(shape), f"a list of at most {MAX_DIMENSIONS} natural numbers"
        )
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise MalformedFrame(
            "data", f"{len(data)} bytes", f"{expected} for {dtype} {tuple(shape)!s:.{MAX_SHOWN}}"
        )
    try:
        return np.frombuffer(data, dtype).reshape(shape)
    except ValueError as error:  # no values, and sizes that numpy cannot multiply
        raise MalformedFrame("shape", _shown(shape), "sizes of an array") from error


def _scalar(read: Mapping[Any, Any]) -> bool | int | float:
    """Return the scalar as a Python number."""
    _check_keys(read, _SCALAR_KEYS)
    kind, data = _dtype(read[b"dtype"]).kind, read[b"data"]
    types: tuple[type, ...] = {"b": (bool,), "f": (float, int)}.get(kind, (int,))
    if type(data) not in types:
        raise MalformedFrame("data", _shown(data), types[0].__name__)
    number: bool | int | float = data
    return number


def _check_keys(read: Mapping[Any, Any], expected: set[bytes]) -> None:
    if read.keys() != expected:
        raise MalformedFrame("", f"an array with keys {_shown(list(read))}", f"{sorted(expected)}")


def _dtype(name: Any) -> np.dtype[Any]:
    text = bytes(name).decode("latin-1") if type(name) is memoryview else name
    if type(text) is not str or text not in _DTYPES:
        raise MalformedFrame("dtype", _shown(text), "booleans, integers or floats such as '<f4'")
    return _DTYPES[text]


def _inside(key: str | bytes, error: MalformedFrame) -> MalformedFrame:
    """Return ``error`` with ``key`` before its field."""
    name = key if isinstance(key, str) else key.decode("latin-1")
    shown = name[:MAX_SHOWN] if name.isprintable() else _shown(name)
    return MalformedFrame("/".join(filter(None, (shown, error.field))), error.got, error.expected)


def _shown(value: Any) -> str:
    return f"{' '.join(repr(value).split()):.{MAX_SHOWN}}"
