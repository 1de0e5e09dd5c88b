"""The shipped checkpoint behind a server at a robot's pace: how steady, and how soon ready.

    SERVED_REQUESTS=5000 pytest bench/test_served_inference.py

Requests leave at absolute deadlines, ``PACE_HZ`` of them a second, so that the server is idle in
between as it is with a robot: caches get cold and cores clock down, which back-to-back calls hide.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.inference.nets import SHIPPED
from bench.inference.report import RESULTS, cpu_name, versions
from bench.record_files import write_record
from bench.records import Records
from bench.sample_files import write_samples
from runtime.client import PolicyClient
from runtime.latency_stats import Percentiles
from runtime.server.server_process import ServerProcess
from runtime.server.warmup import synthetic_observation

REQUESTS = int(os.environ.get("SERVED_REQUESTS", "1000"))
PACE_HZ, WARMUP = 25.0, 50
UNSTEADY, READY_WITHIN_S = 2.0, 10.0
"""Goals: p99 by p50 of a request, and a start that finds its engine compiled."""
FLAGS = ("-m", str(SHIPPED), "--device", "cpu", "--threads", "1")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Servers started meanwhile keep their compiled engines there."""
    monkeypatch.setenv("METRONOME_CACHE", str(tmp_path))
    # As a server on a robot has it, whatever these tests run with.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield


def _ready_s() -> float:
    began_s = time.monotonic()
    with ServerProcess(FLAGS):
        return time.monotonic() - began_s


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("empty_cache")
def test_start_to_ready(capsys: pytest.CaptureFixture[str], records: Records) -> None:
    """From the command to the line that says where the server is: first start, then cached."""
    cold_s, cached_s = _ready_s(), [_ready_s() for _ in range(3)]
    with capsys.disabled():
        print(
            f"\nserver, start to ready: {cold_s:.1f} s cold, cached "
            f"{', '.join(f'{s:.1f}' for s in cached_s)} s (goal {READY_WITHIN_S:g} s)"
        )
    records.values["served/start to ready, cached, s"] = max(cached_s)
    _save("served_start", {"cold_s": cold_s, "cached_s": cached_s}, {})


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("empty_cache")
def test_paced_requests(capsys: pytest.CaptureFixture[str], records: Records) -> None:
    """One thread, over shared memory: the whole request, and the inference in it."""
    with ServerProcess(FLAGS) as server, PolicyClient(server.address, transport="shm") as client:
        info = client.info
        request_s, infer_s, late_s = _paced(client, REQUESTS)
    whole, inside = Percentiles.of(request_s), Percentiles.of(infer_s)
    with capsys.disabled():
        print(f"\n{info.engine}, {info.precision}, {info.threads} thread, {PACE_HZ:g} requests/s")
        print(f"  request    {whole.in_ms()}, p99 / p50 {whole.p99 / whole.p50:.2f}")
        print(f"  inference  {inside.in_ms()}, p99 / p50 {inside.p99 / inside.p50:.2f}")
        print(f"  sent late  {Percentiles.of(late_s).in_ms()}")
        print(f"  goal: p99 / p50 of a request at most {UNSTEADY:g}")
    records.values["served/request p99 ÷ p50"] = whole.p99 / whole.p50
    _save(
        "served_paced",
        {
            "engine": info.engine,
            "precision": info.precision,
            "threads": info.threads,
            "pace_hz": PACE_HZ,
            "request_s": whole.as_dict(),
            "infer_s": inside.as_dict(),
            "unsteadiness": whole.p99 / whole.p50,
        },
        {"request": request_s, "infer": infer_s, "late": late_s},
    )


def _paced(
    client: PolicyClient, count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Seconds of each request, of the inference in it, and how late it was sent."""
    obs = synthetic_observation(client.contract)
    for _ in range(WARMUP):
        client.infer(obs)
    period_ns = round(1e9 / PACE_HZ)
    request_s, infer_s, late_s = (np.empty(count) for _ in range(3))
    start_ns = time.monotonic_ns() + period_ns
    for number in range(count):
        due_ns = start_ns + number * period_ns
        _sleep_until(due_ns)
        began_ns = time.monotonic_ns()
        chunk = client.infer(obs)
        request_s[number] = (time.monotonic_ns() - began_ns) / 1e9
        infer_s[number] = chunk.stages_ns["infer"] / 1e9
        late_s[number] = (began_ns - due_ns) / 1e9
    return request_s, infer_s, late_s


def _sleep_until(due_ns: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
    while (left_ns := due_ns - clock()) > 0:
        time.sleep(left_ns / 1e9)


def _save(name: str, record: dict[str, object], samples: dict[str, NDArray[np.float64]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"inference_{name}.json"
    whole = {**record, "cpu": cpu_name(), "cores": os.cpu_count(), "versions": versions()}
    write_record(path, whole)
    if samples:
        write_samples(path.with_suffix(".npz"), {k: v * 1e6 for k, v in samples.items()})
