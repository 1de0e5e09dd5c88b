"""Atomic 64-bit words at raw addresses, for memory that two processes share.

Guaranteed: what was written before ``store_release`` is seen by whoever read the new value with
``load_acquire``, on every machine that numba compiles for. A plain numpy store does the same on
x86 most of the time and on ARM not at all; a fence around plain accesses would leave the access
itself divisible. No inline assembly: LLVM's own atomic load and store say exactly this.

Everything is compiled at import, with explicit signatures, and cached where a folder can be
written, so that no message ever waits for a compiler. Addresses and values are int64: the type
that numba gives a Python int, so a call needs no conversion.
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
_PAUSE = {"x86_64": ("llvm.x86.sse2.pause", None), "aarch64": ("llvm.aarch64.hint", 1)}
"""The instruction that tells a core it is spinning, by machine; elsewhere none is given."""


def _load_intrinsic(_context: Any, _address: Any) -> Any:
    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


def _store_intrinsic(_context: Any, _address: Any, _value: Any) -> Any:
    def generate(target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return target.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _fence_intrinsic(_context: Any) -> Any:
    def generate(target: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return target.get_dummy_value()

    return types.void(), generate


def _pause_intrinsic(_context: Any) -> Any:
    def generate(target: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        name, hint = _PAUSE.get(platform.machine(), (None, None))
        if name is not None:
            operands = [] if hint is None else [ir.Constant(ir.IntType(32), hint)]
            kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)
        return target.get_dummy_value()

    return types.void(), generate


_load = intrinsic(_load_intrinsic)
_store = intrinsic(_store_intrinsic)
_fence = intrinsic(_fence_intrinsic)
_pause = intrinsic(_pause_intrinsic)


def _load_acquire(address: int) -> int:
    return _load(address)  # type: ignore[no-any-return]


def _store_release(address: int, value: int) -> None:
    _store(address, value)


def _fence_seq_cst() -> None:
    _fence()


def _spin(address: int, seen: int, rounds: int) -> int:
    value = _load(address)
    while value == seen and rounds > 0:
        _pause()
        rounds -= 1
        value = _load(address)
    return value  # type: ignore[no-any-return]


def _compile(signature: str, function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        compiled: Callable[..., Any] = njit(signature, cache=True, nogil=True)(function)
    except (RuntimeError, OSError):
        # No folder can be written (a read-only install without a home): compile at every start.
        compiled = njit(signature, nogil=True)(function)
    return compiled


load_acquire: Callable[[int], int] = _compile("i8(i8)", _load_acquire)
"""``load_acquire(address)``: the word at ``address`` (8-byte aligned)."""
store_release: Callable[[int, int], None] = _compile("void(i8, i8)", _store_release)
"""``store_release(address, value)``."""
fence: Callable[[], None] = _compile("void()", _fence_seq_cst)
"""A full (sequentially consistent) fence."""
spin: Callable[[int, int, int], int] = _compile("i8(i8, i8, i8)", _spin)
"""``spin(address, seen, rounds)``: load until the word differs from ``seen``, at most ``rounds``
times more; the last value. Other Python threads run meanwhile."""
