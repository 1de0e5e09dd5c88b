"""A robot of ours beside eight foreign clients that never pause, two of each protocol.

    python -m bench.gateways.fairness

The robot's p99 ÷ (a long batch + one inference). A long batch is the largest of the server's own
figures for the second longest of the newest 64 batches of a size, of which the median over the run
is taken. The foreign clients are simulations, with canned requests; the model is the shipped one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict

import numpy as np

from bench.clients import Clients
from bench.inference.nets import SHIPPED
from runtime.client import PolicyClient
from runtime.server.server_process import ServerProcess
from runtime.tools import ctl

PROTOCOLS = ("openpi", "groot", "ilstudio", "lerobot")
EACH = 2
SECONDS = float(os.environ.get("FAIRNESS_SECONDS", "60"))
SETTLE_S = 1.0
ROBOT_HZ, ROBOT_DEADLINE_MS = 20.0, 200.0
BOUND = 1.15


def main() -> int:
    os.environ.pop("OMP_NUM_THREADS", None)  # as on a robot
    flags = ["-m", str(SHIPPED), "--device", "cpu"]
    for protocol in PROTOCOLS:
        flags += ["--gateway", f"{protocol}:0"]
    wants = {"kind": "robot", "deadline_ms": ROBOT_DEADLINE_MS, "rate_hz": ROBOT_HZ}
    before = os.getloadavg()[0]
    with ServerProcess(flags) as server, Clients(server.address, 1, **wants) as robot:
        with PolicyClient(server.address) as client:
            contract = client.contract.to_json()
        order = {
            "contract": contract,
            "seconds": SECONDS + 2 * SETTLE_S,
            "addresses": list(server.ready["gateways"]) * EACH,
        }
        with subprocess.Popen(
            [sys.executable, "-m", "bench.gateways.raw_clients", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as foreign:
            assert foreign.stdin is not None
            assert foreign.stdout is not None
            foreign.stdout.readline()
            foreign.stdin.write("go\n")
            foreign.stdin.flush()
            time.sleep(SETTLE_S)
            robot.start(SECONDS, ROBOT_HZ)
            batches_ms = long_batches_ms(server.address, SECONDS)
            ours = robot.answers()
            counts = json.loads(foreign.stdout.readline())
    p50_ms, p99_ms = np.percentile(ours.latency_s, [50, 99]) * 1e3
    inference_ms = float(np.percentile(ours.infer_s, 99)) * 1e3
    size, batch_ms = max(batches_ms.items(), key=lambda entry: entry[1])
    ratio = p99_ms / (batch_ms + inference_ms)
    print(f"{SECONDS:g} s, load average before {before:.1f}")
    print(f"robot: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms, {len(ours.latency_s)} answers")
    print(f"long batch (of {size}) {batch_ms:.1f} ms, inference p99 {inference_ms:.1f} ms")
    for count in sorted(counts, key=lambda count: count["protocol"]):
        print("{protocol:9}{answered:6} answers, {failed} failed {why}".format(**count))
    print(f"robot p99 ÷ (long batch + one inference) {ratio:.2f}, at most {BOUND}")
    failed = ours.failed + sum(count["failed"] for count in counts)
    return int(ratio > BOUND or failed > 0)


def long_batches_ms(address: str, seconds: float) -> dict[str, float]:
    """What a long inference takes by batch size, sampled for ``seconds``."""
    sampled: dict[str, list[float]] = defaultdict(list)
    until_s = time.monotonic() + seconds
    with ctl.dial(address, "", "") as dialer:
        while time.monotonic() < until_s:
            time.sleep(1.0)
            for size, cost in dialer.send_admin_command("status")["costs_ms"].items():
                sampled[size].append(cost["most"])
    return {size: float(np.median(values)) for size, values in sampled.items()}


if __name__ == "__main__":
    raise SystemExit(main())
