"""Policies that cost nothing, so that what is measured is the way to them and back."""

from __future__ import annotations

import numpy as np

from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract, PolicyInfo

HEIGHT, WIDTH, DIM, CHUNK = 480, 640, 14, 100


class NullPolicy:
    """Touches every byte of the observation and answers zeros."""

    def __init__(self, cameras: int) -> None:
        hw = (HEIGHT, WIDTH)
        self.contract = PolicyContract(
            policy_type="null",
            cameras=tuple(CameraContract(f"camera{i}", hw, hw) for i in range(cameras)),
            state_dim=DIM,
            action_dim=DIM,
            chunk_size=CHUNK,
            n_action_steps=CHUNK,
        )
        self.info = PolicyInfo("null", engine="numpy", trained=False)
        self._frames = np.empty((cameras, HEIGHT, WIDTH, 3), np.uint8)

    def infer(self, obs: MetaObs) -> ActionChunk:
        for i, frame in enumerate(obs.images.values()):
            np.copyto(self._frames[i], frame)
        return ActionChunk(np.zeros((CHUNK, DIM), np.float32), obs.timestep, obs.t_capture_ns)

    def reset(self) -> None:
        pass

    def fork(self) -> NullPolicy:
        return self

    def close(self) -> None:
        pass


def one_camera() -> NullPolicy:
    return NullPolicy(1)


def four_cameras() -> NullPolicy:
    return NullPolicy(4)
