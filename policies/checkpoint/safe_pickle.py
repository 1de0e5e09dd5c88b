"""Reads a checkpoint's statistics from an untrusted pickle.

A pickle is a program. This unpickler replaces the few names of numpy that pickled arrays need by
its own types, refuses to look up any other name, and checks everything that it returns.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from policies.checkpoint.safe_pickle_types import (
    ALLOWED_FUNCTIONS,
    AllowedFunction,
    SafeArray,
    SafeRecord,
    shown,
)
from policies.errors import CheckpointError

MAX_BYTES = 64 * 2**20
"""Largest file."""
MAX_ITEMS = 1_000_000
"""Most instructions in the file, and most values in its result. A small file can repeat one value
very often.
"""
MAX_TUPLES = 10_000
"""Most tuples in the file. Python hashes nested tuples by unlimited recursion in C, so deep ones
overflow the stack.
"""
MAX_DEPTH = 32
"""Deepest nesting of the result."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> AllowedFunction:
        if (module, name) not in ALLOWED_FUNCTIONS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ALLOWED_FUNCTIONS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it asks for the object {shown(pid)} from outside")


def read_pickle(path: Path) -> Any:
    """Return the content of ``path``: dicts, lists, tuples, strings, numbers, read-only numpy
    arrays.

    Raises:
        CheckpointError: No such file, too large, not a pickle, or one that needs anything else.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, expected at most {MAX_BYTES}")
        content = path.read_bytes()
        _check_instructions(content)
        return plain_value(_Unpickler(io.BytesIO(content)).load())
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, {error}; expected numpy arrays and plain containers"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle may raise anything
        raise CheckpointError(f"{path}: not a readable pickle ({error!r:.200})") from error


def _check_instructions(content: bytes) -> None:
    """Refuse files that would crash the unpickler; read the instructions without executing them."""
    tuples = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        tuples += opcode.name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
        if count >= MAX_ITEMS or tuples > MAX_TUPLES:
            raise pickle.UnpicklingError(
                f"it has more than {MAX_ITEMS} instructions or {MAX_TUPLES} tuples"
            )
        # The memo is a list; its length is the largest index in the file.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise pickle.UnpicklingError(f"it has the memo index {argument}")


def plain_value(value: Any, max_items: int = MAX_ITEMS) -> Any:
    """Return ``value`` with its arrays in place of their safe replacements.

    Args:
        max_items: Most values in it, counted as often as they occur.

    Raises:
        pickle.UnpicklingError: It holds anything but dicts, lists, tuples, strings, bytes, numbers,
            arrays and records, or too much.
    """
    budget = iter(range(max_items))
    copies: dict[int, bytes] = {}  # one of each view, however often it occurs

    def plain(value: Any, depth: int) -> Any:
        if next(budget, None) is None or depth > MAX_DEPTH:
            raise pickle.UnpicklingError(f"it holds over {max_items} values, or {MAX_DEPTH} levels")
        if isinstance(value, SafeArray):
            return value.array()
        if isinstance(value, SafeRecord):
            record = SafeRecord(value.name)
            record.fields = plain(value.fields, depth + 1)
            return record
        if type(value) in (list, tuple):
            return type(value)(plain(item, depth + 1) for item in value)
        if type(value) is dict:
            for key in value:
                if type(key) not in (str, int):
                    raise pickle.UnpicklingError(f"it has a {type(key).__name__} for a key")
            return {key: plain(item, depth + 1) for key, item in value.items()}
        if type(value) is int and not -(2**63) <= value < 2**64:
            raise pickle.UnpicklingError(f"it has a number of {value.bit_length()} bits")
        if type(value) is memoryview:
            if id(value) not in copies:
                copies[id(value)] = bytes(value)
            return copies[id(value)]
        if value is None or type(value) in (bool, int, float, str, bytes):
            return value
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")

    return plain(value, 0)
