"""Reads plain data from a foreign client's pickle without executing it.

A pickle is a program. Python's own unpickler hashes, compares and calls what it is told to, so a
few bytes can make it run anything or run forever. This reader has only the instructions that
describe data, and a table of names that a pickle may use.

Guaranteed: a dict's keys are strings; nothing but the functions of the table is called; the work
and the memory are proportional to the pickle's length. The result can refer to one list many times
or to itself, so its reader must not follow it without a limit.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import Any

from policies.checkpoint.safe_pickle_types import SafeArray, SafeDtype

MAX_INSTRUCTIONS = 20_000
"""Most instructions; a robot's observation has some hundred."""
MAX_INT_BYTES = 8

Names = Mapping[tuple[str, str], Callable[..., Any]]
"""What a pickle may look up, by module and name."""


class Record:
    """An instance of a foreign class: what it was called with, and its attributes."""

    __slots__ = ("arguments", "attributes", "kind")

    def __init__(self, kind: str, *arguments: object) -> None:
        self.kind, self.arguments = kind, arguments
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        if type(state) is not dict:
            raise UnpicklingError(f"it gives a {self.kind} no attributes")
        self.attributes = state


def read_data(content: bytes, names: Names) -> Any:
    """Return the content of a pickle of protocol 2 to 5.

    Args:
        names: Functions that return plain data, or objects of ``Record``, ``SafeDtype`` or
            ``SafeArray``.

    Returns:
        None, a bool, number, string, bytes, list, tuple, dict or what a function returned.

    Raises:
        UnpicklingError: Not a pickle, or one that needs anything else.
    """
    return _Reader(content, names).read()


