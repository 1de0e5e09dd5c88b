"""Policies that lose their device, and cannot be closed or freed afterwards."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from policies.errors import DeviceLost, PolicyError
from policies.types import ActionChunk, MetaObs
from runtime.server import cli
from tests.runtime.batch_policy import BatchPolicy

REASON = "CUDA error: an illegal memory access was encountered"
HANGS_S = 60.0
LOSES = 13
"""The first number of the state at which the device is lost."""


class LostPolicy(BatchPolicy):
    """Loses its device at the observation ``LOSES``, or after ``life`` inferences of no warm-up.

    Args:
        returns: Whether a batch gets the error as the result of one observation, not as its own.
    """

    def __init__(self, life: int = 10**9, *, returns: bool = False, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.life, self.returns, self.lost = life, returns, False

    def infer(self, obs: MetaObs) -> ActionChunk:
        self.life -= obs.t_capture_ns != 0
        self.lost = self.lost or self.life < 0 or obs.state[0] == LOSES
        if self.lost:
            raise DeviceLost(f"{REASON}\nCUDA kernel errors might be reported later")
        return super().infer(obs)

    def infer_batch(self, observations: Sequence[MetaObs]) -> list[ActionChunk | PolicyError]:
        results = super().infer_batch(observations)
        for index, obs in enumerate(observations):
            if obs.state[0] == LOSES:
                self.lost = True
                results[index] = DeviceLost(REASON)
        if self.lost and not self.returns:
            raise DeviceLost(REASON)
        return results

    def close(self) -> None:
        if self.lost:
            raise RuntimeError("closed on a lost device")
        super().close()


class HangingPolicy(LostPolicy):
    """Closing it, or freeing it, takes longer than anybody waits."""

    def close(self) -> None:
        if self.lost:
            time.sleep(HANGS_S)

    def __del__(self) -> None:
        if self.lost:
            os.write(2, b"a destructor was run\n")
            time.sleep(HANGS_S)


def make() -> HangingPolicy:
    """Lost after three inferences."""
    return HangingPolicy(3)


def make_short() -> LostPolicy:
    """Lost in the third episode of a short evaluation: a first inference, then three in each."""
    return LostPolicy(8)


def make_lost_in_warm_up() -> HangingPolicy:
    """Lost before the server listens."""
    policy = HangingPolicy()
    policy.life = -1
    return policy


def make_in_a_stuck_process() -> HangingPolicy:
    """As ``make``; what the process does after its server has ended hangs, too."""

    def hang(_: object) -> None:
        sys.stderr.write("the shutdown hangs\n")
        sys.stderr.flush()
        time.sleep(HANGS_S)

    cli.AdminToken.close = hang  # type: ignore[method-assign]
    return HangingPolicy(3)
