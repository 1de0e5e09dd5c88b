"""A policy that costs next to nothing, and says how much that is."""

from __future__ import annotations

import time

from bench.null_policy import NullPolicy
from bench.payload import PAYLOADS, Sink
from policies.types import ActionChunk, MetaObs


class TimedNullPolicy(NullPolicy):
    """Copies the observation out and answers."""

    def infer(self, obs: MetaObs) -> ActionChunk:
        began_ns = time.monotonic_ns()
        actions = self._sink.take({**obs.images, "state": obs.state})
        stages_ns = {"infer": time.monotonic_ns() - began_ns}
        return ActionChunk(actions, obs.timestep, obs.t_capture_ns, stages_ns=stages_ns)


def one_camera() -> TimedNullPolicy:
    return TimedNullPolicy(Sink(PAYLOADS["1"]))


def four_cameras() -> TimedNullPolicy:
    return TimedNullPolicy(Sink(PAYLOADS["4"]))
