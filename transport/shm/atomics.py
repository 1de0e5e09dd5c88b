"""Atomic 64-bit words at raw addresses, for memory that two processes share.

Guaranteed on every machine that numba compiles for: a reader that gets a new value from ``load``
(acquire) sees everything that was written before its ``store`` (release). A plain numpy store does
the same on x86 most of the time and on ARM not at all. Rejected: fences around plain accesses,
which leave the access itself divisible; inline assembly, because LLVM has atomic loads and stores.

``load``, ``store``, ``fence`` and the other intrinsics are for compiled functions to call;
``load_acquire``, ``store_release``, ``full_fence`` and ``spin`` are for Python. Addresses and
values are int64, numba's type for a Python int, so a call needs no conversion.

No function releases the GIL. A bounded loop that keeps the GIL delays other threads by at most that
bound. A loop that released it would wait up to 5 ms to get it back, for every message.
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
    from transport.shm.segment import MappedSegment

_WORD = ir.IntType(64)
CACHE_LINES = 128
"""Bytes between words that different processes write: processors fetch cache lines in pairs."""
PAUSE = {"x86_64": ("llvm.x86.sse2.pause", None), "aarch64": ("llvm.aarch64.isb", 15)}
"""The instruction that hints a spin to the core, and its operand, by machine; others have none.
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
"""As ``load``, without ordering: one access, which the compiler neither splits nor repeats.
For words that a peer may change between a check and a use."""
store_relaxed = intrinsic(_store("monotonic"))
"""As ``store``, without ordering."""
fence = intrinsic(_fence)
"""A full (sequentially consistent) fence: stores before it are visible before loads after it."""
pause = intrinsic(_pause)


def record_at(dtype: np.dtype[Any]) -> Any:
    """Make an intrinsic that takes an address and returns the record of ``dtype`` (aligned) there.

    Its fields are read and written by name with plain loads and stores. Use it only for memory that
    no other process accesses at the same time.
    """
    record = from_dtype(dtype)

    def typed(_context: Any, _address: Any) -> Any:
        def generate(target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], target.get_value_type(record))

        return record(types.int64), generate

    return intrinsic(typed)


@compiled("i8(i8)")
def load_acquire(address: int) -> int:
    """Load the word at ``address`` (8-byte aligned), acquire."""
    return load(address)  # type: ignore[no-any-return]


@compiled("void(i8, i8)")
def store_release(address: int, value: int) -> None:
    """Store ``value``, release: a reader of it sees everything that was written before."""
    store(address, value)


@compiled("void()")
def full_fence() -> None:
    """A full fence: no access is moved across it in either direction."""
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
        memory: The segment that holds it.
        offset: Where it is, in bytes: a multiple of 8, or of ``CACHE_LINES`` if another process
            writes the memory beside it.
    """

    def __init__(self, memory: MappedSegment, offset: int) -> None:
        self._bytes = memory.bytes[offset : offset + 8]  # keeps it mapped
        self._address = memory.address + offset

    def load(self) -> int:
        """Load the value, acquire: everything its writer wrote before it is visible."""
        return int(load_acquire(self._address))

    def store(self, value: int) -> None:
        """Store ``value``, release. Only for the one process that writes."""
        store_release(self._address, value)
