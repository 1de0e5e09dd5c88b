"""Reads MessagePack of unknown origin within bounds.

The reader is our own, because a foreign frame needs limits that the library does not have: depth
and number of values are bounded for the whole frame, and nothing is allocated by a length that the
frame only claims. Binary data are views of the frame, so an encoding of arrays on top of this
reader copies no picture.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

Data = bytes | bytearray | memoryview
MAX_DEPTH = 8
"""Most maps and arrays inside each other."""
MAX_VALUES = 16_384
"""Most values of a frame, keys included. An array of numpy counts as a few."""
MAX_TEXT_BYTES = 65_536
"""Longest text. Binary data may be as long as the frame."""
MAX_SHOWN = 60
"""Most characters of a foreign value in an error."""

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
    """A frame that is not what the protocol's clients write.

    Attributes:
        field: Where: the keys, separated by ``/``.
        got, expected: What was found there, and what belongs there.
    """

    def __init__(self, field: str, got: str, expected: str) -> None:
        super().__init__(f"{field or 'frame'}: got {got}, expected {expected}")
        self.field, self.got, self.expected = field, got, expected


def unpack(frame: Data, decode: Callable[[dict[Any, Any]], Any]) -> dict[str, Any]:
    """Return the map in ``frame``: text keys to None, booleans, numbers, text, bytes, lists, maps
    and what ``decode`` makes of maps.

    Args:
        frame: One map. Extension types and timestamps are refused.
        decode: Is given each map, the innermost first, with text or bytes for its keys and
            read-only views of ``frame`` for binary data. Returns what the map encodes, or the map
            itself if it is a plain one. May raise ``MalformedFrame``.

    Raises:
        MalformedFrame: Not exactly one map, something else inside it, or more than the limits.
    """
    reader = _Reader(frame, decode)
    value = reader.value(0)
    if type(value) is not dict:
        raise MalformedFrame("", type(value).__name__, "a map")
    reader.check_end("the map")
    return value


def unpack_value(frame: Data, decode: Callable[[dict[Any, Any]], Any]) -> Any:
    """Return the one value in ``frame``, which need not be a map. Otherwise as ``unpack``."""
    reader = _Reader(frame, decode)
    value = _kept(reader.value(0))
    reader.check_end("the value")
    return value


class _Reader:
    """Reads values from the front of ``frame``.

    The commonest types are read in ``value`` itself: a frame has some thirty small values beside
    its pictures, and calls are most of their cost.
    """

    def __init__(self, frame: Data, decode: Callable[[dict[Any, Any]], Any]) -> None:
        self._frame = memoryview(frame).toreadonly()
        self._decode = decode
        self._end = len(self._frame)
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

    def check_end(self, read: str) -> None:
        """Raise ``MalformedFrame`` if anything follows what was ``read``."""
        if self.left:
            raise MalformedFrame("", f"{self.left} bytes after {read}", "none")

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
        if count > MAX_TEXT_BYTES:
            raise MalformedFrame("", f"a text of {count} bytes", f"at most {MAX_TEXT_BYTES}")
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
                raise MalformedFrame("", f"the key {shown(key)} twice", "once")
            try:
                read[key] = self.value(depth + 1)
            except MalformedFrame as error:
                raise _inside(key, error) from error
        decoded = self._decode(read)
        if decoded is not read:
            return decoded
        for key, value in read.items():
            if type(key) is bytes:
                raise MalformedFrame("", f"the bytes key {shown(key)}", "a text key")
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


def require_map(value: Any, field: str) -> Mapping[str, Any]:
    """Return ``value``, which is of ``unpack``'s result, if it is a map.

    Raises:
        MalformedFrame: It is not; names ``field``.
    """
    if not isinstance(value, Mapping):
        raise MalformedFrame(field, type(value).__name__, "a map")
    return value


def shown(value: Any) -> str:
    """Return ``value`` for an error: printable, and short."""
    return f"{' '.join(repr(value).split()):.{MAX_SHOWN}}"


def _kept(value: Any) -> Any:
    """Return a copy of binary data outside of an array."""
    return bytes(value) if type(value) is memoryview else value


def _key(key: Any) -> str | bytes:
    key = _kept(key)
    if type(key) not in (str, bytes):
        raise MalformedFrame("", f"a key {shown(key)}", "text")
    result: str | bytes = key
    return result


def _inside(key: str | bytes, error: MalformedFrame) -> MalformedFrame:
    """Return ``error`` with ``key`` before its field."""
    name = key if isinstance(key, str) else key.decode("latin-1")
    place = name[:MAX_SHOWN] if name.isprintable() else shown(name)
    return MalformedFrame("/".join(filter(None, (place, error.field))), error.got, error.expected)
