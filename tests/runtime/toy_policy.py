"""A policy small enough to predict, with an episode state of its own."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time

import numpy as np

from policies.errors import ObservationError
from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract, PolicyInfo

STATE_DIM, ACTION_DIM, CHUNK = 14, 14, 10

CONTRACT = PolicyContract(
    policy_type="toy",
    cameras=(CameraContract("top", (24, 32), (24, 32)),),
    state_dim=STATE_DIM,
    action_dim=ACTION_DIM,
    chunk_size=CHUNK,
    n_action_steps=CHUNK,
    dt_s=0.02,
)


class ToyPolicy:
    """Action i is state + i + mean of the picture / 1000; element 0 is how often it was asked."""

    def __init__(self, gate: threading.Semaphore | None = None) -> None:
        self.contract = CONTRACT
        self.info = PolicyInfo("toy", engine="numpy", trained=False)
        self.asked = 0
        self.entered = threading.Semaphore(0)
        self._gate = gate

    def infer(self, obs: MetaObs) -> ActionChunk:
        self.entered.release()
        if self._gate is not None:
            self._gate.acquire()
        if not np.isfinite(obs.state).all():
            raise ObservationError("state: got NaN or infinity, expected finite numbers")
        if obs.state[0] == 666:
            raise RuntimeError("a bug in the policy")
        self.asked += 1
        brightness = np.float32(obs.images["top"].mean(dtype=np.float64) / 1000)
        actions = obs.state[None] + np.arange(CHUNK, dtype=np.float32)[:, None] + brightness
        actions[:, 0] = self.asked
        return ActionChunk(
            actions.astype(np.float32),
            obs.timestep,
            obs.t_capture_ns,
            stages_ns={"preprocess": 1, "infer": 2, "postprocess": 3},
        )

    def reset(self) -> None:
        self.asked = 0

    def fork(self) -> ToyPolicy:
        fork = ToyPolicy(self._gate)
        fork.entered = self.entered
        return fork

    def close(self) -> None:
        pass


def make() -> ToyPolicy:
    return ToyPolicy()


def make_named() -> ToyPolicy:
    policy = ToyPolicy()
    policy.info = dataclasses.replace(policy.info, checkpoint="another toy")
    return policy


class MortalPolicy(ToyPolicy):
    """Takes its whole process with it at the ninth request after its own warm-up."""

    LIFE = 9

    def infer(self, obs: MetaObs) -> ActionChunk:
        if obs.t_capture_ns:  # a warm-up has none
            MortalPolicy.LIFE -= 1
            if MortalPolicy.LIFE == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().infer(obs)

    def fork(self) -> MortalPolicy:
        return MortalPolicy()


def make_mortal() -> MortalPolicy:
    return MortalPolicy()


class LeavingPolicy(ToyPolicy):
    """Leaves once its tenth answer after the warm-up is on its way."""

    ANSWERS = 10

    def infer(self, obs: MetaObs) -> ActionChunk:
        chunk = super().infer(obs)
        if obs.t_capture_ns:
            LeavingPolicy.ANSWERS -= 1
            if LeavingPolicy.ANSWERS == -1:  # the evaluation's own warm-up comes first
                os.kill(os.getpid(), signal.SIGTERM)
        return chunk

    def fork(self) -> LeavingPolicy:
        return LeavingPolicy()


def make_leaving() -> LeavingPolicy:
    return LeavingPolicy()


class SlowPolicy(ToyPolicy):
    """An inference takes at least a fifth of a second."""

    LEAST_S = 0.2

    def infer(self, obs: MetaObs) -> ActionChunk:
        time.sleep(self.LEAST_S)
        return super().infer(obs)

    def fork(self) -> SlowPolicy:
        return SlowPolicy()


def make_slow() -> SlowPolicy:
    return SlowPolicy()


class CartPolePolicy(ToyPolicy):
    """Always the same push; fits gymnasium's CartPole, which needs no picture."""

    def __init__(self) -> None:
        super().__init__()
        self.contract = dataclasses.replace(CONTRACT, cameras=(), state_dim=4, action_dim=2)

    def infer(self, obs: MetaObs) -> ActionChunk:
        push = np.tile(np.array([0, 1], np.float32), (CHUNK, 1))
        return ActionChunk(push, obs.timestep, obs.t_capture_ns)

    def fork(self) -> CartPolePolicy:
        return self


def make_cart_pole() -> CartPolePolicy:
    return CartPolePolicy()


class WithoutFork:
    """Somebody's policy with a state that cannot be shared out."""

    def __init__(self) -> None:
        inner = ToyPolicy()
        self.contract, self.info = inner.contract, inner.info
        self.infer, self.reset, self.close = inner.infer, inner.reset, inner.close


def make_without_fork() -> WithoutFork:
    return WithoutFork()


def observation(value: float = 0.0, *, timestep: int = 0, shade: int = 100) -> MetaObs:
    return MetaObs(
        images={"top": np.full((24, 32, 3), shade, np.uint8)},
        state=np.full(STATE_DIM, value, np.float32),
        timestep=timestep,
        t_capture_ns=12345 + timestep,
    )
