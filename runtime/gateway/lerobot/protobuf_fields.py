"""Protocol Buffers' wire format, for messages of a few plain fields.

No schema compiler and no runtime library: LeRobot's messages have one or two fields, and a compiled
message ties a program to the versions of the library that the compiler allows.
"""

from __future__ import annotations

from collections.abc import Mapping

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
"""Wire types; groups, 3 and 4, are refused."""
MAX_VARINT_BYTES = 10
MAX_FIELDS = 64
"""Most fields of a message, counted as often as they occur."""


def read_fields(message: bytes) -> Mapping[int, int | bytes]:
    """Return the fields by number: varints as int, fields with a length as bytes.

    As in every reader of the format, the last occurrence counts; fields of fixed size, which no
    message here has, are skipped.

    Raises:
        ValueError: ``message`` does not follow the format, or has more than ``MAX_FIELDS`` fields.
    """
    fields: dict[int, int | bytes] = {}
    at = 0
    for _ in range(MAX_FIELDS):
        if at == len(message):
            return fields
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == VARINT:
            fields[number], at = _varint(message, at)
            continue
        if wire_type == LENGTH:
            size, at = _varint(message, at)
        elif wire_type in (FIXED32, FIXED64):
            size = 4 if wire_type == FIXED32 else 8
        else:
            raise ValueError(f"protobuf: got wire type {wire_type}, expected 0, 1, 2 or 5")
        if size > len(message) - at:
            raise ValueError(
                f"protobuf: field {number}: got {len(message) - at} bytes, expected {size}"
            )
        if wire_type == LENGTH:
            fields[number] = message[at : at + size]
        at += size
    if at < len(message):
        raise ValueError(
            f"protobuf: got {len(message) - at} bytes after {MAX_FIELDS} fields, expected no more"
        )
    return fields


def data_field(fields: Mapping[int, int | bytes], number: int) -> bytes:
    """Return a field of bytes; empty where it is absent.

    Raises:
        ValueError: It is a number.
    """
    data = fields.get(number, b"")
    if isinstance(data, int):
        raise ValueError(f"protobuf: field {number}: got a number, expected bytes")
    return data


def write_bytes(number: int, data: bytes) -> bytes:
    """Return a message whose only field, ``number``, is ``data``; empty data is no field."""
    if not data:
        return b""
    return _write_varint(number << 3 | LENGTH) + _write_varint(len(data)) + data


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number at ``at``, and where it ends."""
    value = 0
    data = message[at : at + MAX_VARINT_BYTES]
    for count, byte in enumerate(data):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, at + count + 1
    raise ValueError(
        f"protobuf: got a number without an end in {len(data)} bytes, "
        f"expected one within {MAX_VARINT_BYTES}"
    )


def _write_varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)
