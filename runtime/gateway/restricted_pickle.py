"""Reads a foreign client's message, a pickle, without running anything that it says.

A pickle is a program. This machine knows only the instructions that plain data, numpy's arrays and
records need. A name that may be looked up stands for a function or a record of ours; numpy gets
arrays only after dtype, shape and length were checked.

Guaranteed: at most ``MAX_INSTRUCTIONS`` steps, so as many values and memo entries; ``MAX_VALUES``
values and ``safe_pickle.MAX_DEPTH`` levels in the result; functions see at most twice as many bytes
as the message has. A dict's keys are strings: a tuple that holds one tuple twice, and so on, takes
exponential time to be hashed. Arrays are read-only views of the message, without a copy.

Not used: Python's own unpickler behind a check of the instructions, as for a checkpoint's
statistics. It copies every picture, and the check costs as much as this machine.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import Any

from policies.checkpoint.safe_pickle import plain_value
from policies.checkpoint.safe_pickle_types import (
    ALLOWED_FUNCTIONS,
    AllowedFunction,
    SafeArray,
    SafeDtype,
    SafeRecord,
    shown,
)

MAX_INSTRUCTIONS = 20_000
"""Most instructions of a pickle."""
MAX_VALUES = 20_000
"""Most values of a result. A pickle can repeat one value very often."""
PROTOCOLS = range(2, 6)
"""Protocols that can be read. Of protocol 2 only what has no bytes."""

_MARK = object()
_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")
_MAX_LONG_BYTES = 9
"""Bytes of the longest number of 64 bits, signed or not."""


class RecordClass:
    """Stands for a foreign class. Its instances are ``SafeRecord``.

    Args:
        name: The class's name.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


Names = Mapping[tuple[str, str], AllowedFunction | RecordClass]
"""What a pickle may look up, by module and name. A function must return plain data, and must not
hash or compare its arguments before it checked their types."""


def read_pickle(content: memoryview | bytes, names: Names) -> Any:
    """Return the content: dicts, lists, tuples, strings, bytes, numbers, arrays and records.

    Args:
        content: The message. It must not change while arrays of the result are in use.
        names: What it may look up beside numpy's names.

    Raises:
        UnpicklingError: It is damaged, too much, or asks for anything else; says what.
    """
    try:
        return plain_value(_Machine(content, names).run(), MAX_VALUES)
    except UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle may give any value to any instruction
        raise UnpicklingError(f"it is damaged ({error!r:.100})") from error


