"""Run a policy before anybody waits for it, so that warm-up is never counted as latency."""

from __future__ import annotations

import time

import numpy as np

from policies.types import MetaObs, Policy, PolicyContract
from runtime.latency import Percentiles

MIN_REQUESTS, MAX_REQUESTS, LONG_ENOUGH_S = 3, 30, 2.0


def synthetic_observation(contract: PolicyContract, seed: int = 0) -> MetaObs:
    """An observation of the right shapes: noise for pictures, zeros for the state."""
    rng = np.random.default_rng(seed)
    return MetaObs(
        images={
            camera.name: rng.integers(0, 256, (*camera.source_hw, 3), np.uint8)
            for camera in contract.cameras
        },
        state=np.zeros(contract.state_dim, np.float32),
    )


def warm_up(policy: Policy) -> Percentiles:
    """Infer until the time per request no longer falls; the latency of the warm half, seconds.

    At least ``MIN_REQUESTS``, at most ``MAX_REQUESTS``, and no new one after ``LONG_ENOUGH_S``.
    """
    obs = synthetic_observation(policy.contract)
    began_s = time.monotonic()
    durations_s: list[float] = []
    while len(durations_s) < MAX_REQUESTS:
        if len(durations_s) >= MIN_REQUESTS and time.monotonic() - began_s > LONG_ENOUGH_S:
            break
        start_s = time.monotonic()
        policy.infer(obs)
        durations_s.append(time.monotonic() - start_s)
    policy.reset()
    return Percentiles.of(durations_s[len(durations_s) // 2 :])
