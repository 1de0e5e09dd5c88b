"""Warm a policy up and measure its inference durations before the first client connects."""

from __future__ import annotations

import time

import numpy as np

from policies.errors import DeviceLost, InferenceError, PolicyError
from policies.types import MetaObs, Policy, PolicyContract
from runtime.latency_stats import Percentiles
from runtime.protocol import messages
from runtime.server.cost_model import InferenceCostModel
from runtime.server.loaded_model import LoadedModel

MIN_REQUESTS, MAX_REQUESTS, MAX_WARMUP_S = 3, 30, 2.0
BATCH_REPETITIONS = 4
"""How often each batch size is measured."""


def synthetic_observation(contract: PolicyContract, seed: int = 0) -> MetaObs:
    """An observation of a contract's shapes: noise as images, zeros as state."""
    rng, axes = np.random.default_rng(seed), contract.obs_axes
    return MetaObs(
        images={
            camera.name: rng.integers(0, 256, (*axes, *camera.source_hw, 3), np.uint8)
            for camera in contract.cameras
        },
        state=np.zeros((*axes, contract.state_dim), np.float32),
    )


def warm_up(policy: Policy) -> Percentiles:
    """Infer repeatedly, then reset the policy; return the latency of the second half, seconds.

    Between ``MIN_REQUESTS`` and ``MAX_REQUESTS`` inferences; none starts after ``MAX_WARMUP_S``,
    except the first ``MIN_REQUESTS``.

    Raises:
        InferenceError: The policy fails, or returns something else than its contract says;
            ``DeviceLost`` if its device is lost.
    """
    obs = synthetic_observation(policy.contract)
    began_s = time.monotonic()
    durations_s: list[float] = []
    while len(durations_s) < MAX_REQUESTS:
        if len(durations_s) >= MIN_REQUESTS and time.monotonic() - began_s > MAX_WARMUP_S:
            break
        start_s = time.monotonic()
        try:
            chunk = policy.infer(obs)
        except PolicyError:
            raise
        except Exception as error:  # third-party code
            raise InferenceError(f"the policy failed while warming up: {error!r}") from error
        durations_s.append(time.monotonic() - start_s)
        messages.check_chunk(chunk, policy.contract)
    try:
        policy.reset()
    except DeviceLost:
        raise
    except Exception as error:
        raise InferenceError(f"the policy failed to reset: {error!r}") from error
    return Percentiles.of(durations_s[len(durations_s) // 2 :])


def measure_costs(
    policy: Policy, single: Percentiles, max_batch: int | None = None
) -> InferenceCostModel:
    """Measure a warm policy's inference duration for each batch size that it is prepared for.

    Args:
        single: The result of ``warm_up``, for batch size 1.
        max_batch: As ``PolicyServer``.

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
            for _ in range(BATCH_REPETITIONS):
                began_ns = time.monotonic_ns()
                for result in model.infer_batch(observations):
                    if isinstance(result, PolicyError):
                        raise result
                costs.add(size, time.monotonic_ns() - began_ns)
    return costs
