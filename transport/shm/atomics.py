"""Atomic 64-bit words at raw addresses, for memory that two processes share.

Guaranteed: what was written before ``store`` (release) is seen by whoever read the new value with
``load`` (acquire), on every machine that numba compiles for. A plain numpy store does the same on
x86 most of the time and on ARM not at all; a fence around plain accesses would leave the access
itself divisible. No inline assembly: LLVM's own atomic load and store say exactly this.

``load``, ``store``, ``fence`` and the other intrinsics are for compiled functions to call;
``load_acquire``, ``store_release``, ``full_fence`` and ``spin`` are for Python. Addresses and
values are int64: the type that numba gives a Python int, so a call needs no conversion.

Nothing here gives up the GIL. A loop of bounded length that kept it costs other threads at most
that bound; one that gave it up would wait up to 5 ms to get it back, at every single message.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic

from transport.jit import compiled

if TYPE_CHECKING:
    from transport.shm.segment import Mapping

_WORD = ir.IntType(64)
CACHE_LINES = 128
"""Bytes between words that different processes write: processors fetch cache lines in pairs."""
PAUSE = {"x86_64": ("llvm.x86.sse2.pause", None), "aarch64": ("llvm.aarch64.isb", 15)}
"""What tells a core that it is spinning, and its operand, by machine; elsewhere none is given.
``isb`` stalls for tens of nanoseconds as x86's ``pause`` does; ARM's ``yield`` does nothing on
most cores."""


def _load(ordering: str) -> Any:
    def typed(_context: Any, _address: Any) -> Any:
        def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
            return builder.load_atomic(pointer, ordering, 8)

        return types.int64(types.int64), generate

    return typed


def _store(ordering: str) -> Any:
    def typed(_context: Any, _address: Any, _value: Any) -> Any:
        def generate(target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
            builder.store_atomic(arguments[1], pointer, ordering, 8)
            return target.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return typed


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


load = intrinsic(_load("acquire"))
"""``load(address)``: the word at ``address`` (8-byte aligned), acquire."""
store = intrinsic(_store("release"))
"""``store(address, value)``, release."""
load_relaxed = intrinsic(_load("monotonic"))
"""As ``load``, but it orders nothing: one access, which the compiler neither splits nor repeats.
For words that a peer may change between a check and a use."""
store_relaxed = intrinsic(_store("monotonic"))
"""As ``store``, but it orders nothing."""
fence = intrinsic(_fence)
"""A full (sequentially consistent) fence: no store before it is still on its way after it."""
pause = intrinsic(_pause)


def record_at(dtype: np.dtype[Any]) -> Any:
    """An intrinsic that takes an address and gives the record of ``dtype`` (aligned) that is there.

    Its fields are read and written by name with plain loads and stores: for memory that no other
    process accesses at the same time.
    """
    record = from_dtype(dtype)

    def typed(_context: Any, _address: Any) -> Any:
        def generate(target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], target.get_value_type(record))

        return record(types.int64), generate

    return intrinsic(typed)


@compiled("i8(i8)")
def load_acquire(address: int) -> int:
    """The word at ``address`` (8-byte aligned)."""
    return load(address)  # type: ignore[no-any-return]


@compiled("void(i8, i8)")
def store_release(address: int, value: int) -> None:
    """Everything written before is visible to whoever sees ``value``."""
    store(address, value)


@compiled("void()")
def full_fence() -> None:
    """No access before it is moved behind it, and none after it before it."""
    fence()


@compiled("i8(i8, i8, i8)")
def spin(address: int, seen: int, rounds: int) -> int:
    """Load until the word differs from ``seen``, at most ``rounds`` times more; the last value."""
    value = load(address)
    while value == seen and rounds > 0:
        pause()
        rounds -= 1
        value = load(address)
    return value  # type: ignore[no-any-return]


class AtomicInt64:
    """One int64 in shared memory that one process writes and others read.

    Args:
        memory: Where it is.
        offset: A multiple of 8; of ``CACHE_LINES`` where another process writes what is beside it.
    """

    def __init__(self, memory: Mapping, offset: int) -> None:
        self._bytes = memory.bytes[offset : offset + 8]  # keeps it mapped
        self._address = memory.address + offset

    def load(self) -> int:
        """The value, and with it everything its writer wrote before."""
        return int(load_acquire(self._address))

    def store(self, value: int) -> None:
        store_release(self._address, value)
