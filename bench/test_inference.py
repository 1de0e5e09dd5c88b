"""One inference: every engine of ours, LeRobot's ACT, OpenVINO's conversion of the plain module.

    pytest bench/test_inference.py -k "shipped and 1-thread"

Contestants take turns in blocks, each in a process of its own that may use only as many cores as it
has threads. Before anything is timed, its actions are compared with the plain module's. Writes the
table's numbers, and what ``bench.sample_files`` keeps of the samples, to ``bench/results``.

``INFERENCE_SECONDS`` (40): how long each table may take, starts not counted. Slow contestants then
have fewer calls than ``INFERENCE_CALLS`` (500); the table says how many. ``INFERENCE_COMPILE=1``
adds ``torch.compile``.
"""

from __future__ import annotations

import os

import pytest

from bench.inference.arena import LIMITS, Comparison, compare
from bench.inference.contestants import CONTESTANTS
from bench.inference.nets import NETS
from bench.inference.report import case_name, goals, ratios, save, table
from bench.records import Records

SECONDS = float(os.environ.get("INFERENCE_SECONDS", "40"))
CALLS = int(os.environ.get("INFERENCE_CALLS", "500"))
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
"""Of max|a - b| / max|b|; a faster answer that is another answer is no contestant."""
CPU_CONTESTANTS = [n for n in CONTESTANTS if n not in LIMITS and "cuda" not in n]


def _fits(threads: int) -> None:
    cores = len(os.sched_getaffinity(0))
    if cores < threads:
        pytest.skip(f"{threads} threads on {cores} cores would measure the scheduler")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("threads", (1, 2), ids=("1-thread", "2-threads"))
@pytest.mark.parametrize("net", NETS)
def test_inference(
    net: str, threads: int, capsys: pytest.CaptureFixture[str], records: Records
) -> None:
    _fits(threads)
    result = compare(
        net, CPU_CONTESTANTS, threads=threads, calls=CALLS, budget_s=SECONDS, device="cpu"
    )
    path = save(result)
    records.values |= {
        f"inference, {case_name(result)}/{what}": value for what, value in ratios(result).items()
    }
    with capsys.disabled():
        print()
        for line in (*table(result), *goals(result)):
            print(line)
        print(f"  {path.relative_to(path.parents[2])}")
    _all_agree(result)


def _all_agree(result: Comparison) -> None:
    wrong = {
        name: f"{entry.error:.1e}"
        for name, entry in result.entries.items()
        if not entry.error <= TOLERANCES[entry.contestant.precision]
    }
    assert not wrong, f"other actions than the plain module's: {wrong}"
