"""A policy with two cameras, whose actions depend on the state and on both pictures."""

from __future__ import annotations

import dataclasses

import numpy as np

from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract, PolicyInfo

CHUNK, HW = 5, (120, 160)
CONTRACT = PolicyContract(
    policy_type="toy",
    cameras=(CameraContract("top", HW, HW), CameraContract("left_wrist", HW, HW)),
    state_dim=14,
    action_dim=14,
    chunk_size=CHUNK,
    n_action_steps=CHUNK,
    dt_s=0.02,
    action_names=tuple(f"joint_{index}" for index in range(14)),
)


class TwoCameraPolicy:
    contract, info = CONTRACT, PolicyInfo("toy", engine="numpy", trained=False)

    def infer(self, obs: MetaObs) -> ActionChunk:
        light = sum(float(image.mean(dtype=np.float64)) for image in obs.images.values())
        steps = np.arange(1, CHUNK + 1, dtype=np.float32)[:, None]
        actions = obs.state + 0.01 * steps * np.float32(np.sin(light + obs.timestep))
        return ActionChunk(actions.astype(np.float32), obs.timestep, obs.t_capture_ns)

    def reset(self) -> None:
        pass

    def fork(self) -> TwoCameraPolicy:
        return self

    def close(self) -> None:
        pass


class TwoTickPolicy(TwoCameraPolicy):
    """Goes on from the newest state, by how it and the pictures differ from the tick before."""

    contract = dataclasses.replace(CONTRACT, n_obs_steps=2)

    def infer(self, obs: MetaObs) -> ActionChunk:
        light = sum(float(np.diff(image.mean((1, 2, 3)))[0]) for image in obs.images.values())
        steps = np.arange(1, CHUNK + 1, dtype=np.float32)[:, None]
        moved = obs.state[-1] - obs.state[0] + np.float32(np.sin(light + obs.timestep))
        actions = obs.state[-1] + 0.01 * steps * moved
        return ActionChunk(actions.astype(np.float32), obs.timestep, obs.t_capture_ns)


def make() -> TwoCameraPolicy:
    return TwoCameraPolicy()


def make_of_two_ticks() -> TwoTickPolicy:
    return TwoTickPolicy()
