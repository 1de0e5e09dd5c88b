"""A policy of this process, with everything that a rollout asks of a served one."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from policies.types import ActionChunk, MetaObs, Policy, PolicyContract, PolicyInfo
from runtime.protocol import messages
from runtime.trace import recorder as trace


class InProcessPolicy:
    """A ``RolloutPolicy`` around ``policy``, which it closes.

    A trace shows every request, as it does a served policy's.
    """

    transport = "in process"
    transport_reason = "-m is a checkpoint: no server is needed"
    pictures = "as they are"

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @property
    def contract(self) -> PolicyContract:
        return self._policy.contract

    @property
    def info(self) -> PolicyInfo:
        return self._policy.info

    @property
    def deterministic(self) -> bool:
        return messages.is_deterministic(self._policy.info)

    def loan_images(self) -> Mapping[str, NDArray[np.uint8]]:
        """None: observations are not copied on their way."""
        return {}

    def infer(self, obs: MetaObs) -> ActionChunk:
        began_ns = time.monotonic_ns()
        chunk = self._policy.infer(obs)
        if trace.on:
            trace.inferred(chunk.stages_ns, began_ns, obs.timestep)
        return chunk

    def reset(self) -> None:
        self._policy.reset()

    def fork(self) -> InProcessPolicy:
        return InProcessPolicy(self._policy.fork())

    def close(self) -> None:
        self._policy.close()