class _Machine:
    """Runs one pickle."""

    def __init__(self, content: memoryview | bytes, names: Names) -> None:
        self._content = memoryview(content).cast("B")
        self._at = 0
        self._names = names
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._bytes_left = 2 * len(self._content)  # one content can be given to every function

    def run(self) -> Any:
        """Return what the pickle leaves on the stack."""
        content, end = self._content, len(self._content)
        for _ in range(MAX_INSTRUCTIONS):
            at = self._at
            if at >= end:
                raise UnpicklingError("it ends too early")
            self._at = at + 1
            code = content[at]
            if code == _STOP:
                return self._result()
            step = _STEPS.get(code)
            if step is None:
                raise UnpicklingError(f"it has the instruction {bytes((code,))!r}")
            step(self)
        raise UnpicklingError(f"it has more than {MAX_INSTRUCTIONS} instructions")

    def _result(self) -> Any:
        if len(self._stack) != 1 or self._at != len(self._content):
            raise UnpicklingError("it goes on after its end")
        return self._pop()

    # Reading

    def _take(self, count: int) -> memoryview:
        start, end = self._at, self._at + count
        if end > len(self._content):
            raise UnpicklingError("it ends too early")
        self._at = end
        return self._content[start:end]

    def _number(self, form: struct.Struct) -> Any:
        return form.unpack(self._take(form.size))[0]

    def _skip(self, count: int) -> None:
        self._take(count)

    def _byte(self) -> int:
        at = self._at
        if at >= len(self._content):
            raise UnpicklingError("it ends too early")
        self._at = at + 1
        return self._content[at]

    def _line(self) -> str:
        """The rest of a line, for a name in protocols 2 and 3."""
        line = bytes(self._content[self._at : self._at + 200])
        end = line.find(b"\n")
        if end < 0:
            raise UnpicklingError("it has a name without an end")
        self._at += end + 1
        return line[:end].decode()

    # Stack

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _drop(self) -> None:
        self._pop()

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise UnpicklingError("it uses a mark as a value")
        return value

    def _pop_many(self, count: int) -> list[Any]:
        values = self._stack[len(self._stack) - count :]
        if len(values) != count or _MARK in values:
            raise UnpicklingError("it takes more values than it has")
        del self._stack[-count:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        for at in range(len(stack) - 1, -1, -1):
            if stack[at] is _MARK:
                values = stack[at + 1 :]
                del stack[at:]
                return values
        raise UnpicklingError("it has no mark")

    def _top(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise UnpicklingError(f"it has no {kind.__name__} to add to")
        return self._stack[-1]

    def _append(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise UnpicklingError(f"it has a {type(key).__name__} for a key")
            target[key] = value

    # Instructions that make more than a plain value

    def _protocol(self) -> None:
        if (protocol := self._byte()) not in PROTOCOLS:
            raise UnpicklingError(f"it has protocol {protocol}")

    def _long(self) -> None:
        if (count := self._byte()) > _MAX_LONG_BYTES:
            raise UnpicklingError(f"it has a number of {8 * count} bits")
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _text(self, count: int) -> None:
        self._stack.append(str(self._take(count), "utf-8"))

    def _memoize(self, index: int) -> None:
        value = self._pop()
        self._stack.append(value)
        self._memo[index] = value

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise UnpicklingError(f"it has no memo {index}")
        self._stack.append(self._memo[index])

    def _look_up(self, module: object, name: object) -> None:
        found: AllowedFunction | RecordClass | None = None
        if type(module) is str and type(name) is str:
            found = ALLOWED_FUNCTIONS.get((module, name)) or self._names.get((module, name))
        if found is None:
            asked = f"{module!s:.60}.{name!s:.60}"
            raise UnpicklingError(f"it asks for {asked if asked.isprintable() else ascii(asked)}")
        self._stack.append(found)

    def _global(self) -> None:
        module = self._line()
        self._look_up(module, self._line())

    def _call(self) -> None:
        function, arguments = self._pop_many(2)
        if type(function) is not AllowedFunction or type(arguments) is not tuple:
            raise UnpicklingError(f"it calls a {type(function).__name__}")
        self._spend(arguments)
        self._stack.append(function(*arguments))

    def _make(self) -> None:
        made, arguments = self._pop_many(2)
        if type(made) is not RecordClass or arguments != ():
            raise UnpicklingError(f"it makes a {type(made).__name__}")
        self._stack.append(SafeRecord(made.name))

    def _build(self) -> None:
        target, state = self._pop_many(2)
        if type(target) not in (SafeDtype, SafeArray, SafeRecord):
            raise UnpicklingError(f"it changes a {type(target).__name__}: {shown(state)}")
        if type(state) is tuple:
            self._spend(state)
        target.__setstate__(state)
        self._stack.append(target)

    def _spend(self, arguments: tuple[Any, ...]) -> None:
        for value in arguments:
            if type(value) is memoryview:
                self._bytes_left -= len(value)
        if self._bytes_left < 0:
            raise UnpicklingError("it makes many arrays of the same bytes")


_STOP = ord(".")
_Step = Callable[[_Machine], None]
_STEPS: dict[int, _Step] = {
    0x80: _Machine._protocol,
    0x95: lambda m: m._skip(8),  # FRAME: its length is a hint
    ord("("): lambda m: m._push(_MARK),
    ord("0"): lambda m: m._drop(),
    # Plain values
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("J"): lambda m: m._push(m._number(_I32)),
    ord("K"): lambda m: m._push(m._byte()),
    ord("M"): lambda m: m._push(m._number(_U16)),
    0x8A: _Machine._long,
    ord("G"): lambda m: m._push(m._number(_F64)),
    0x8C: lambda m: m._text(m._byte()),
    ord("X"): lambda m: m._text(m._number(_U32)),
    0x8D: lambda m: m._text(m._number(_U64)),
    ord("C"): lambda m: m._push(m._take(m._byte())),
    ord("B"): lambda m: m._push(m._take(m._number(_U32))),
    0x8E: lambda m: m._push(m._take(m._number(_U64))),
    0x96: lambda m: m._push(m._take(m._number(_U64))),  # BYTEARRAY8
    # Containers
    ord(")"): lambda m: m._push(()),
    0x85: lambda m: m._push(tuple(m._pop_many(1))),
    0x86: lambda m: m._push(tuple(m._pop_many(2))),
    0x87: lambda m: m._push(tuple(m._pop_many(3))),
    ord("t"): lambda m: m._push(tuple(m._pop_to_mark())),
    ord("]"): lambda m: m._push([]),
    ord("a"): lambda m: m._append(m._pop_many(1)),
    ord("e"): lambda m: m._append(m._pop_to_mark()),
    ord("}"): lambda m: m._push({}),
    ord("s"): lambda m: m._set_items(m._pop_many(2)),
    ord("u"): lambda m: m._set_items(m._pop_to_mark()),
    # Memo
    ord("q"): lambda m: m._memoize(m._byte()),
    ord("r"): lambda m: m._memoize(m._number(_U32)),
    0x94: lambda m: m._memoize(len(m._memo)),
    ord("h"): lambda m: m._recall(m._byte()),
    ord("j"): lambda m: m._recall(m._number(_U32)),
    # What makes and calls, ours alone
    ord("c"): _Machine._global,
    0x93: lambda m: m._look_up(*m._pop_many(2)),
    ord("R"): _Machine._call,
    0x81: _Machine._make,
    ord("b"): _Machine._build,
}
"""By instruction. The others are refused: above all INST, OBJ, NEWOBJ_EX, EXT1 to 4, (BIN)PERSID,
BUFFER, LONG4, DUP and the text forms of protocol 0."""
