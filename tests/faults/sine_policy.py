"""Policies that move a twin without looking: their actions are a sine about the start pose."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract, PolicyInfo

START = np.array((0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.1) * 2, np.float64)
AMPLITUDE = np.array((0.5, 0.1, 0.1, 0.6, 0.3, 0.8, 0.0) * 2, np.float64)
HERTZ = 0.3
STALL_S = 1.3
"""Longer than a chunk of ``Stalling``."""

CONTRACT = PolicyContract(
    policy_type="sine",
    cameras=(CameraContract("top", (48, 64), (48, 64)),),
    state_dim=14,
    action_dim=14,
    chunk_size=100,
    n_action_steps=50,
    dt_s=0.02,
)


class SinePolicy:
    """A sine from the start pose on; peak speed 1.5 rad/s, peak acceleration 2.9 rad/s²."""

    def __init__(self, contract: PolicyContract = CONTRACT) -> None:
        self.contract = contract
        self.info = PolicyInfo("sine", engine="numpy", trained=False)

    def infer(self, obs: MetaObs) -> ActionChunk:
        ticks = obs.timestep + np.arange(self.contract.chunk_size)
        phase = 2 * np.pi * HERTZ * self.contract.dt_s * ticks
        actions = START + AMPLITUDE * (1 - np.cos(phase))[:, None] / 2
        return ActionChunk(
            self.spoiled(actions.astype(np.float32), obs), obs.timestep, obs.t_capture_ns
        )

    def spoiled(self, actions: np.ndarray, obs: MetaObs) -> np.ndarray:
        return actions

    def reset(self) -> None:
        pass

    def fork(self) -> SinePolicy:
        return self

    def close(self) -> None:
        pass


def make() -> SinePolicy:
    return SinePolicy()


def make_short() -> SinePolicy:
    """Chunks of 0.6 s."""
    return SinePolicy(dataclasses.replace(CONTRACT, chunk_size=30, n_action_steps=15))


def make_whole() -> SinePolicy:
    """Plays its chunks to their ends: nothing is left over when the next one is late."""
    return SinePolicy(dataclasses.replace(CONTRACT, n_action_steps=CONTRACT.chunk_size))


def make_for_seven_joints() -> SinePolicy:
    return SinePolicy(dataclasses.replace(CONTRACT, action_dim=7))


def make_for_another_camera() -> SinePolicy:
    return SinePolicy(
        dataclasses.replace(CONTRACT, cameras=(CameraContract("wrist", (48, 64), (48, 64)),))
    )


def make_for_larger_pictures() -> SinePolicy:
    return SinePolicy(
        dataclasses.replace(CONTRACT, cameras=(CameraContract("top", (480, 640), (480, 640)),))
    )


class Reaching(SinePolicy):
    """Wants one joint far outside its limits, suddenly."""

    def spoiled(self, actions: np.ndarray, obs: MetaObs) -> np.ndarray:
        ticks = obs.timestep + np.arange(len(actions))
        actions[ticks >= 20, 0] = 9.0
        return actions


def make_reaching() -> SinePolicy:
    return Reaching()


class Broken(SinePolicy):
    """Answers NaN from the second request of a rollout on; a server would not pass that on."""

    def spoiled(self, actions: np.ndarray, obs: MetaObs) -> np.ndarray:
        if obs.timestep:
            actions[:, 3] = np.nan
        return actions


def make_broken() -> SinePolicy:
    return Broken()


class Stalling(SinePolicy):
    """Wants every joint at one place at once, and is late with every third answer of a rollout."""

    PLACE = 1.0

    def __init__(self) -> None:
        super().__init__(dataclasses.replace(CONTRACT, chunk_size=50, n_action_steps=25))
        self._asked = 0

    def infer(self, obs: MetaObs) -> ActionChunk:
        self._asked = self._asked + 1 if obs.timestep else 0
        if self._asked % 3 == 2:
            time.sleep(STALL_S)
        return super().infer(obs)

    def spoiled(self, actions: np.ndarray, obs: MetaObs) -> np.ndarray:
        actions[:] = self.PLACE
        return actions


def make_stalling() -> Stalling:
    return Stalling()
