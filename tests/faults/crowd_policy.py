"""A policy whose every answer says which observation it is for; takes half a millisecond."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract, PolicyInfo

STATE_DIM, ACTION_DIM, CHUNK, HW = 14, 14, 10, (48, 64)
COST_S = 0.0005
CONTRACT = PolicyContract(
    policy_type="crowd",
    cameras=(CameraContract("top", HW, HW),),
    state_dim=STATE_DIM,
    action_dim=ACTION_DIM,
    chunk_size=CHUNK,
    n_action_steps=CHUNK,
    dt_s=0.02,
)


def expected(obs: MetaObs) -> NDArray[np.float32]:
    """The actions for ``obs``: (CHUNK, ACTION_DIM) float32, exact."""
    shade = np.float32(obs.images["top"][0, 0, 0]) + np.float32(obs.images["top"][-1, -1, -1])
    return (obs.state[None] + shade + np.arange(CHUNK, dtype=np.float32)[:, None]).astype(
        np.float32
    )


class CrowdPolicy:
    """Computes batches of up to eight, which cost as much as one."""

    batch_sizes = (1, 2, 4, 8)
    batch_is_exact = True

    def __init__(self, contract: PolicyContract = CONTRACT) -> None:
        self.contract = contract
        self.info = PolicyInfo("crowd", engine="numpy", trained=False)

    def infer(self, obs: MetaObs) -> ActionChunk:
        return self.infer_batch([obs])[0]

    def infer_batch(self, observations: Sequence[MetaObs]) -> list[ActionChunk]:
        time.sleep(COST_S)
        return [ActionChunk(expected(o), o.timestep, o.t_capture_ns) for o in observations]

    def reset(self) -> None:
        pass

    def fork(self) -> CrowdPolicy:
        return self

    def close(self) -> None:
        pass


def make() -> CrowdPolicy:
    return CrowdPolicy()


def make_for_a_camera() -> CrowdPolicy:
    """With pictures of a usual size, which the model wants smaller."""
    camera = CameraContract("top", (240, 320), (120, 160), resize="bilinear")
    return CrowdPolicy(dataclasses.replace(CONTRACT, cameras=(camera,)))
