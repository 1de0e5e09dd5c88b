"""The toy policy, slow enough for its worker and its server to be killed in an episode."""

from __future__ import annotations

import os
import time

from policies.types import ActionChunk, MetaObs
from tests.runtime.toy_policy import ToyPolicy

INFER_S = 0.1


class SlowToyPolicy(ToyPolicy):
    def infer(self, obs: MetaObs) -> ActionChunk:
        time.sleep(INFER_S)
        return super().infer(obs)

    def fork(self) -> SlowToyPolicy:
        return SlowToyPolicy()


class CrashingPolicy(ToyPolicy):
    """Ends its process in the first request of one episode, that of seed 1."""

    def __init__(self) -> None:
        super().__init__()
        self._seed = 0

    def seed(self, seed: int) -> None:
        self._seed = seed

    def infer(self, obs: MetaObs) -> ActionChunk:
        if self._seed == 1 and obs.timestep == 0:
            os._exit(1)
        return super().infer(obs)


def make() -> SlowToyPolicy:
    return SlowToyPolicy()


def make_crashing() -> CrashingPolicy:
    return CrashingPolicy()
