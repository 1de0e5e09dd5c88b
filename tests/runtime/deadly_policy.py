"""Policies that kill or stop their process in the episodes of some seeds of the fake world."""

from __future__ import annotations

import os
import signal

import numpy as np

from envs.fake_world import FakeWorld
from policies.types import ActionChunk, MetaObs
from tests.runtime.toy_policy import CONTRACT, ToyPolicy

DEADLY_SEED = 3


class DeadlyPolicy(ToyPolicy):
    """Knows the episode by its first picture, which shows the target."""

    def __init__(self, deadly_signal: signal.Signals) -> None:
        super().__init__()
        world = FakeWorld(camera_hw={camera.name: camera.source_hw for camera in CONTRACT.cameras})
        world.reset(DEADLY_SEED)
        self._signal, self._picture = deadly_signal, world.observe().images["top"]

    def infer(self, obs: MetaObs) -> ActionChunk:
        if np.array_equal(obs.images["top"], self._picture):
            os.kill(os.getpid(), self._signal)
        return super().infer(obs)

    def fork(self) -> DeadlyPolicy:
        return DeadlyPolicy(self._signal)


def make_killed() -> DeadlyPolicy:
    return DeadlyPolicy(signal.SIGKILL)


def make_stopped() -> DeadlyPolicy:
    return DeadlyPolicy(signal.SIGSTOP)


def make_unborn() -> DeadlyPolicy:
    """Kill a process before it is ready."""
    os.kill(os.getpid(), signal.SIGKILL)
    return make_killed()
