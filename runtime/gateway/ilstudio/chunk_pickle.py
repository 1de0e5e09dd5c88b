"""Writes chunks as the pickle that an ILStudio client expects, without running a pickler.

The pickle is a list over the steps of a chunk; each step is an object array (N,) of dicts ``{action
(A,) float32, ctrl_space, ctrl_type, gripper_continuous}``. Its bytes are the same for all chunks
of the same size but for the actions' numbers. So they are made once, every step as long as the next
one, and then only the numbers are written, in one copy.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from policies.types import ActionChunk

NO_ACTIONS = b"\x80\x04]."
"""An empty list, which makes the client raise."""
CTRL_TYPES = {"abs": "abs", "delta": "delta", "relative": "rel"}
"""ILStudio's name of each kind of action."""

_Kind = tuple[str, str, bool]
"""(ctrl_space, ctrl_type, gripper_continuous)."""
_MAX_TEMPLATES = 16
"""Sizes of chunks that are kept."""
_ARRAY = b"R(K\x01"
"""Calls numpy's reconstructor, and begins the state: version; then shape, dtype, order, content."""


class ChunkWriter:
    """Writes chunks; keeps what it prepared for each size. Not thread-safe."""

    def __init__(self) -> None:
        self._templates: dict[tuple[object, ...], _Template] = {}

    def write(self, chunks: Sequence[ActionChunk]) -> memoryview:
        """Return the pickle of one chunk per row, all of the same size. Valid until the next call.

        Raises:
            ValueError: The chunks differ in size or in the kind of their actions.
        """
        first = chunks[0]
        steps, dim = first.actions.shape
        kind: _Kind = (first.ctrl_space, first.ctrl_type, first.gripper_continuous)
        for chunk in chunks:
            if chunk.actions.shape != (steps, dim):
                got = f"shape {chunk.actions.shape}"
                raise ValueError(f"chunks: got {got}, expected {(steps, dim)} in all of them")
            other = (chunk.ctrl_space, chunk.ctrl_type, chunk.gripper_continuous)
            if other != kind:
                raise ValueError(f"chunks: got {other}, expected {kind} in all of them")
        key = (steps, len(chunks), dim, *kind)
        template = self._templates.get(key)
        if template is None:
            while len(self._templates) >= _MAX_TEMPLATES:
                del self._templates[next(iter(self._templates))]
            template = self._templates[key] = _Template(steps, len(chunks), dim, kind)
        for row, chunk in zip(template.rows, chunks, strict=True):
            row[:] = np.ascontiguousarray(chunk.actions, "<f4").view(np.uint8)
        return template.data


class _Template:
    """The pickle of a size, with room for the numbers.

    Attributes:
        data: The whole pickle.
        rows: By row, (steps, 4 * dim) uint8 views of ``data``.
    """

    def __init__(self, steps: int, count: int, dim: int, kind: _Kind) -> None:
        head, block, places = _parts(count, dim, kind)
        whole = bytearray(head + block * steps + b"e.")
        self.data = memoryview(whole)
        blocks = np.frombuffer(whole, np.uint8, len(block) * steps, len(head)).reshape(steps, -1)
        self.rows: list[NDArray[np.uint8]] = [blocks[:, at : at + 4 * dim] for at in places]


def _parts(count: int, dim: int, kind: _Kind) -> tuple[bytes, bytes, list[int]]:
    """Return what comes before the steps, one step, and where in it each row's numbers are."""
    space, ctrl_type, gripper = kind[0], CTRL_TYPES[kind[1]], kind[2]
    # Everything that occurs more than once is put into the memo first.
    shared = {
        "reconstruct": b"cnumpy.core.multiarray\n_reconstruct\n",
        "empty": b"cnumpy\nndarray\nK\x00\x85C\x01b\x87",
        "objects": _dtype("O8", "|", 63),
        "numbers": _dtype("f4", "<", 0),
        "rows": _integer(count) + b"\x85",
        "dimensions": _integer(dim) + b"\x85",
        **{text: _text(text) for text in ("action", "ctrl_space", "ctrl_type", space, ctrl_type)},
        "gripper": _text("gripper_continuous"),
    }
    put = (made + b"q" + bytes((at,)) + b"0" for at, made in enumerate(shared.values()))
    get = {name: b"h" + bytes((at,)) for at, name in enumerate(shared)}
    head = b"\x80\x04" + b"".join(put) + b"]("
    array = get["reconstruct"] + get["empty"] + _ARRAY
    before = b"}(" + get["ctrl_space"] + get[space] + get["ctrl_type"] + get[ctrl_type]
    before += get["action"] + array + get["dimensions"] + get["numbers"] + b"\x89"
    before += b"B" + struct.pack("<I", 4 * dim)
    after = b"tb" + get["gripper"] + (b"\x88" if gripper else b"\x89") + b"u"
    begin = array + get["rows"] + get["objects"] + b"\x89]("
    row = len(before) + 4 * dim + len(after)
    places = [len(begin) + row * number + len(before) for number in range(count)]
    return head, begin + (before + bytes(4 * dim) + after) * count + b"etb", places


def _dtype(code: str, order: str, flags: int) -> bytes:
    """numpy's dtype of ``code``, with its state."""
    make = b"cnumpy\ndtype\n" + _text(code) + b"\x89\x88\x87R"
    state = b"(K\x03" + _text(order) + b"NNN" + 2 * _integer(-1) + _integer(flags) + b"t"
    return make + state + b"b"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"\x8c" + bytes((len(data),)) + data


def _integer(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)
