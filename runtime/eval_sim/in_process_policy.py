"""A policy in this process, behind the interface of a served one."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from policies.errors import DeviceLost
from policies.types import (
    ActionChunk,
    MetaObs,
    Policy,
    PolicyContract,
    PolicyInfo,
    SamplingPolicy,
)
from policies.weights_hash import info_with_hash
from runtime.protocol import messages
from runtime.trace import recorder as trace


class InProcessPolicy:
    """A ``RolloutPolicy`` that runs ``policy`` in this process, and owns it.

    Each inference is traced, as a request to a server is.

    Args:
        policy: The policy.
        upstream: Whether another system's server computes it.
    """

    transport = "in process"
    pictures = "as they are"

    def __init__(self, policy: Policy, *, upstream: bool = False) -> None:
        self._policy, self._upstream, self._lost = policy, upstream, False

    @property
    def transport_reason(self) -> str:
        """Why there is no server of ours."""
        what = "another system's server" if self._upstream else "a checkpoint"
        return f"-m is {what}: no server {'of ours ' if self._upstream else ''}is needed"

    @property
    def contract(self) -> PolicyContract:
        """The wrapped policy's contract."""
        return self._policy.contract

    @property
    def info(self) -> PolicyInfo:
        """The wrapped policy's checkpoint, device, engine, precision and hash."""
        return info_with_hash(self._policy)

    @property
    def deterministic(self) -> bool:
        """Whether equal observations since a reset with the same seed give equal chunks, bit for
        bit."""
        return messages.is_deterministic(self._policy.info)

    def loan_images(self) -> Mapping[str, NDArray[np.uint8]]:
        """Return no buffers: observations are passed without a copy."""
        return {}

    def infer(self, obs: MetaObs) -> ActionChunk:
        """Compute a chunk for ``obs``.

        Raises:
            DeviceLost: No later inference in this process can succeed.
            PolicyError: The inference failed.
        """
        began_ns = time.monotonic_ns()
        try:
            chunk = self._policy.infer(obs)
        except DeviceLost as error:
            self._lost = True
            raise DeviceLost(f"this process has lost the policy's device: {error}") from error
        if trace.on:
            trace.add_inference(chunk.stages_ns, began_ns, obs.timestep)
        return chunk

    def reset(self, seed: int | None = None) -> None:
        """Start a new episode, with ``seed`` for a policy that draws random numbers."""
        self._policy.reset()
        if seed is not None and isinstance(self._policy, SamplingPolicy):
            self._policy.seed(seed)

    def fork(self) -> InProcessPolicy:
        """Return a policy with its own episode state that shares the weights."""
        return InProcessPolicy(self._policy.fork(), upstream=self._upstream)

    def close(self) -> None:
        """Close the wrapped policy, unless its device is lost: that could fail or hang."""
        if not self._lost:
            self._policy.close()
