"""Replacements for numpy's types in a pickle: they can describe arrays of plain numbers only.

numpy's own ``dtype.__setstate__`` and ``ndarray.__setstate__`` trust what a pickle says about its
memory: a field of objects that is flagged as plain bytes turns the file's bytes into pointers. So
numpy gets only values that were checked here: a number format by name, and bytes of the right size.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

MAX_DIMENSIONS = 32
MAX_BOOLS = 65_536
"""Most elements of an array of bools. Each byte is looked at, for as often as the pickle repeats
it.
"""

_NUMBER = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")
_ORDERS = ("<", ">", "=", "|")
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


def shown(value: object) -> str:
    """Return ``value`` for an error: a pickle of few bytes can hold a value of endless ``repr``."""
    return _SHORT.repr(value)[:60]


class AllowedFunction:
    """A function that a pickle may look up and call, but not modify.

    Args:
        function: Called with the pickle's arguments.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise UnpicklingError("it changes a function")


class SafeDtype:
    """A dtype of plain numbers. Of its later state, only the byte order is used.

    Args:
        code: numpy's code, e.g. ``"f8"``.

    Raises:
        UnpicklingError: Not the code of a plain number.
    """

    __slots__ = ("_code", "_order")

    def __init__(self, code: object) -> None:
        if not isinstance(code, str) or not _NUMBER.fullmatch(code):
            raise UnpicklingError(f"it has the dtype {shown(code)}")
        self._code = code.lstrip("".join(_ORDERS))
        self._order = code[0] if code[0] in _ORDERS else "="

    def __setstate__(self, state: object) -> None:
        plain = isinstance(state, tuple) and len(state) >= 5 and state[2:5] == (None, None, None)
        if not isinstance(state, tuple) or not plain or state[1] not in _ORDERS:
            raise UnpicklingError(f"it has a {self._code} with the state {shown(state)}")
        self._order = state[1]

    def dtype(self) -> np.dtype[Any]:
        """Return the numpy dtype."""
        return np.dtype(self._order + self._code)


class SafeRecord:
    """An instance of a foreign class: its attributes, and nothing of the class.

    Args:
        name: The class's name.
    """

    __slots__ = ("fields", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        if type(state) is not dict:
            raise UnpicklingError(f"it has a {self.name} with the state {shown(state)}")
        self.fields = state


class SafeArray:
    """An array whose content follows in ``__setstate__``, as in numpy's pickles."""

    __slots__ = ("_array",)

    def __init__(self) -> None:
        self._array: NDArray[Any] | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnpicklingError("it has an array without shape, dtype and content")
        _, shape, number, fortran, content = state
        self._array = _build(shape, number, content, "F" if fortran else "C")

    def array(self) -> NDArray[Any]:
        """Return the array, a read-only view of the pickle's bytes.

        Raises:
            UnpicklingError: The pickle gave no content.
        """
        if self._array is None:
            raise UnpicklingError("it has an array without content")
        return self._array


def _dtype(code: object, *_align_and_copy: object) -> SafeDtype:
    return SafeDtype(code)


def _ndarray(*_arguments: object) -> SafeArray:
    raise UnpicklingError("it makes an array without content")


def _reconstruct(kind: object, *_shape_and_code: object) -> SafeArray:
    if kind is not ALLOWED_FUNCTIONS["numpy", "ndarray"]:
        raise UnpicklingError("it asks for a subclass of numpy's arrays")
    return SafeArray()


def _scalar(number: object, content: object) -> bool | int | float:
    value: bool | int | float = _build((), number, content, "C").item()
    return value


def _frombuffer(
    content: object, number: object, shape: object, order: object, axes: object = None
) -> SafeArray:
    if order not in ("C", "F", "K"):
        raise UnpicklingError(f"it has an array in the order {shown(order)}")
    found = SafeArray()
    flat = _build(shape, number, content, "F" if order == "F" else "C")
    if order == "K":
        # Numbers only: to compare nested tuples can take forever.
        numbers = isinstance(axes, tuple) and all(type(axis) is int for axis in axes)
        if not isinstance(axes, tuple) or not numbers or sorted(axes) != list(range(flat.ndim)):
            raise UnpicklingError("it has an array whose axes are no permutation")
        flat = flat.transpose(axes)
    found._array = flat
    return found


def _build(
    shape: object, number: object, content: object, order: Literal["C", "F"]
) -> NDArray[Any]:
    """Return the array, read-only and without a copy, because very many arrays can share one
    content.
    """
    if not isinstance(number, SafeDtype) or not isinstance(content, bytes | bytearray | memoryview):
        raise UnpicklingError("it has an array of something other than numbers")
    if (
        not isinstance(shape, tuple)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(n) is int and 0 <= n < 2**63 for n in shape)
    ):
        raise UnpicklingError(f"it has an array of shape {shown(shape)}")
    dtype = number.dtype()
    if math.prod(shape) * dtype.itemsize != len(content):
        raise UnpicklingError(
            f"it has an array of shape {shape} and dtype {dtype} in {len(content)} bytes"
        )
    if dtype.kind == "b":
        if len(content) > MAX_BOOLS:
            raise UnpicklingError(f"it has {len(content)} bools, expected at most {MAX_BOOLS}")
        if bytes(content).strip(b"\0\1"):
            raise UnpicklingError("it has a bool that is neither 0 nor 1")
    array: NDArray[Any] = np.ndarray(shape, dtype, content, order=order)
    array.flags.writeable = False
    return array


ALLOWED_FUNCTIONS: dict[tuple[str, str], AllowedFunction] = {
    ("numpy", "dtype"): AllowedFunction(_dtype),
    ("numpy", "ndarray"): AllowedFunction(_ndarray),
    # numpy 2 renamed the modules. Pickles of numpy 1 and 2 can be read with either version.
    **{
        (f"numpy.{core}.{module}", name): AllowedFunction(function)
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}
"""All that a pickle may look up, by module and name."""
