"""Clients with canned observations, in a process of their own that does what it is told.

``python -m bench.clients ADDRESS COUNT FLAGS-AS-JSON`` reads orders from standard input, one JSON
object a line, and answers each with one. Every client has a thread; they wait for the server nearly
all of the time, so that one process is enough for eight of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.types import MetaObs
from runtime.client import PolicyClient
from runtime.protocol import messages
from runtime.server.warmup import synthetic_observation

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Answers:
    """Of one order, all clients together.

    Attributes:
        latency_s: Of every request, from the call to the chunk.
        infer_s: Of the inference that each was part of, batch or not, as the server says.
        per_s: Answers per second.
        failed: Requests that ended in an error.
    """

    latency_s: NDArray[np.float64]
    infer_s: NDArray[np.float64]
    per_s: float
    failed: int


class Clients:
    """The process. Its clients have asked once when it is made."""

    def __init__(self, address: str, count: int = 1, **flags: Any) -> None:
        command = [sys.executable, "-m", "bench.clients", address, str(count), json.dumps(flags)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._hear()

    def start(self, seconds: float, pace_hz: float = 0.0) -> None:
        """Ask for so long: ``pace_hz`` requests a second and client, 0 for one after the other."""
        self._say({"do": "ask", "seconds": seconds, "pace_hz": pace_hz})

    def come_and_go(self, seconds: float, every_s: float) -> None:
        """Open a session every so often and end it."""
        self._say({"do": "come_and_go", "seconds": seconds, "every_s": every_s})

    def answers(self) -> Answers:
        """What came of the last order, when it is over."""
        said = self._hear()
        latency_s, infer_s = (np.array(said[name]) for name in ("latency_s", "infer_s"))
        return Answers(latency_s, infer_s, said["per_s"], said["failed"])

    def _say(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the clients died with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ask(client: PolicyClient, obs: MetaObs, order: dict[str, Any], into: list[Any]) -> None:
    until_s = time.monotonic() + order["seconds"]
    period_s = 1 / order["pace_hz"] if order["pace_hz"] else 0.0
    # Not in step with anything: a robot's clock knows nothing of the simulations'.
    next_s = time.monotonic() + np.random.default_rng(id(client)).uniform(0, period_s)
    while (now_s := time.monotonic()) < until_s:
        if period_s:
            time.sleep(max(0.0, next_s - now_s))
            next_s = max(next_s + period_s, time.monotonic())
        began_s = time.monotonic()
        try:
            chunk = client.infer(obs, timeout_s=30)
        except Exception as error:
            print(repr(error), file=sys.stderr)
            into.append(None)
        else:
            into.append((time.monotonic() - began_s, chunk.stages_ns.get("infer", 0) / 1e9))


def _come_and_go(address: str, obs: MetaObs, order: dict[str, Any]) -> int:
    until_s, failed = time.monotonic() + order["seconds"], 0
    while time.monotonic() < until_s:
        try:
            with PolicyClient(address) as client:
                client.open(messages.observation_schema(obs))
                time.sleep(order["every_s"] / 2)
            time.sleep(order["every_s"] / 2)
        except Exception as error:
            print(repr(error), file=sys.stderr)
            failed += 1
    return failed


def main() -> None:
    address, count, flags = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    clients = [PolicyClient(address, **flags) for _ in range(count)]
    contract = clients[0].contract
    canned = [synthetic_observation(contract, seed) for seed in range(count)]
    for client, obs in zip(clients, canned, strict=True):
        client.infer(obs)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        got: list[Any] = []
        began_s = time.monotonic()
        if order["do"] == "come_and_go":
            got = [None] * _come_and_go(address, canned[0], order)
        else:
            threads = [
                threading.Thread(target=_ask, args=(client, obs, order, got))
                for client, obs in zip(clients, canned, strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        good = [entry for entry in got if entry is not None]
        answer = {
            "latency_s": [entry[0] for entry in good],
            "infer_s": [entry[1] for entry in good],
            "per_s": len(good) / (time.monotonic() - began_s),
            "failed": len(got) - len(good),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
