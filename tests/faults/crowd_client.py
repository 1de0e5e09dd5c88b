"""One of a crowd: asks, checks every answer, and says at the end what it found, as JSON.

``python tests/faults/crowd_client.py HOST:PORT NUMBER REQUESTS TRANSPORT`` against a server of
``crowd_policy``. What it asks is nobody else's question, so an answer that was mixed up shows.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter

import numpy as np

from policies.types import MetaObs
from runtime.client import PolicyClient
from tests.faults.crowd_policy import HW, STATE_DIM, expected


def main() -> None:
    address, number, requests, transport = sys.argv[1:5]
    chance = random.Random(int(number))
    found: Counter[str] = Counter()
    with PolicyClient(address, transport=transport, name=f"crowd {number}", timeout_s=60) as client:
        pictures = {"top": np.full((*HW, 3), int(number) % 251, np.uint8)}
        print("ready", flush=True)  # noqa: T201
        for index in range(int(requests)):
            state = np.full(STATE_DIM, int(number) * 10_000 + index, np.float32)
            obs = MetaObs(pictures, state, timestep=index, t_capture_ns=time.monotonic_ns())
            try:
                chunk = client.infer(obs, timeout_s=60)
            except Exception as error:
                found["errors"] += 1
                print(repr(error), file=sys.stderr, flush=True)  # noqa: T201
                continue
            right = np.array_equal(chunk.actions, expected(obs)) and chunk.obs_timestep == index
            found["right" if right else "wrong"] += 1
            if chance.random() < 0.1:
                time.sleep(chance.uniform(0, 0.02))
            if chance.random() < 0.01:
                client.reset()
    print(json.dumps(found), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
