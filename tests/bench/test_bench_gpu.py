"""The parts of the GPU benchmark with stubs: nothing that is measured is lost."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.inference import gpu, gpu_check, gpu_contest, gpu_replay, gpu_served, steps, variants
from bench.inference.arena import COLD, Comparison, Entry
from bench.inference.contestants import CONTESTANTS, PLAIN
from bench.inference.gpu_results import GpuResults, write_json
from bench.inference.nets import FULL
from bench.inference.report import COMPILED
from bench.inference.steps import Step, StepFailed, run_step
from bench.inference.worker import Started
from policies.act import cuda_api

ROOT = Path(__file__).parents[2]
OURS = "ours, cuda-graph bf16"
NETS = ("full, 1 camera", "full, 4 cameras")


# The file


def test_records_stay_when_others_are_added(tmp_path) -> None:
    GpuResults(tmp_path, "NVIDIA H200").put("check", "facts", {"a": 1})
    results = GpuResults(tmp_path, "NVIDIA H200")
    results.put("check", "replay", {"b": (math.nan, np.float64(2.0))})
    results.put("contest", "net", {"c": math.inf})
    results.put("check", "facts", {"a": 3})
    content = json.loads((tmp_path / "nvidia-h200.json").read_text(encoding="utf-8"))
    assert content == {
        "gpu": "NVIDIA H200",
        "check": {"facts": {"a": 3}, "replay": {"b": [None, 2.0]}},
        "contest": {"net": {"c": None}},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-h200.json"]


def test_a_file_of_another_kind_is_not_overwritten(tmp_path) -> None:
    write_json(tmp_path / "g.json", {"other": 1})
    with pytest.raises(ValueError, match="got another file, expected results of a GPU"):
        GpuResults(tmp_path, "g").put("check", "facts", {})


def test_a_write_that_does_not_end_leaves_the_file_as_it_was(tmp_path, monkeypatch) -> None:
    results = GpuResults(tmp_path, "gpu")
    results.put("contest", "net", {"a": 1})
    before = results.path.read_bytes()

    def cut(_descriptor: int) -> None:
        assert results.path.read_bytes() == before
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", cut)
    with pytest.raises(KeyboardInterrupt):
        results.put("contest", "net", {"a": 2})
    assert results.path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [results.path]


def test_a_writer_that_is_killed_leaves_a_file_that_can_be_read(tmp_path) -> None:
    code = f"""
from pathlib import Path
from bench.inference.gpu_results import GpuResults
results = GpuResults(Path({str(tmp_path)!r}), "gpu")
number = 0
while True:
    results.put("contest", str(number % 50), {{"samples": list(range(1000)), "number": number}})
    number += 1
    print(number, flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 5:
            pass
        writer.kill()
    found = GpuResults(tmp_path, "gpu").read()["contest"]
    assert len(found) >= 5
    assert all(len(each["samples"]) == 1000 for each in found.values())


# Steps


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("fine", {"ok": True, "got": ["x"]}),
        ("not_well", {"ok": False, "found": 1}),
        ("fails", {"ok": False, "so far": 1, "absent": "torch 2.11 sees no GPU"}),
        (
            "raises",
            {
                "ok": False,
                "absent": "RuntimeError: CUDA error: an illegal memory access was encountered",
            },
        ),
        (
            "dies",
            {"ok": False, "so far": 2, "absent": "its process ended with status -9: last words"},
        ),
        ("hangs", {"ok": False, "so far": 3, "absent": "killed after 2 s"}),
    ],
)
def test_a_step_that_goes_wrong_says_why_and_keeps_what_it_had(name, record, monkeypatch) -> None:
    monkeypatch.setattr(steps, "LEAST_S", 0.0)
    monkeypatch.setattr(steps, "NEWS_EVERY_S", 0.02)
    put = []
    within_s = 1.5 if name == "hangs" else 20.0
    step = Step(name, "tests.bench.stub_steps", name, within_s, ("x",))
    found = run_step(step, put.append, ends_s=time.monotonic() + 30)
    assert put[-1] == found
    assert found.pop("seconds") >= 0
    assert found == record
    if name == "hangs":  # what is kept if this process is killed meanwhile
        assert put[0] == {"ok": False, "so far": 3, "absent": "cut before its end"}


def test_a_step_without_time_is_not_started() -> None:
    put = []
    step = Step("fine", "tests.bench.stub_steps", "fine", 20.0)
    run_step(step, put.append, ends_s=time.monotonic() + 1)
    assert put == [{"ok": False, "seconds": 0.0, "absent": "no time was left for it"}]


