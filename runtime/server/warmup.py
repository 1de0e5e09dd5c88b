"""Run a policy before anybody waits for it, so that warm-up is never counted as latency."""

from __future__ import annotations

import time

import numpy as np

from policies.errors import InferenceError, PolicyError
from policies.types import MetaObs, Policy, PolicyContract
from runtime.protocol import messages
from runtime.server.cost_model import InferenceCostModel
from runtime.server.model import LoadedModel
from runtime.stats import Percentiles

MIN_REQUESTS, MAX_REQUESTS, LONG_ENOUGH_S = 3, 30, 2.0
BATCHES = 4
"""Of each size, to know what it costs."""


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


def measure_costs(
    policy: Policy, single: Percentiles, max_batch: int | None = None
) -> InferenceCostModel:
    """What ``policy``, warm, takes for each batch size that it is prepared for.

    Args:
        single: As ``warm_up`` gave it.

    Raises:
        InferenceError: A batch fails.
    """
    costs = InferenceCostModel()
    for duration_s in (single.p50, single.p99):
        costs.add(1, round(duration_s * 1e9))
    model = LoadedModel.of(policy, max_batch=max_batch)
    for size in model.sizes:
        if size > 1 and model.infer_batch is not None:
            observations = [synthetic_observation(policy.contract, seed) for seed in range(size)]
            for _ in range(BATCHES):
                began_ns = time.monotonic_ns()
                for answer in model.infer_batch(observations):
                    if isinstance(answer, PolicyError):
                        raise answer
                costs.add(size, time.monotonic_ns() - began_ns)
    return costs
