"""A fuzzer's bytes, read as numbers, text and changed messages.

Zeros, and what is read past the end, change nothing: an empty input is the valid message. So a
mutation moves away from what is accepted by one step, and depth is reached from the first input on.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

reached: Counter[str] = Counter()
"""How often a target got past each of its gates: a target that accepts nothing tests nothing."""

NUMBERS = (
    *(0, 1, -1, 2, 3, 4, 5, 8, 64, 127, 128, 255, 256, 4095, 4096, 4097, 65535, 65536),
    *(
        2**31 - 1,
        2**31,
        -(2**31),
        2**32,
        2**40 - 1,
        2**40,
        2**62,
        2**63 - 1,
        -(2**63),
        2**63,
        2**64,
    ),
    10**400,
)
FLOATS = (0.5, -0.0, 1e-320, 1e308, 1e400, -1e400, float("nan"), 0.1, 10_000.0, 3.6e6)
TEXTS = (
    *("", "a", "state", "images/top", "jpeg", "jpeg/used", "jpeg/lengths", "uint8", "int64"),
    *("float32", "shm", "zmq", "robot", "sim", "ContractMismatch", "ObservationError", "area"),
    *("\0", "\ud800", "\x1b[2J", "é" * 128, "x" * 257, "NaN", "load", "status", "top", "wrist"),
)
_DEEP = "@deep@"
_DROPPED = object()


class Feed:
    """Reads ``data`` from the front; zeros follow its end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._depth = 0

    @property
    def left(self) -> int:
        return max(0, len(self._data) - self._at)

    def byte(self) -> int:
        at = self._at
        self._at = at + 1
        return self._data[at] if at < len(self._data) else 0

    def take(self, count: int) -> bytes:
        at = self._at
        self._at = at + count
        return self._data[at : at + count]

    def rest(self) -> bytes:
        return self.take(self.left)

    def word(self) -> int:
        """A signed 64-bit number."""
        kind = self.byte()
        if kind < len(NUMBERS):
            number = NUMBERS[kind]
            return number if -(2**63) <= number < 2**63 else 0
        if kind < 128:
            return int.from_bytes(self.take(8), "little", signed=True) if kind & 1 else kind
        return kind - 256

    def integer(self) -> int:
        kind = self.byte()
        return NUMBERS[kind % len(NUMBERS)] if kind & 1 else self.byte() - 128

    def text(self) -> str:
        kind = self.byte()
        if kind < 2 * len(TEXTS):
            return TEXTS[kind // 2]
        return self.take(kind % 24).decode("latin-1")

    def value(self, depth: int = 0) -> Any:
        """A JSON value."""
        kind = self.byte() % (12 if depth < 3 else 7)
        if kind in (0, 1):
            return self.integer()
        if kind in (2, 3):
            return self.text()
        if kind == 4:
            return FLOATS[self.byte() % len(FLOATS)]
        if kind in (5, 6):
            return (None, True, False)[self.byte() % 3]
        if kind == 11:
            self._depth = 780 + self.byte()
            return _DEEP
        members = range(self.byte() % 4)
        if kind in (7, 8):
            return [self.value(depth + 1) for _ in members]
        return {self.text(): self.value(depth + 1) for _ in members}

    def vary(self, value: Any) -> Any:
        """``value`` with at most three places of it changed, dropped, doubled or added."""
        for _ in range(self.byte() & 3):
            value = self._edit(value)
            value = {} if value is _DROPPED else value
        return value

    def _edit(self, value: Any) -> Any:
        if isinstance(value, dict) and value:
            keys = list(value)
            place, copy = self.byte() % (len(keys) + 2), dict(value)
            if place == len(keys):
                return {**copy, self.text(): self.value()}
            if place < len(keys):
                changed = self._edit(copy[keys[place]])
                copy[keys[place]] = changed
                if changed is _DROPPED:
                    del copy[keys[place]]
                return copy
        elif isinstance(value, list | tuple) and value:
            place, copied = self.byte() % (len(value) + 2), list(value)
            if place == len(value):
                return [*copied, self.value()]
            if place < len(value):
                changed = self._edit(copied[place])
                copied[place : place + 1] = [] if changed is _DROPPED else [changed]
                return copied
        return self._replaced(value)

    def _replaced(self, value: Any) -> Any:
        kind = self.byte() % 6
        if kind == 0:
            return _DROPPED
        if kind == 1:
            return [value, value]
        if kind == 2 and type(value) is int:
            return value + self.byte() - 128
        if kind == 2 and isinstance(value, str):
            return value + self.text()
        if kind == 3:
            return self.text() if isinstance(value, str) else self.integer()
        return self.value()

    def json(self, value: Any) -> str:
        """As a peer would write it, also what Python's own writer would not."""
        text = json.dumps(value)
        if self._depth:
            text = text.replace(f'"{_DEEP}"', "[" * self._depth + "]" * self._depth)
        return text

    def bytes_near(self, valid: bytes) -> bytes:
        """``valid`` with up to seven bytes changed, cut or lengthened."""
        data = bytearray(valid)
        for _ in range(self.byte() & 7):
            kind = self.byte()
            at = int.from_bytes(self.take(2), "little") % (len(data) + 1)
            if kind < 160:
                data[at : at + 1] = bytes((self.byte(),))
            elif kind < 190:
                del data[at : at + 1 + self.byte()]
            elif kind < 220:
                data[at:at] = self.take(1 + self.byte() % 16)
            elif kind < 250:
                data[at : at + 2] = bytes((self.byte(), self.byte()))
            else:
                del data[at:]
        return bytes(data)
