"""Run a policy before anybody waits for it, so that warm-up is never counted as latency."""

from __future__ import annotations

import time

import numpy as np

from policies.errors import InferenceError, PolicyError
from policies.types import MetaObs, Policy, PolicyContract
from runtime import messages
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

    Raises:
        InferenceError: The policy fails, or does not answer what its contract says.
    """
    obs = synthetic_observation(policy.contract)
    began_s = time.monotonic()
    durations_s: list[float] = []
    while len(durations_s) < MAX_REQUESTS:
        if len(durations_s) >= MIN_REQUESTS and time.monotonic() - began_s > LONG_ENOUGH_S:
            break
        start_s = time.monotonic()
        try:
            chunk = policy.infer(obs)
        except PolicyError:
            raise
        except Exception as error:  # anyone's policy
            raise InferenceError(f"the policy failed while warming up: {error!r}") from error
        durations_s.append(time.monotonic() - start_s)
        messages.check_chunk(chunk, policy.contract)
    try:
        policy.reset()
    except Exception as error:
        raise InferenceError(f"the policy failed to reset: {error!r}") from error
    return Percentiles.of(durations_s[len(durations_s) // 2 :])
