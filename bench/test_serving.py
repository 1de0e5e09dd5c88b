"""What serving a policy costs: ``infer`` in process, over shared memory and over ZMQ.

The ways alternate in blocks within one run on the same cores, so their ratios mean something where
the times do not. Every row is the public API with Python on both sides: the client's pictures are
copied into the message, the policy copies them out.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from bench.records import Records
from bench.ways import ways
from policies.types import Policy
from runtime.options.defaults import DEFAULT_CHECKPOINT
from runtime.server.warmup import synthetic_observation

BLOCKS, WARMUP = 10, 10
MODELS = {
    "null policy, 1 x 480x640": ("python:bench.null_policy:one_camera", 100),
    "null policy, 4 x 480x640": ("python:bench.null_policy:four_cameras", 50),
    "the example checkpoint": (DEFAULT_CHECKPOINT, 20),
}


def timed(policy: Policy, rounds: int) -> list[float]:
    """Microseconds of ``rounds`` requests after a few that are not counted."""
    obs = synthetic_observation(policy.contract)
    samples = []
    for number in range(WARMUP + rounds):
        began_ns = time.perf_counter_ns()
        policy.infer(obs)
        if number >= WARMUP:
            samples.append((time.perf_counter_ns() - began_ns) / 1e3)
    return samples


@pytest.mark.parametrize("name", MODELS)
def test_infer(name: str, benchmark, records: Records) -> None:
    model, rounds = MODELS[name]
    if "/" in model and not Path(model).exists():
        pytest.skip(f"{model} is not here")
    samples: dict[str, list[float]] = {}
    with ways(model) as policies:

        def block() -> None:
            for way, policy in policies.items():
                samples.setdefault(way, []).extend(timed(policy, rounds))

        benchmark.pedantic(block, rounds=BLOCKS)
    group = f"infer, {name}"
    records.add(group, {way: np.array(values) for way, values in samples.items()})
    records.save("serving", group)
