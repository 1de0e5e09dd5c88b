"""Reads a checkpoint's statistics from an untrusted pickle.

A pickle is a program. This unpickler replaces the few names of numpy that pickled arrays need by
its own types, refuses to look up any other name, and checks everything that it returns.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from policies.checkpoint.hub_snapshot import refuse_hub_pickle
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
MAX_DEPTH = 32
"""Deepest nesting of the result."""


def _keyed(code: bytes, keys: slice) -> Callable[[Any], None]:
    """The instruction ``code``, refused if it hashes anything but strings and short integers.

    To hash a tuple that holds one tuple twice, and so on, takes exponential time; deep tuples
    overflow C's stack; long integers can all have one hash.

    Args:
        keys: Where they are on the stack, which begins at the last mark.
    """
    run = pickle._Unpickler.dispatch[code[0]]

    def checked(machine: Any) -> None:
        for key in machine.stack[keys]:
            if type(key) not in (str, int):
                raise pickle.UnpicklingError(f"it has a {type(key).__name__} for a key")
            if type(key) is int:
                _check_int(key)
        run(machine)

    return checked


def _no_set(_machine: Any) -> None:
    raise pickle.UnpicklingError("it has a set")


class _Unpickler(pickle._Unpickler):
    """Python's own in its form without C, whose instructions can be replaced."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.SETITEM[0]: _keyed(pickle.SETITEM, slice(-2, -1)),
        pickle.SETITEMS[0]: _keyed(pickle.SETITEMS, slice(None, None, 2)),
        pickle.DICT[0]: _keyed(pickle.DICT, slice(None, None, 2)),
        pickle.EMPTY_SET[0]: _no_set,
        pickle.ADDITEMS[0]: _no_set,
        pickle.FROZENSET[0]: _no_set,
    }

    def find_class(self, module: str, name: str) -> AllowedFunction:
        if (module, name) not in ALLOWED_FUNCTIONS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ALLOWED_FUNCTIONS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it asks for the object {shown(pid)} from outside")


def _check_int(value: int) -> None:
    if not -(2**63) <= value < 2**64:
        raise pickle.UnpicklingError(f"it has a number of {value.bit_length()} bits")


def read_pickle(path: Path) -> Any:
    """Return the content of ``path``: dicts, lists, tuples, strings, numbers, read-only numpy
    arrays.

    Raises:
        CheckpointError: No such file, one of the hub's cache, too large, not a pickle, or one that
            needs anything else.
    """
    refuse_hub_pickle(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, expected at most {MAX_BYTES}")
        content = path.read_bytes()
        if any(count >= MAX_ITEMS for count, _ in enumerate(pickletools.genops(content))):
            raise pickle.UnpicklingError(f"it has more than {MAX_ITEMS} instructions")
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
            return {key: plain(item, depth + 1) for key, item in value.items()}
        if type(value) is int:
            _check_int(value)
            return value
        if type(value) is memoryview:
            if id(value) not in copies:
                copies[id(value)] = bytes(value)
            return copies[id(value)]
        if value is None or type(value) in (bool, float, str, bytes):
            return value
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")

    return plain(value, 0)
