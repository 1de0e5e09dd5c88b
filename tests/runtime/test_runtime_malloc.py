"""Commands tell malloc to keep freed memory; a program that imports this package is left alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.eval_real import sensing_process
from runtime.eval_sim import cli as eval_sim
from runtime.eval_sim import worker_processes
from runtime.gateway import cli as gateway
from runtime.server import cli as serve

ROOT = Path(__file__).resolve().parents[2]
MAPPED = """
import ctypes

class Blocks(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.mallinfo2.restype = Blocks

def maps_large_blocks():
    # Of a size that nothing here has freed before: glibc raises its threshold to what was freed.
    before = libc.mallinfo2().hblks
    assert libc.malloc(31 * 2**20)
    return libc.mallinfo2().hblks > before
"""


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAPPED + program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if "mallinfo2" in done.stderr:
        pytest.skip("the C library does not count mapped blocks")
    assert done.returncode == 0, done.stderr


def test_a_client_and_a_server_in_a_program_leave_its_malloc_alone() -> None:
    run("""
from runtime.server.warmup import synthetic_observation
from tests.runtime import toy_policy
from tests.runtime.serving import connect, serving

with serving(toy_policy.make()) as server, connect(server, "zmq") as client:
    client.infer(synthetic_observation(client.contract))
    assert maps_large_blocks()
assert maps_large_blocks()
""")


def test_memory_that_is_kept_is_not_mapped_anew() -> None:
    run("""
from transport.zeromq.malloc import keep_freed_memory

assert maps_large_blocks()
keep_freed_memory()
assert not maps_large_blocks()
""")


class Asked(Exception):
    """malloc was told."""


@pytest.mark.parametrize(
    ("module", "begin"),
    [
        (serve, lambda: serve.main([])),
        (gateway, lambda: gateway.main(["openpi"])),
        (eval_sim, lambda: eval_sim.main(["-o", "results"])),
        (sensing_process, lambda: sensing_process.main([])),
        (worker_processes, lambda: worker_processes._work(None, None, None)),
    ],
    ids=["server", "gateway", "eval_sim", "eval_real's sensing process", "eval_sim's worker"],
)
def test_the_commands_that_handle_pictures_ask_before_they_begin(
    module: object, begin: Callable[[], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ask() -> None:
        raise Asked

    monkeypatch.setattr(module, "keep_freed_memory", ask)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Asked):
        begin()
