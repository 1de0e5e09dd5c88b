"""A policy without episode state that computes batches, and can be held in the middle of one."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from policies.errors import ObservationError, PolicyError
from policies.types import ActionChunk, MetaObs, PolicyInfo
from tests.runtime.toy_policy import CHUNK, CONTRACT


class BatchPolicy:
    """Every action is the state, plus ``shift``; ``done`` has the states of every inference."""

    batch_sizes = (1, 2, 4)
    batch_is_exact = True

    def __init__(self, *, shift: float = 0.0, gate: threading.Semaphore | None = None) -> None:
        self.contract = CONTRACT
        self.info = PolicyInfo(f"batch {shift:g}", engine="numpy", trained=False)
        self.shift, self.closed = shift, 0
        self.done: list[list[float]] = []
        self.entered = threading.Semaphore(0)
        self._gate = gate

    def infer(self, obs: MetaObs) -> ActionChunk:
        (answer,) = self.infer_batch([obs])
        if isinstance(answer, PolicyError):
            raise answer
        return answer

    def infer_batch(self, observations: Sequence[MetaObs]) -> list[ActionChunk | PolicyError]:
        assert self.closed == 0
        self.entered.release()
        if self._gate is not None:
            self._gate.acquire()
        self.done.append([float(obs.state[0]) for obs in observations])
        return [self._one(obs) for obs in observations]

    def _one(self, obs: MetaObs) -> ActionChunk | PolicyError:
        if not np.isfinite(obs.state).all():
            return ObservationError("state: got NaN or infinity, expected finite numbers")
        actions = np.tile(obs.state + np.float32(self.shift), (CHUNK, 1))
        return ActionChunk(actions, obs.timestep, obs.t_capture_ns)

    def reset(self) -> None:
        pass

    def fork(self) -> BatchPolicy:
        return self

    def close(self) -> None:
        self.closed += 1


def make() -> BatchPolicy:
    return BatchPolicy()