# Parts


@pytest.fixture
def command(tmp_path):
    def made(part: str) -> gpu.Command:
        chosen = next(each for each in gpu.PARTS if each.name == part)
        results = GpuResults(tmp_path, "gpu")
        return gpu.Command(chosen, NETS, "bf16", 1.0, results, time.monotonic() + 600)

    return made


def entry(name: str, *samples_s: float, error: float = 1e-3) -> Entry:
    started = Started(1.0, 2.0, 0.5, 1, 2, np.zeros((1, 1, 1), np.float32))
    made = Entry(CONTESTANTS[name], {COLD: started}, error=error)
    made.samples_s, made.cores, made.waited = list(samples_s), [1.0], [0.0]
    made.paced_s = [2 * s for s in samples_s]
    return made


def comparison(net: str, *entries: Entry) -> Comparison:
    return Comparison(
        net=net,
        config=FULL,
        threads=2,
        device="cuda",
        entries={each.contestant.name: each for each in entries},
        absent={},
        machine=None,
        pace_hz=50.0,
    )


def test_the_file_holds_a_network_before_the_next_is_begun(command, monkeypatch) -> None:
    given = command("contest")
    before = []

    def compare(net, names, **settings):
        assert settings["device"] == "cuda"
        assert not settings["timeouts"].cached_starts
        # The first one leaves half of the time to the second.
        assert settings["timeouts"].ends_s < given.ends_s - 250 * (net == NETS[0])
        before.append(set(given.results.read().get("contest", {})))
        if net == NETS[1]:
            raise RuntimeError("out of memory")
        ours = entry(OURS, 0.001, 0.001)
        return comparison(net, ours, entry(PLAIN, 0.01, 0.01), entry(COMPILED, 0.002))

    fine = gpu_contest.contest(
        NETS,
        lambda net, record: given.results.put("contest", net, record),
        seconds=1.0,
        ends_s=given.ends_s,
        compare=compare,
    )
    assert not fine
    assert before == [set(), {NETS[0]}]
    found = given.results.read()["contest"]
    row = found[NETS[0]]["rows"][OURS]
    assert (row["p50 / eager"], row["p50 / compiled"], row["p99 / p50"]) == (0.1, 0.5, 1.0)
    assert row["paced"] == {
        "rate_hz": 50.0,
        "count": 2,
        "p50_s": 0.002,
        "p99_s": 0.002,
        "p99 / p50": 1.0,
    }
    assert found[NETS[0]]["samples_us"][OURS] == [1000.0, 1000.0]
    assert found[NETS[1]]["absent"] == "RuntimeError: out of memory"


def test_other_actions_than_the_plain_modules_are_not_well() -> None:
    put = {}
    wrong = entry(OURS, 0.001, error=math.nan)
    assert not gpu_contest.contest(
        NETS[:1],
        put.__setitem__,
        seconds=1.0,
        ends_s=time.monotonic() + 600,
        compare=lambda net, names, **_: comparison(net, wrong, entry(PLAIN, 0.01)),
    )
    assert not put[NETS[0]]["ok"]
    assert put[NETS[0]]["rows"][OURS]["p50 / eager"] == pytest.approx(0.1)


def test_a_variant_that_ends_the_process_is_left_out_of_the_next(command, monkeypatch) -> None:
    given, started = command("variants"), []

    def run(step, put, *, ends_s):
        started.append(step.arguments)
        if len(started) == 1:
            return {"ok": False, "rows": {}, "making": "compiled", "absent": "killed"}
        return {"ok": True, "rows": {"base": {}}}

    monkeypatch.setattr(gpu, "run_step", run)
    assert gpu.variants(given)
    assert started == [(NETS[0], "bf16", "1.0"), (NETS[0], "bf16", "1.0", "compiled")]
    record = given.results.read()["variants"][NETS[0]]
    assert record["rows"] == {"base": {}}
    assert record["absent variants"] == {"compiled": "killed"}


def test_a_server_without_its_packages_is_a_reason(monkeypatch) -> None:
    monkeypatch.setattr(gpu_served, "NEEDED", {"no_such_module": "pyzmq"})
    for name, arguments in (("paced", ["shipped", "cpu"]), ("lost_device", ["cpu"])):
        with pytest.raises(StepFailed, match=r"not installed: pyzmq \(No module named 'no_such"):
            gpu_served.STEPS[name](lambda _record: None, arguments)


