"""Atomic words: what is stored is what is read, and ARM gets the instructions that make it so."""

from __future__ import annotations

import ast
import os
import re
import threading
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from numba import njit

from transport.shm import atomics, ring_kernels
from transport.shm.atomics import AtomicInt64
from transport.shm.segment import MappedSegment, create_anonymous

ARM = "aarch64-unknown-linux-gnu"


def test_loads_return_stored_words() -> None:
    words = np.zeros(3, np.int64)
    address = words.ctypes.data + 8
    for value in (0, 1, 2**63 - 1, -1):
        atomics.store_release(address, value)
        assert atomics.load_acquire(address) == words[1] == value
        assert atomics.spin(address, value - 1 if value > -(2**62) else 0, 10) == value
    assert atomics.spin(address, -1, 1000) == -1
    assert words[0] == words[2] == 0


def test_an_atomic_integer_keeps_its_value_and_keeps_its_memory_mapped() -> None:
    fd = create_anonymous("test", 4096)
    memory, seen = MappedSegment(fd, 4096, writable=True), MappedSegment(fd, 4096, writable=False)
    os.close(fd)
    AtomicInt64(memory, 128).store(-7)
    value = AtomicInt64(seen, 128)
    memory.close()
    seen.close()
    assert value.load() == -7


def test_a_spinning_reader_sees_another_threads_store() -> None:
    """A spin is bounded, so the storing thread gets to run between two of them."""
    words = np.zeros(1, np.int64)
    address = words.ctypes.data
    started = threading.Event()

    def store() -> None:
        started.wait()
        atomics.store_release(address, 5)

    thread = threading.Thread(target=store)
    thread.start()
    started.set()
    while atomics.spin(address, 0, 1000) == 0:
        pass
    thread.join()
    assert words[0] == 5


def arm_instructions(function: Any) -> list[str]:
    """What ``function`` is on ARM: this machine's intermediate code, with the one intrinsic that
    belongs to a processor replaced by ARM's, compiled for it."""
    (signature,) = function.signatures
    fresh = njit(signature)(function.py_func)  # a function from the cache shows no code
    code = fresh.inspect_llvm(fresh.signatures[0])
    code = re.sub(r"target (triple|datalayout) = .*", "", code)
    (x86, _), (arm, operand) = atomics.PAUSE["x86_64"], atomics.PAUSE["aarch64"]
    code = code.replace(f"declare void @{x86}()", f"declare void @{arm}(i32)")
    code = code.replace(f"@{x86}()", f"@{arm}(i32 {operand})")
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(ARM).create_target_machine(opt=3)
    module = llvm.parse_assembly(code)
    module.triple = ARM
    assembly = machine.emit_assembly(module)
    return re.findall(r"^\s+(ldar|ldapr|stlr|dmb|isb)\b", assembly, re.MULTILINE)


@pytest.mark.parametrize(
    ("function", "needs"),
    [
        (atomics.load_acquire, {"ldar|ldapr"}),
        (atomics.store_release, {"stlr"}),
        (atomics.spin, {"ldar|ldapr", "isb"}),
        (ring_kernels.claim, {"ldar|ldapr"}),
        (ring_kernels.publish, {"stlr", "dmb"}),
        (ring_kernels.take, {"ldar|ldapr"}),
        (ring_kernels.release, {"stlr"}),
        (ring_kernels.prepare_to_wait, {"stlr", "dmb", "ldar|ldapr"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_arm_gets_acquiring_loads_and_releasing_stores(function: Any, needs: set[str]) -> None:
    found = arm_instructions(function)
    for need in needs:
        assert set(need.split("|")) & set(found), f"{need} is not among {found}"


def test_publisher_on_arm_loads_asleep_flag_after_its_fence() -> None:
    """store head, fence, load asleep: without the fence both sides may miss each other."""
    found = arm_instructions(ring_kernels.publish)
    fence = found.index("dmb")
    assert found[fence - 1] == "stlr"
    assert set(found[fence + 1 :]) & {"ldar", "ldapr"}
    sleeper = arm_instructions(ring_kernels.prepare_to_wait)
    fence = sleeper.index("dmb")
    assert sleeper[fence - 1] == "stlr"
    assert set(sleeper[fence + 1 :]) & {"ldar", "ldapr"}


def test_only_synchronization_points_order_memory_on_arm() -> None:
    """One's own state and a header's fields are accessed by plain instructions."""
    assert len(arm_instructions(ring_kernels.claim)) == 1  # tail
    assert len(arm_instructions(ring_kernels.publish)) == 3  # head, fence, asleep
    assert len(arm_instructions(ring_kernels.take)) == 3  # head, closed, head again
    assert len(arm_instructions(ring_kernels.release)) == 1  # tail


_MARK = re.compile(r"# SYNC POINT: pairs with ([\w.]+)\.(\w+): \w")


def test_each_sync_point_is_named_by_its_pair() -> None:
    marks = set()
    for path in Path(ring_kernels.__file__).parent.glob("**/*.py"):
        text = path.read_text()
        spans = {}
        for node in ast.parse(text).body:
            inner = node.body if isinstance(node, ast.ClassDef) else [node]
            prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            for each in inner:
                if isinstance(each, ast.FunctionDef):
                    spans[prefix + each.name] = range(each.lineno, (each.end_lineno or 0) + 1)
        for number, line in enumerate(text.splitlines(), 1):
            if "# SYNC POINT" in line:
                found = _MARK.search(line)
                assert found, f"{path.name}:{number}"
                (function,) = (name for name, span in spans.items() if number in span)
                marks.add((function, *found.groups()))
    assert len(marks) >= 8
    for function, pair, where in marks:
        assert (pair, function, where) in marks, f"{pair} does not name {function}.{where}"
