"""Atomic 64-bit words at raw addresses, for memory that two processes share.

Guaranteed: what was written before ``store`` (release) is seen by whoever read the new value with
``load`` (acquire), on every machine that numba compiles for. A plain numpy store does the same on
x86 most of the time and on ARM not at all; a fence around plain accesses would leave the access
itself divisible. No inline assembly: LLVM's own atomic load and store say exactly this.

``load``, ``store``, ``fence`` and ``pause`` are intrinsics, for compiled functions to call; what
``compiled`` returns is for Python. Addresses and values are int64: the type that numba gives a
Python int, so a call needs no conversion.

Nothing here gives up the GIL. A loop of bounded length that kept it costs other threads at most
that bound; one that gave it up would wait up to 5 ms to get it back, at every single message.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_WORD = ir.IntType(64)
PAUSE = {"x86_64": ("llvm.x86.sse2.pause", None), "aarch64": ("llvm.aarch64.isb", 15)}
"""What tells a core that it is spinning, and its operand, by machine; elsewhere none is given.
``isb`` stalls for tens of nanoseconds as x86's ``pause`` does; ARM's ``yield`` does nothing on
most cores."""


def _load(_context: Any, _address: Any) -> Any:
    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


def _store(_context: Any, _address: Any, _value: Any) -> Any:
    def generate(target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return target.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _fence(_context: Any) -> Any:
    def generate(target: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return target.get_dummy_value()

    return types.void(), generate


def _pause(_context: Any) -> Any:
    def generate(target: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        name, operand = PAUSE.get(platform.machine(), (None, None))
        if name is not None:
            operands = [] if operand is None else [ir.Constant(ir.IntType(32), operand)]
            kind = ir.FunctionType(ir.VoidType(), [one.type for one in operands])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)
        return target.get_dummy_value()

    return types.void(), generate


load = intrinsic(_load)
"""``load(address)``: the word at ``address`` (8-byte aligned), acquire."""
store = intrinsic(_store)
"""``store(address, value)``, release."""
fence = intrinsic(_fence)
"""A full (sequentially consistent) fence: no store before it is still on its way after it."""
pause = intrinsic(_pause)


def compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile at import for this one signature, and cache it where a folder can be written.

    So no message ever waits for a compiler, and a second start does not either.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            made: Callable[..., Any] = njit(signature, cache=True)(function)
        except (RuntimeError, OSError):
            # No folder can be written (a read-only install without a home): at every start.
            made = njit(signature)(function)
        return made

    return decorate


@compiled("i8(i8)")
def load_acquire(address: int) -> int:
    """The word at ``address`` (8-byte aligned)."""
    return load(address)  # type: ignore[no-any-return]


@compiled("void(i8, i8)")
def store_release(address: int, value: int) -> None:
    """Everything written before is visible to whoever sees ``value``."""
    store(address, value)


@compiled("i8(i8, i8, i8)")
def spin(address: int, seen: int, rounds: int) -> int:
    """Load until the word differs from ``seen``, at most ``rounds`` times more; the last value."""
    value = load(address)
    while value == seen and rounds > 0:
        pause()
        rounds -= 1
        value = load(address)
    return value  # type: ignore[no-any-return]
