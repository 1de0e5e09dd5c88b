"""The shipped checkpoint behind a server at a robot's pace: how steady, and how soon ready.

    SERVED_REQUESTS=5000 pytest bench/test_served_inference.py --device cpu

Requests leave at absolute deadlines, ``SERVED_HZ`` (25) of them a second, so that the server is
idle in between as it is with a robot: caches get cold and cores clock down, which back-to-back
calls hide.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bench import served
from bench.inference.nets import SHIPPED
from bench.inference.report import RESULTS, cpu_name, versions
from bench.record_files import write_record
from bench.records import Records
from bench.sample_files import write_samples
from runtime.client import PolicyClient
from runtime.latency_stats import Percentiles
from runtime.server.server_process import ServerProcess

REQUESTS = int(os.environ.get("SERVED_REQUESTS", "1000"))
PACE_HZ = float(os.environ.get("SERVED_HZ", "25"))
SWAPS = 3
UNSTEADY, READY_WITHIN_S = 2.0, 10.0
"""Goals: p99 by p50 of a request, and a start that finds its engine compiled."""


@pytest.fixture
def device(pytestconfig: pytest.Config) -> str:
    """As the server's ``--device``."""
    return str(pytestconfig.getoption("--device"))


def _flags(device: str) -> tuple[str, ...]:
    return ("-m", str(SHIPPED), "--device", device, "--threads", "1")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Servers started meanwhile keep their compiled engines there."""
    monkeypatch.setenv("METRONOME_CACHE", str(tmp_path))
    # As a server on a robot has it, whatever these tests run with.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield


def _ready_s(device: str) -> float:
    began_s = time.monotonic()
    with ServerProcess(_flags(device)):
        return time.monotonic() - began_s


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("empty_cache")
def test_start_to_ready(capsys: pytest.CaptureFixture[str], records: Records, device: str) -> None:
    """From the command to the line that says where the server is: first start, then cached."""
    cold_s, cached_s = _ready_s(device), [_ready_s(device) for _ in range(3)]
    with capsys.disabled():
        print(
            f"\nserver, start to ready: {cold_s:.1f} s cold, cached "
            f"{', '.join(f'{s:.1f}' for s in cached_s)} s (goal {READY_WITHIN_S:g} s)"
        )
    if device == "cpu":  # of which the budgets are
        records.values["served/start to ready, cached, s"] = max(cached_s)
    _save(f"served_start{_suffix(device)}", {"cold_s": cold_s, "cached_s": cached_s}, {})


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("empty_cache")
def test_paced_requests(capsys: pytest.CaptureFixture[str], records: Records, device: str) -> None:
    """One thread, over shared memory: the whole request, and the inference in it."""
    with (
        ServerProcess(_flags(device)) as server,
        PolicyClient(server.address, transport="shm") as client,
    ):
        info = client.info
        found = served.paced(client, REQUESTS, PACE_HZ)
    whole, inside = Percentiles.of(found.request_s), Percentiles.of(found.infer_s)
    around = Percentiles.of(found.request_s - found.infer_s)
    with capsys.disabled():
        print(f"\n{info.engine}, {info.precision}, {info.threads} thread, {PACE_HZ:g} requests/s")
        print(f"  request    {whole.in_ms()}, p99 / p50 {whole.p99 / whole.p50:.2f}")
        print(f"  inference  {inside.in_ms()}, p99 / p50 {inside.p99 / inside.p50:.2f}")
        print(f"  around it  {around.in_ms()}")
        print(f"  sent late  {Percentiles.of(found.late_s).in_ms()}")
        print(f"  goal: p99 / p50 of a request at most {UNSTEADY:g}")
    if device == "cpu":
        records.values["served/request p99 ÷ p50"] = whole.p99 / whole.p50
    _save(
        f"served_paced{_suffix(device)}",
        {
            "engine": info.engine,
            "precision": info.precision,
            "threads": info.threads,
            "pace_hz": PACE_HZ,
            "request_s": whole.as_dict(),
            "infer_s": inside.as_dict(),
            "unsteadiness": whole.p99 / whole.p50,
        },
        {"request": found.request_s, "infer": found.infer_s, "late": found.late_s},
    )


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("empty_cache")
def test_hot_swaps(capsys: pytest.CaptureFixture[str], device: str) -> None:
    """The shipped checkpoint for itself: the longest time without an answer."""
    with ServerProcess(_flags(device)) as server:
        found = served.swaps(server, str(SHIPPED), count=SWAPS, pace_hz=PACE_HZ)
    with capsys.disabled():
        print(
            f"\n{SWAPS} swaps under {PACE_HZ:g} requests/s: longest time without an answer "
            f"{1e3 * found.worst_gap_s:.1f} ms, before {1e3 * found.calm_gap_s:.1f} ms"
        )
    assert found.failed == 0
    assert len(found.took_s) == SWAPS


@pytest.mark.timeout(300)
def test_a_lost_device_ends_the_server(device: str) -> None:
    """The client is told, and a supervisor finds a status that is not 0."""
    kind = device.partition(":")[0]
    with ServerProcess(("-m", f"python:bench.lost_device:{kind}")) as server:
        found = served.lose_device(server)
    assert found.as_expected, found


def _suffix(device: str) -> str:
    return "" if device == "cpu" else f"_{device.replace(':', '-')}"


def _save(name: str, record: dict[str, object], samples: dict[str, NDArray[np.float64]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"inference_{name}.json"
    whole = {**record, "cpu": cpu_name(), "cores": os.cpu_count(), "versions": versions()}
    write_record(path, whole)
    if samples:
        write_samples(path.with_suffix(".npz"), {k: v * 1e6 for k, v in samples.items()})