@pytest.mark.parametrize("part", ["check", "served"])
def test_every_step_is_run_whatever_became_of_the_one_before(part, command, monkeypatch) -> None:
    given, started = command(part), []

    def run(step, put, *, ends_s):
        started.append(step)
        put({"ok": False, "absent": "x"})
        return {"ok": False}

    monkeypatch.setattr(gpu, "run_step", run)
    assert not gpu.RUN[part](given)
    assert set(given.results.read()[part]) == {step.name for step in started}
    assert len(started) >= 4
    for step in started:
        assert step.function in importlib.import_module(step.module).STEPS


def test_parts_fit_a_command_of_ten_minutes(command, monkeypatch) -> None:
    assert [part.name for part in gpu.PARTS] == ["check", "contest", "variants", "served"]
    assert all(part.within_s <= 540 for part in gpu.PARTS)


def test_without_a_gpu_it_is_one_line_and_status_3(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(gpu, "FACTS", Step("facts", "tests.bench.stub_steps", "fails", 60.0))
    assert gpu.main(["check", "--out", str(tmp_path)]) == gpu.NO_GPU == 3
    assert capsys.readouterr().err.splitlines()[-1] == "no GPU: torch 2.11 sees no GPU"
    assert not list(tmp_path.iterdir())


# What steps compute


def test_the_tests_of_the_cuda_engine_are_found_and_no_file_twice() -> None:
    cuda, others = (set(gpu_check.test_files(which)) for which in ("cuda", "others"))
    assert "tests/policies/test_policies_cuda.py" in cuda
    assert {
        f"tests/policies/test_policies_{name}.py" for name in ("fused_model", "engine")
    } <= others
    assert not cuda & others


def test_nodes_of_a_trace() -> None:
    trace = {
        "traceEvents": [
            {"cat": "kernel", "name": "gemm", "ts": 10.0, "dur": 4.0},
            {"cat": "kernel", "name": "gemm", "ts": 20.0, "dur": 5.0},
            {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 13.0, "dur": 2.0},
            {"cat": "cpu_op", "name": "aten::add", "ts": 0.0, "dur": 99.0},
            {"name": "metadata", "ph": "M"},
        ]
    }
    assert gpu_replay.nodes_of(trace) == {
        "nodes": {"kernel": 2, "gpu_memcpy": 1, "gpu_memset": 0, "all": 3},
        "table": [
            {"name": "gemm", "count": 2, "us": 9.0},
            {"name": "Memcpy HtoD", "count": 1, "us": 2.0},
        ],
        "span_us": 15.0,
        "busy_us": 10.0,
    }
    assert (
        gpu_replay.nodes_of({"traceEvents": []})["why"] == "the profiler saw no work of the device"
    )


def test_only_what_graphs_have_for_intermediate_results_is_poisoned() -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    blocks = [
        {"size": 8, "state": "active_allocated"},
        {"size": 16, "state": "inactive"},
        {"size": 8, "state": "active_pending_free"},
    ]
    segments = [
        {"address": 0, "segment_pool_id": (0, 0), "blocks": blocks},
        {"address": 32, "segment_pool_id": (0, 1), "blocks": blocks},
    ]
    count = variants.poison_graph_memory(segments, lambda start, size: memory[start : start + size])
    assert count == 16
    assert memory.nonzero().flatten().tolist() == list(range(40, 56))
    assert bool(memory[40:56].view(torch.bfloat16).isnan().all())


def test_the_graph_and_the_stream_of_an_engine_are_found(monkeypatch) -> None:
    from tests.bench.stub_cuda import stub_cuda

    stub_cuda(monkeypatch)
    api = cuda_api.TorchCuda(torch.device("cuda", 0))
    assert variants.stream_of(api).is_a_stream


def test_variants_have_different_options_and_those_that_compile_come_last() -> None:
    found = variants.VARIANTS
    assert len({(each.options, each.registered) for each in found}) == len(found)
    assert len({each.name for each in found}) == len(found)
    compiling = [each.compiles for each in found]
    assert compiling == sorted(compiling)
    assert found[0].name == variants.BASE


def test_a_variants_options_are_the_engines_own(monkeypatch) -> None:
    monkeypatch.setattr(variants, "make_engine", lambda weights, options: options)
    for variant in variants.VARIANTS:
        made = variants.make_variant(None, variant, "bf16")
        assert (made.engine, made.precision) == ("cuda-graph", "bf16")
        assert made.graph_options == variant.options
        assert variant.registered == ("direct_upload" in variant.options)
