"""Reads MessagePack of unknown origin: its size is checked before anything is built of it.

A few bytes can announce 2**32 elements or nest without end, and each empty map of one byte becomes
an object of 64. So the structure is scanned first, without recursion and without an allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgpack

Data = bytes | memoryview
MAX_DEPTH = 16
"""Most arrays and maps around a value."""
MAX_ITEMS = 20_000
"""Most values of a message, keys included."""
MAX_TEXT_BYTES = 65_536
"""Longest string. Binary data may be as long as the message."""
_ARRAY, _MAP, _TEXT, _BINARY, _NUMBER = "array", "map", "text", "binary", "number"
_SIZED = {
    0xC4: (_BINARY, 1), 0xC5: (_BINARY, 2), 0xC6: (_BINARY, 4),
    0xD9: (_TEXT, 1), 0xDA: (_TEXT, 2), 0xDB: (_TEXT, 4),
    0xDC: (_ARRAY, 2), 0xDD: (_ARRAY, 4), 0xDE: (_MAP, 2), 0xDF: (_MAP, 4),
}  # fmt: skip
"""First byte: what follows, and in how many bytes its length is."""
_FIXED = {
    0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8,
    0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
}  # fmt: skip
"""First byte: bytes that follow, for nil, booleans and numbers."""


class InvalidMessage(ValueError):
    """Bytes that are not a message, or one beyond the bounds; says got and expected."""


def unpack(data: Data, convert: Callable[[dict[Any, Any]], Any] | None = None) -> Any:
    """Return the value that ``data`` encodes: maps with string or bytes keys, lists, numbers.

    Args:
        data: One value. Extension types and timestamps are refused.
        convert: Is given each map, the innermost first; its result replaces the map.

    Raises:
        InvalidMessage: Not one value, or more than the bounds of this module allow.
    """
    check_structure(data)
    try:
        return msgpack.unpackb(data, object_hook=convert)
    except InvalidMessage:
        raise
    except (ValueError, msgpack.UnpackException) as error:  # text that is not UTF-8; odd keys
        raise InvalidMessage(f"message: got {error!s:.200}, expected MessagePack") from error


def check_structure(data: Data) -> None:
    """Check depth, number of values and every length of ``data``, in time that is bounded, too.

    Raises:
        InvalidMessage: As ``unpack``.
    """
    at, items, size = 0, 0, len(data)
    left = [1]  # values that are still to come, by depth
    while left:
        if not left[-1]:
            left.pop()
            continue
        left[-1] -= 1
        items += 1
        if items > MAX_ITEMS:
            raise InvalidMessage(f"message: got more than {MAX_ITEMS} values")
        if at >= size:
            raise InvalidMessage(f"message: got {size} bytes, expected more")
        kind, length, at = _read_head(data, at)
        if kind in (_ARRAY, _MAP):
            if len(left) > MAX_DEPTH:
                raise InvalidMessage(f"message: got more than {MAX_DEPTH} levels")
            left.append(length if kind is _ARRAY else 2 * length)
            continue
        if kind is _TEXT and length > MAX_TEXT_BYTES:
            raise InvalidMessage(
                f"message: got a text of {length} bytes, expected at most {MAX_TEXT_BYTES}"
            )
        at += length
    if at != size:
        raise InvalidMessage(f"message: got {size} bytes, expected {at}")


def _read_head(data: Data, at: int) -> tuple[str, int, int]:
    """Return a value's kind, its length in bytes or elements, and where its content begins."""
    first = data[at]
    at += 1
    if first < 0x80 or first >= 0xE0:
        return _NUMBER, 0, at
    if first < 0x90:
        return _MAP, first & 0x0F, at
    if first < 0xA0:
        return _ARRAY, first & 0x0F, at
    if first < 0xC0:
        return _TEXT, first & 0x1F, at
    if first in _FIXED:
        return _NUMBER, _FIXED[first], at
    if first not in _SIZED:
        raise InvalidMessage(f"message: got type 0x{first:02x}, expected no extension types")
    kind, width = _SIZED[first]
    return kind, int.from_bytes(data[at : at + width], "big"), at + width


def text_keys(value: Any, field: str) -> Mapping[str, Any]:
    """Return ``value`` if it is a map with text for its keys.

    Raises:
        InvalidMessage: It is not; names ``field``.
    """
    if not isinstance(value, Mapping):
        raise InvalidMessage(f"{field}: got {type(value).__name__}, expected a map")
    for key in value:
        if not isinstance(key, str):
            raise InvalidMessage(f"{field}: got key {key!r:.60}, expected text")
    return value
