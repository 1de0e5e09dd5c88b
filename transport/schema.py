"""Message schemas: which arrays a message holds, their shapes, dtypes and byte offsets.

A schema is declared and validated once, during the handshake. Afterwards both sides make views of a
buffer from the offsets alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transport.errors import ProtocolError, SchemaMismatch

ALIGNMENT = 64
"""Every array starts on a cache line."""
MAX_ARRAYS = 64
MAX_NAME_CHARS = 128
MAX_DIMENSIONS = 8
MAX_MESSAGE_BYTES = 256 * 2**20
"""Maximum length of one message, checked before anything is allocated."""
USED = "/used"
"""Suffix of the int64 scalar ``X/used``: how many items of ``X``, the schema's last array, are
used.

The other items of ``X`` have no meaning and are not sent over a network. An array of another dtype
or shape may have such a name too, because an image is named after its camera."""
DTYPES = ("uint8", "uint16", "int32", "int64", "float32", "float64")
"""dtypes that a message may contain, little-endian."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array: name, dtype (one of ``DTYPES``) and shape (``()`` for a scalar)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= MAX_NAME_CHARS or not self.name.isprintable():
            raise SchemaMismatch("name", repr(self.name), f"1 to {MAX_NAME_CHARS} characters")
        if self.dtype not in DTYPES:
            raise SchemaMismatch(self.name, f"dtype {self.dtype!r}", f"one of {DTYPES}")
        if len(self.shape) > MAX_DIMENSIONS or any(n < 1 for n in self.shape):
            raise SchemaMismatch(
                self.name, f"shape {self.shape}", f"up to {MAX_DIMENSIONS} dimensions, each >= 1"
            )
        if self.nbytes > MAX_MESSAGE_BYTES:
            raise SchemaMismatch(self.name, f"{self.nbytes} bytes", f"<= {MAX_MESSAGE_BYTES}")

    @property
    def nbytes(self) -> int:
        """Length of the array in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Schema:
    """An ordered set of arrays and their layout in one message.

    Attributes:
        specs: The arrays by name, in order.
        offsets: Byte offset of each, a multiple of ``ALIGNMENT``.
        nbytes: Length of one message in bytes; its maximum where the length varies.
        tail: Name of the last array if its used length varies (``USED``), else None.

    Raises:
        SchemaMismatch: A duplicate name, too many arrays or bytes, or ``USED`` for an array that is
            not the last.
    """

    def __init__(self, specs: tuple[ArraySpec, ...]) -> None:
        if len(specs) > MAX_ARRAYS:
            raise SchemaMismatch("schema", f"{len(specs)} arrays", f"<= {MAX_ARRAYS}")
        self.specs = {spec.name: spec for spec in specs}
        if len(self.specs) != len(specs):
            raise SchemaMismatch("schema", f"{[s.name for s in specs]}", "different names")
        self.offsets: dict[str, int] = {}
        end = 0
        for spec in specs:
            self.offsets[spec.name] = start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + spec.nbytes
        self.nbytes = end
        self._layout = [(s.name, s.shape, np.dtype(s.dtype), self.offsets[s.name]) for s in specs]
        if end > MAX_MESSAGE_BYTES:
            raise SchemaMismatch("schema", f"{end} bytes", f"<= {MAX_MESSAGE_BYTES}")
        self.tail = self._find_tail()

    def _find_tail(self) -> str | None:
        counted = [
            spec.name.removesuffix(USED)
            for spec in self.specs.values()
            if spec.name.endswith(USED) and (spec.dtype, spec.shape) == ("int64", ())
        ]
        if not counted:
            return None
        last = list(self.specs.values())[-1]
        if counted != [last.name] or len(last.shape) != 1:
            raise SchemaMismatch(
                counted[0] + USED,
                "a used length",
                "one only for the last array, which has one dimension",
            )
        return last.name

    def length(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """Used length of a message in bytes, up to the last used item.

        Raises:
            SchemaMismatch: The number of used items is below 1 or more than the last array has.
        """
        if self.tail is None:
            return self.nbytes
        used, spec = int(arrays[self.tail + USED]), self.specs[self.tail]
        if not 1 <= used <= spec.shape[0]:
            raise SchemaMismatch(self.tail + USED, str(used), f"1 to {spec.shape[0]}")
        return self.offsets[self.tail] + used * np.dtype(spec.dtype).itemsize

    def cut(self, nbytes: int) -> Schema | None:
        """Schema of a message of ``nbytes`` used bytes; None if no message has this length."""
        if nbytes == self.nbytes:
            return self
        if self.tail is None or not self.offsets[self.tail] < nbytes < self.nbytes:
            return None
        last = self.specs[self.tail]
        used, rest = divmod(nbytes - self.offsets[self.tail], np.dtype(last.dtype).itemsize)
        if rest:
            return None
        fixed = tuple(self.specs.values())[:-1]
        return Schema((*fixed, ArraySpec(last.name, last.dtype, (used,))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and list(self.specs.values()) == list(other.specs.values())

    def __hash__(self) -> int:
        return hash(tuple(self.specs.values()))

    def __repr__(self) -> str:
        return f"Schema({', '.join(f'{s.name}: {s}' for s in self.specs.values())})"

    def views(self, buffer: Any, *, writable: bool = False) -> dict[str, NDArray[Any]]:
        """Arrays by name over ``buffer`` (at least ``nbytes`` long), without copying."""
        arrays: dict[str, NDArray[Any]] = {
            name: np.ndarray(shape, dtype, buffer, offset)
            for name, shape, dtype, offset in self._layout
        }
        if not writable:
            for view in arrays.values():
                view.flags.writeable = False
        return arrays

    def check(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Raise ``SchemaMismatch`` unless ``arrays`` has exactly these names, shapes and dtypes."""
        if arrays.keys() != self.specs.keys():
            for name in self.specs.keys() - arrays.keys():
                raise SchemaMismatch(name, "nothing", str(self.specs[name]))
            unknown = sorted(arrays.keys() - self.specs.keys())
            raise SchemaMismatch(unknown[0], "an array", f"only {list(self.specs)}")
        for name, spec in self.specs.items():
            array = arrays[name]
            if array.shape != spec.shape or array.dtype != spec.dtype:
                raise SchemaMismatch(name, f"{array.dtype} {array.shape}", str(spec))

    def to_json(self) -> str:
        """JSON text for ``from_json``: a list of ``[name, dtype, [sizes]]``."""
        return json.dumps([[s.name, s.dtype, list(s.shape)] for s in self.specs.values()])

    @classmethod
    def from_json(cls, text: str | bytes) -> Schema:
        """Parse the text of ``to_json`` from an untrusted peer.

        Raises:
            ProtocolError: The text does not have that form.
            SchemaMismatch: It has, and a value is out of bounds.
        """
        try:
            raw = json.loads(text)
            if not isinstance(raw, list) or len(raw) > MAX_ARRAYS:
                raise ValueError(f"a list of at most {MAX_ARRAYS} arrays")
            specs = []
            for name, dtype, shape in raw:
                sizes = isinstance(shape, list) and all(type(n) is int for n in shape)
                if not (isinstance(name, str) and isinstance(dtype, str) and sizes):
                    raise ValueError("[name, dtype, [sizes]] each")
                specs.append(ArraySpec(name, dtype, tuple(shape)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ProtocolError(f"schema: got {text[:80]!r}, expected {error}") from error
        return cls(tuple(specs))