class _Reader:
    """A stack machine."""

    def __init__(self, content: bytes, names: Names) -> None:
        self._content, self._at = content, 0
        self._names = names
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        # Functions may look at all of their bytes, and one picture can be given to all of them.
        self._bytes_left = 2 * len(content)

    def read(self) -> Any:
        for _ in range(MAX_INSTRUCTIONS):
            code = self._take(1)
            if code == pickle.STOP:
                return self._pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise UnpicklingError(f"it has the instruction {_instruction_name(code)}")
            instruction(self)
        raise UnpicklingError(f"it has more than {MAX_INSTRUCTIONS} instructions")

    # Its parts

    def _take(self, count: int) -> bytes:
        at, end = self._at, self._at + count
        if end > len(self._content):
            raise UnpicklingError(f"it ends after {len(self._content)} bytes, within a value")
        self._at = end
        return self._content[at:end]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _line(self) -> str:
        end = self._content.find(b"\n", self._at)
        if end < 0:
            raise UnpicklingError("it ends within a name")
        line = self._take(end - self._at)
        self._at = end + 1
        return _decoded(line)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise UnpicklingError("it takes a value that is not there")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        """The value that stays on the stack and is added to."""
        value = self._pop()
        if type(value) is not kind:
            raise UnpicklingError(f"it adds to a {type(value).__name__}, not a {kind.__name__}")
        self._stack.append(value)
        return value

    def _marked(self) -> list[Any]:
        if not self._marks:
            raise UnpicklingError("it takes values that are not there")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    # Instructions

    def proto(self) -> None:
        protocol = self._number(1)
        if protocol > pickle.HIGHEST_PROTOCOL:
            raise UnpicklingError(f"it has the protocol {protocol}")

    def frame(self) -> None:
        self._take(8)  # its length; frames say nothing about the data

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def text(self, size: int) -> None:
        self._stack.append(_decoded(self._take(self._number(size))))

    def data(self, size: int) -> None:
        self._stack.append(self._take(self._number(size)))

    def unsigned(self, size: int) -> None:
        self._stack.append(self._number(size))

    def signed(self, size: int) -> None:
        self._stack.append(int.from_bytes(self._take(size), "little", signed=True))

    def long(self) -> None:
        size = self._number(1)
        if size > MAX_INT_BYTES:
            raise UnpicklingError(f"it has a number of {size} bytes")
        self.signed(size)

    def real(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def constant(self, value: object) -> None:
        self._stack.append(value)

    def empty(self, kind: type) -> None:
        self._stack.append(kind())

    def tuple_of(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def tuple_marked(self) -> None:
        self._stack.append(tuple(self._marked()))

    def append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def appends(self) -> None:
        values = self._marked()
        self._top(list).extend(values)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def set_items(self) -> None:
        self._set(self._marked())

    def _set(self, values: list[Any]) -> None:
        target = self._top(dict)
        keys = values[::2]
        if len(values) % 2:
            raise UnpicklingError("it has a key without a value")
        for key in keys:
            if type(key) is not str:  # nested tuples take exponential time to be hashed
                raise UnpicklingError(f"it has a {type(key).__name__} for a key")
        target.update(zip(keys, values[1::2], strict=True))

    def memoize(self) -> None:
        self._put(len(self._memo))

    def put(self, size: int) -> None:
        self._put(self._number(size))

    def _put(self, index: int) -> None:
        value = self._pop()
        self._stack.append(value)
        self._memo[index] = value

    def get(self, size: int) -> None:
        index = self._number(size)
        if index not in self._memo:
            raise UnpicklingError(f"it reads the memo {index}, which is empty")
        self._stack.append(self._memo[index])

    def name(self) -> None:
        module = self._line()
        self._look_up(module, self._line())

    def name_from_stack(self) -> None:
        name, module = self._pop(), self._pop()
        self._look_up(module, name)

    def _look_up(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise UnpicklingError("it has a name that is no string")
        if (module, name) not in self._names:
            raise UnpicklingError(f"it asks for {module:.80}.{name:.80}")
        self._stack.append(self._names[module, name])

    def call(self) -> None:
        """REDUCE, and NEWOBJ, which is the same for the table's functions."""
        arguments, function = self._pop(), self._pop()
        if type(arguments) is not tuple or not any(function is f for f in self._names.values()):
            raise UnpicklingError(f"it calls a {type(function).__name__}")
        self._spend(arguments)
        self._stack.append(_guarded(function, *arguments))

    def build(self) -> None:
        state, target = self._pop(), self._pop()
        if not isinstance(target, Record | SafeDtype | SafeArray):
            raise UnpicklingError(f"it changes a {type(target).__name__}")
        if type(state) is tuple:
            self._spend(state)
        _guarded(target.__setstate__, state)
        self._stack.append(target)

    def _spend(self, values: tuple[Any, ...]) -> None:
        self._bytes_left -= sum(len(value) for value in values if type(value) is bytes)
        if self._bytes_left < 0:
            raise UnpicklingError("it makes many arrays of the same bytes")


def _guarded(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except UnpicklingError:
        raise
    except Exception as error:  # whatever numpy says to arguments that no pickle of it has
        raise UnpicklingError(f"it has a broken value ({type(error).__name__})") from error


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UnpicklingError("it has a text that is not UTF-8") from error


def _instruction_name(code: bytes) -> str:
    return _NAME_OF.get(code.decode("latin-1"), f"0x{code.hex()}")


_NAME_OF = {opcode.code: opcode.name for opcode in pickletools.opcodes}
_INSTRUCTIONS: Mapping[bytes, Callable[[_Reader], None]] = {
    pickle.PROTO: _Reader.proto,
    pickle.FRAME: _Reader.frame,
    pickle.MARK: _Reader.mark,
    pickle.NONE: lambda reader: reader.constant(None),
    pickle.NEWTRUE: lambda reader: reader.constant(True),
    pickle.NEWFALSE: lambda reader: reader.constant(False),
    pickle.BININT: lambda reader: reader.signed(4),
    pickle.BININT1: lambda reader: reader.unsigned(1),
    pickle.BININT2: lambda reader: reader.unsigned(2),
    pickle.LONG1: _Reader.long,
    pickle.BINFLOAT: _Reader.real,
    pickle.SHORT_BINUNICODE: lambda reader: reader.text(1),
    pickle.BINUNICODE: lambda reader: reader.text(4),
    pickle.BINUNICODE8: lambda reader: reader.text(8),
    pickle.SHORT_BINBYTES: lambda reader: reader.data(1),
    pickle.BINBYTES: lambda reader: reader.data(4),
    pickle.BINBYTES8: lambda reader: reader.data(8),
    pickle.BYTEARRAY8: lambda reader: reader.data(8),
    pickle.EMPTY_TUPLE: lambda reader: reader.empty(tuple),
    pickle.EMPTY_LIST: lambda reader: reader.empty(list),
    pickle.EMPTY_DICT: lambda reader: reader.empty(dict),
    pickle.TUPLE: _Reader.tuple_marked,
    pickle.TUPLE1: lambda reader: reader.tuple_of(1),
    pickle.TUPLE2: lambda reader: reader.tuple_of(2),
    pickle.TUPLE3: lambda reader: reader.tuple_of(3),
    pickle.APPEND: _Reader.append,
    pickle.APPENDS: _Reader.appends,
    pickle.SETITEM: _Reader.set_item,
    pickle.SETITEMS: _Reader.set_items,
    pickle.MEMOIZE: _Reader.memoize,
    pickle.BINPUT: lambda reader: reader.put(1),
    pickle.LONG_BINPUT: lambda reader: reader.put(4),
    pickle.BINGET: lambda reader: reader.get(1),
    pickle.LONG_BINGET: lambda reader: reader.get(4),
    pickle.GLOBAL: _Reader.name,
    pickle.STACK_GLOBAL: _Reader.name_from_stack,
    pickle.REDUCE: _Reader.call,
    pickle.NEWOBJ: _Reader.call,
    pickle.BUILD: _Reader.build,
}
