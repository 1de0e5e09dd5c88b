"""Arrays as GR00T's messages have them: maps with the bytes of a ``.npy`` file.

The reader is not ``numpy.load``: that evaluates the header as a Python expression. Of what it
writes, this one accepts arrays of numbers, and nothing is allocated: the result is a view.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.wire_formats.bounded_msgpack import InvalidMessage

ARRAY, NPY = "__ndarray_class__", "as_npy"
"""Keys of a map that is an array."""
MAX_HEADER_BYTES = 1024
"""Longest header. NumPy's own are up to 128."""
_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {b"\1\0": 2, b"\2\0": 4, b"\3\0": 4}
"""Version of the format: bytes of the header's length."""
_HEADER = re.compile(
    rb"\{'descr': '([^']{1,64})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,12}, ){0,7}[0-9]{1,12},?|)\), \} *\n?"
)
"""The header that NumPy writes, of at most 8 axes. It matches in one way only: no backtracking."""
_DTYPES = frozenset({"|b1", "|u1", "|i1"} | {f"<{kind}" for kind in
                    ("u2", "u4", "u8", "i2", "i4", "i8", "f2", "f4", "f8")})  # fmt: skip


def read_npy(data: bytes) -> NDArray[Any]:
    """Return the array of a ``.npy`` file's bytes, a read-only view of them.

    Raises:
        InvalidMessage: Not the format, a dtype that is not a number, or a length that is not the
            shape's.
    """
    width = _LENGTH_BYTES.get(data[6:8])
    if data[:6] != _MAGIC or width is None:
        raise InvalidMessage(f"array: got {data[:8]!r}, expected a .npy of version 1 to 3")
    start = 8 + width
    length = int.from_bytes(data[8:start], "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidMessage(
            f"array: got a header of {length} bytes, expected at most {MAX_HEADER_BYTES}"
        )
    header = data[start : start + length]
    match = _HEADER.fullmatch(header)
    if match is None:
        raise InvalidMessage(f"array: got header {header!r:.120}, expected NumPy's")
    descr = match[1].decode("latin-1")
    if descr not in _DTYPES:
        raise InvalidMessage(f"array: got dtype {descr!r}, expected one of {sorted(_DTYPES)}")
    dtype = np.dtype(descr)
    shape = tuple(int(size) for size in re.findall(rb"[0-9]+", match[3]))
    got, needed = len(data) - start - length, math.prod(shape) * dtype.itemsize
    if got != needed:
        raise InvalidMessage(f"array: got {got} bytes, expected {needed} for shape {shape}")
    values = np.frombuffer(data, dtype, offset=start + length)
    try:
        return values.reshape(shape, order="F" if match[2] == b"True" else "C")
    except ValueError as error:  # an axis of 0 beside one that no array can have
        raise InvalidMessage(f"array: got shape {shape}, expected a smaller one") from error


def write_npy(array: NDArray[Any]) -> bytes:
    """Return the bytes of a ``.npy`` file of ``array``, which must not have objects."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def decode_array(found: dict[Any, Any]) -> Any:
    """Return the array that the map ``found`` encodes, or ``found`` if it is another map.

    Raises:
        InvalidMessage: As ``read_npy``.
    """
    if ARRAY not in found:
        return found
    data = found.get(NPY)
    if not isinstance(data, bytes):
        raise InvalidMessage(f"array: got {NPY} {type(data).__name__}, expected bytes")
    return read_npy(data)


def encode_array(value: object) -> dict[str, Any]:
    """Return the map of an array, for ``msgpack.packb(…, default=encode_array)``.

    Raises:
        TypeError: ``value`` is not an array.
    """
    if not isinstance(value, np.ndarray):
        raise TypeError(f"got {type(value).__name__}, expected an array")
    return {ARRAY: True, NPY: write_npy(value)}
