"""Policies for two numbers: the first one is driven, the other stays."""

from __future__ import annotations

import numpy as np

from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract, PolicyInfo


class Drive:
    """``speed`` or a position that grows with it."""

    contract = PolicyContract(
        policy_type="drive",
        cameras=(CameraContract("top", (48, 64), (48, 64)),),
        state_dim=2,
        action_dim=2,
        chunk_size=50,
        n_action_steps=25,
        dt_s=0.02,
    )
    info = PolicyInfo("drive", engine="numpy", trained=False)

    def __init__(self, *, by_velocity: bool) -> None:
        self.by_velocity = by_velocity

    def infer(self, obs: MetaObs) -> ActionChunk:
        ticks = obs.timestep + np.arange(self.contract.chunk_size)
        actions = np.zeros((len(ticks), 2), np.float32)
        actions[:, 0] = 0.3 if self.by_velocity else 0.3 * self.contract.dt_s * ticks
        return ActionChunk(actions, obs.timestep, obs.t_capture_ns)

    def reset(self) -> None:
        pass

    def fork(self) -> Drive:
        return self

    def close(self) -> None:
        pass


def make_velocity() -> Drive:
    return Drive(by_velocity=True)


def make_position() -> Drive:
    return Drive(by_velocity=False)
