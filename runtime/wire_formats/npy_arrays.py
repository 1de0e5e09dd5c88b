"""Arrays as GR00T's messages have them: maps with the bytes of a ``.npy`` file.

The reader is not ``numpy.load``: that evaluates the header as a Python expression. Of what it
writes, this one accepts arrays of numbers, and nothing is allocated: the result is a view.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from runtime.wire_formats import bounded_msgpack
from runtime.wire_formats.bounded_msgpack import Data, MalformedFrame, shown

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


def pack(value: Any) -> bytes:
    """Return ``value`` as MessagePack; it may have arrays of numbers."""
    packed: bytes = msgpack.packb(value, default=encode_array)
    return packed


def unpack(frame: Data) -> dict[str, Any]:
    """Return the map in ``frame``: text keys to None, booleans, numbers, text, bytes, lists, maps
    and read-only arrays, which are views of ``frame``.

    Raises:
        MalformedFrame: Not exactly one map, something else inside it, or more than the limits.
    """
    return bounded_msgpack.unpack(frame, decode_array)


def unpack_value(frame: Data) -> Any:
    """Return the one value in ``frame``, which need not be a map. Otherwise as ``unpack``."""
    return bounded_msgpack.unpack_value(frame, decode_array)


def read_npy(data: bytes | memoryview) -> NDArray[Any]:
    """Return the array of a ``.npy`` file's bytes, a read-only view of them.

    Raises:
        MalformedFrame: Not the format, a dtype that is not a number, or a length that is not the
            shape's.
    """
    magic = bytes(data[:8])
    width = _LENGTH_BYTES.get(magic[6:])
    if magic[:6] != _MAGIC or width is None:
        raise MalformedFrame(NPY, shown(magic), "a .npy of version 1 to 3")
    start = 8 + width
    length = int.from_bytes(data[8:start], "little")
    if length > MAX_HEADER_BYTES:
        raise MalformedFrame(NPY, f"a header of {length} bytes", f"at most {MAX_HEADER_BYTES}")
    header = bytes(data[start : start + length])
    match = _HEADER.fullmatch(header)
    if match is None:
        raise MalformedFrame(NPY, f"header {shown(header)}", "NumPy's")
    descr = match[1].decode("latin-1")
    if descr not in _DTYPES:
        raise MalformedFrame(NPY, f"dtype {shown(descr)}", f"one of {sorted(_DTYPES)}")
    dtype = np.dtype(descr)
    shape = tuple(int(size) for size in re.findall(rb"[0-9]+", match[3]))
    got, needed = len(data) - start - length, math.prod(shape) * dtype.itemsize
    if got != needed:
        raise MalformedFrame(NPY, f"{got} bytes", f"{needed} for shape {shape}")
    values = np.frombuffer(data, dtype, offset=start + length)
    try:
        return values.reshape(shape, order="F" if match[2] == b"True" else "C")
    except ValueError as error:  # an axis of 0 beside one that no array can have
        raise MalformedFrame(NPY, f"shape {shape}", "a smaller one") from error


def write_npy(array: NDArray[Any]) -> bytes:
    """Return the bytes of a ``.npy`` file of ``array``, which must not have objects."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def decode_array(found: dict[Any, Any]) -> Any:
    """Return the array that the map ``found`` encodes, or ``found`` if it is another map.

    Raises:
        MalformedFrame: As ``read_npy``.
    """
    if ARRAY not in found:
        return found
    data = found.get(NPY)
    if not isinstance(data, bytes | memoryview):
        raise MalformedFrame(NPY, type(data).__name__, "binary data")
    return read_npy(data)


def encode_array(value: object) -> dict[str, Any]:
    """Return the map of an array, for ``msgpack.packb(…, default=encode_array)``.

    Raises:
        TypeError: ``value`` is not an array.
    """
    if not isinstance(value, np.ndarray):
        raise TypeError(f"got {type(value).__name__}, expected an array")
    return {ARRAY: True, NPY: write_npy(value)}
