"""A client at 50 Hz: ``python -m tests.faults.soak_client HOST:PORT SECONDS AGAIN``.

A tick whose answer is not there when the next is due takes the next one's place, counted. With
AGAIN above 0 the session is closed and opened anew every so many seconds. Says at the end what it
found, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter

import numpy as np

from runtime.client import PolicyClient
from runtime.server.warmup import synthetic_observation

PERIOD_S = 0.02


def main() -> None:
    address, seconds, again = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    found: Counter[str] = Counter(answers=0, errors=0, skipped=0, sessions=0)
    latencies_s: list[float] = []
    with PolicyClient(address, timeout_s=60) as client:  # what is loaded or compiled once
        client.infer(synthetic_observation(client.contract))
    print("ready", flush=True)  # noqa: T201
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        with PolicyClient(address, timeout_s=30) as client:
            found["sessions"] += 1
            obs = synthetic_observation(client.contract)
            closing_s = min(until_s, time.monotonic() + again) if again else until_s
            next_s = time.monotonic()
            while next_s < closing_s:
                time.sleep(max(0.0, next_s - time.monotonic()))
                began_s = time.monotonic()
                try:
                    client.infer(obs)
                    found["answers"] += 1
                    latencies_s.append(time.monotonic() - began_s)
                except Exception as error:
                    found["errors"] += 1
                    print(repr(error), file=sys.stderr, flush=True)  # noqa: T201
                missed = int((time.monotonic() - next_s) / PERIOD_S)
                found["skipped"] += missed
                next_s += (1 + missed) * PERIOD_S
    p50, p99 = np.percentile(latencies_s, (50, 99)) * 1e3
    said = {**found, "p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}
    print(json.dumps(said), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
