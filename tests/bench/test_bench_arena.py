"""A contestant that dies, fails or hangs is absent, with its words, and the others are measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.inference import arena, worker
from bench.inference.arena import COLD, Comparison, Entry, Timeouts, compare
from bench.inference.contestants import (
    CONTESTANTS,
    CONVOLUTION,
    COPY,
    GEMM,
    PLAIN,
    Contestant,
    Setting,
)
from bench.inference.nets import FULL
from bench.inference.report import goals, record, table
from bench.inference.worker import Started, Worker

ROOT = Path(__file__).parents[2]
FINE, OTHER = "ours, torch fp32", "ours, torch bf16"
DEAD, HANGING = "ours, openvino fp32", "ours, openvino bf16"
CORES = tuple(sorted(os.sched_getaffinity(0)))[-1:]


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch):
    """Workers do as they are told."""
    monkeypatch.setattr(
        worker, "COMMAND", (sys.executable, str(ROOT / "tests/bench/stub_worker.py"))
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(arena, "_check", lambda *_: None)

    def does(**kwargs) -> None:
        monkeypatch.setenv("STUB_WORKERS", json.dumps(kwargs))

    return lambda deeds: does(**deeds)


def compared(names, **changes) -> Comparison:
    settings = {"threads": 1, "calls": 30, "budget_s": 30.0, "device": "cpu"}
    timeouts = Timeouts(answer_s=1.0, cached_starts=False)
    return compare("shipped", names, **{**settings, "timeouts": timeouts, **changes})


def test_the_others_go_on(stubs, monkeypatch, capfd) -> None:
    monkeypatch.setattr(arena, "BLOCK_S", 0.01)  # ten calls of a stub
    stubs(
        {
            PLAIN: "dies at its start",
            OTHER: "fails at its start",
            DEAD: "dies in a block",
            HANGING: "hangs in a block",
        }
    )
    result = compared([PLAIN, OTHER, DEAD, HANGING, FINE], pace_hz=1000.0, paced_calls=150)
    assert set(result.entries) == {FINE}
    assert len(result.entries[FINE].samples_s) == 30
    assert len(result.entries[FINE].paced_s) == 150
    assert result.absent == {
        PLAIN: "its process died, status 7: no such kernel image",
        OTHER: "RuntimeError: CUDA out of memory",
        DEAD: "after 10 calls: its process died, status 9",
        HANGING: "after 10 calls: no answer within 1 s",
    }
    assert "a warning" in capfd.readouterr().err
    assert result.machine is not None
    lines = list(table(result))
    assert any(PLAIN in line and line.endswith("no such kernel image") for line in lines)
    assert any("at 1000 Hz: p50 1.000, p99 1.000, p99 / p50 1.00" in line for line in lines)
    assert record(result)["rows"][FINE]["paced"]["count"] == 150


def entry(name: str, *samples_s: float) -> Entry:
    started = Started(1.0, 2.0, 0.5, 1, 2, np.zeros((1, 1, 1), np.float32))
    made = Entry(CONTESTANTS[name], {COLD: started})
    made.samples_s, made.cores, made.waited = list(samples_s), [1.0], [0.0]
    return made


def test_one_product_and_the_copy_are_enough_for_a_roofline() -> None:
    entries = {name: entry(name, 2.0, 0.5) for name in (GEMM, COPY)}
    entries[CONVOLUTION] = entry(CONVOLUTION, 0.1)
    both = arena._machine(entries, "cpu")
    del entries[CONVOLUTION]
    one = arena._machine(entries, "cpu")
    assert both is not None
    assert one is not None
    assert both.flops_per_s > one.flops_per_s == CONTESTANTS[GEMM].work / 0.5
    del entries[GEMM]
    assert arena._machine(entries, "cpu") is None
    assert arena._machine({COPY: entry(COPY), GEMM: entry(GEMM, 1.0)}, "cpu") is None


def test_without_a_limit_there_is_no_roofline_but_there_are_times() -> None:
    result = Comparison(
        net="shipped",
        config=FULL,
        threads=1,
        device="cpu",
        entries={PLAIN: entry(PLAIN, 0.5), FINE: entry(FINE, 0.25)},
        absent={COPY: "its process died, status 7"},
        machine=None,
    )
    row = next(line for line in table(result) if line.startswith(f"  {FINE}"))
    assert row.split()[3:5] == ["1", "250.00"]
    assert row.split()[-1] == "-"
    assert "no measured peak: a limit is absent" in "".join(table(result))
    [line] = [line for line in goals(result) if f"/ {PLAIN}" in line]
    assert line.endswith(": 0.500, not met")
    content = record(result)
    assert content["peak_bytes_per_s"] is content["bound_s"] is None
    assert content["rows"][FINE]["roofline"] is None


def test_who_cannot_start_in_the_time_that_is_left_is_absent(stubs) -> None:
    stubs({})
    result = compared([FINE], timeouts=Timeouts(ends_s=0.0))
    names = (GEMM, CONVOLUTION, COPY, FINE)
    assert result.absent == dict.fromkeys(names, "no time was left to start it")
    assert result.machine is None


def test_a_worker_that_says_nothing_is_killed(stubs) -> None:
    stubs({})
    fine = Contestant("c", "m", "b", "limit", "fp32")
    with pytest.raises(RuntimeError, match=r"c: no answer within 0\.001 s"):
        Worker(fine, Path(), Setting(1, Path()), CORES, start_within_s=0.001)


def test_a_worker_says_its_error_in_its_own_words() -> None:
    broken = Contestant("c", "tests.bench.stub_contestant", "broken", "limit", "fp32")
    with pytest.raises(RuntimeError, match="c: RuntimeError: no kernel image is available for thi"):
        Worker(broken, Path(), Setting(1, Path()), CORES)


def test_a_worker_chooses_its_cores_before_torch_is_there() -> None:
    code = "import sys, bench.inference.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
