"""Four clients at 50 Hz, one of them coming and going: nothing grows, nothing fails.

Half an hour with ``METRONOME_SOAK=1``, its result in ``bench/results/soak.json``; a few seconds of
the same otherwise, too short for a slope.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from bench.record_files import write_record
from runtime.evaluation.results import versions
from runtime.options.defaults import DEFAULT_CHECKPOINT
from tests.faults.rig import ROOT, Program
from tests.faults.watch import Holdings

SOAK = bool(os.environ.get("METRONOME_SOAK"))
SECONDS = float(os.environ.get("METRONOME_SOAK_S", "1800")) if SOAK else 6.0
LOOK_S, AGAIN_S = (5.0, 10.0) if SOAK else (0.2, 1.0)
WARM_S = 300.0 if SOAK else 2.0
CLIENTS = 4
MOST_BYTES_PER_H = 1e6
RESULT = ROOT / "bench/results/soak.json"

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(SECONDS + 300)]


def test_nothing_grows(tmp_path: Path) -> None:
    server = Program(
        "-m", "runtime.server", "-m", DEFAULT_CHECKPOINT, "--port", "0", "--device", "cpu",
        "--log_level", "ERROR",
    )  # fmt: skip
    clients: list[Program] = []
    seen: list[tuple[float, Holdings]] = []
    try:
        address = server.expect(r"Policy Server started on (\S+)", 300)[1]
        server.expect("warm latency", 60)
        for number in range(CLIENTS):
            again = AGAIN_S if number == 0 else 0.0
            flags = (address, str(SECONDS), str(again))
            clients.append(Program("-m", "tests.faults.soak_client", *flags))
        for client in clients:
            client.expect("^ready", 120)
        began_s = time.monotonic()
        while (now_s := time.monotonic() - began_s) < SECONDS - 2:
            seen.append((now_s, Holdings.of(server.pid)))
            time.sleep(LOOK_S)
        found = [json.loads(client.expect(r"^\{.*\}$", 120)[0]) for client in clients]
    finally:
        for program in (*clients, server):
            program.close()
    warm = [(at_s, holdings) for at_s, holdings in seen if at_s >= min(WARM_S, SECONDS / 2)]
    at_h = np.array([at_s for at_s, _ in warm]) / 3600
    rss = np.array([holdings.rss_bytes for _, holdings in warm])
    slope = float(np.polyfit(at_h, rss, 1)[0])
    result = {
        "seconds": SECONDS,
        "clients": found,
        "rss_slope_bytes_per_h": round(slope),
        "rss_first_last_bytes": [int(rss[0]), int(rss[-1])],
        "descriptors": sorted({holdings.descriptors for _, holdings in warm}),
        "threads": sorted({holdings.threads for _, holdings in warm}),
        "samples": [[round(at_s, 1), holdings.rss_bytes] for at_s, holdings in seen[::6]],
        "versions": versions(),
    }
    print(json.dumps({k: v for k, v in result.items() if k != "samples"}, indent=1))  # noqa: T201
    assert sum(client["errors"] for client in found) == 0
    assert all(client["answers"] > 0 for client in found)
    assert found[0]["sessions"] >= SECONDS / AGAIN_S * 0.8
    # One that is coming in holds a connection and a handshake's worth more for a moment.
    counts = [holdings.descriptors for _, holdings in warm]
    third = len(counts) // 3
    assert min(counts[-third:]) <= max(counts[:third])
    assert max(holdings.threads for _, holdings in warm) <= warm[0][1].threads + 1
    if SOAK:
        write_record(RESULT, result)
        assert slope < MOST_BYTES_PER_H
