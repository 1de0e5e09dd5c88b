"""Policies for the rig: the first joint swings, or the base drives. 30 Hz."""

from __future__ import annotations

import numpy as np

from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract, PolicyInfo

FRONT = (CameraContract("front", (96, 128), (96, 128)),)
CHUNK = 30


class Swing:
    """Joint 0 to and fro by 30 units, once in three seconds; the rest stays where it is seen."""

    dim = 6
    info = PolicyInfo(checkpoint="rig", engine="numpy", trained=False)

    def __init__(self) -> None:
        self.contract = PolicyContract(
            "swing", FRONT, self.dim, self.dim, CHUNK, CHUNK // 2, dt_s=1 / 30
        )

    def infer(self, obs: MetaObs) -> ActionChunk:
        seconds = (obs.timestep + np.arange(CHUNK)) / 30
        return ActionChunk(
            self.actions(np.asarray(obs.state, np.float32), seconds).astype(np.float32),
            obs.timestep,
            obs.t_capture_ns,
        )

    def actions(self, state: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        actions = np.tile(np.append(np.zeros(self.dim - 1), 50.0), (CHUNK, 1))
        actions[:, 0] = 30 * np.sin(2 * np.pi / 3 * seconds)
        return actions

    def reset(self) -> None: ...

    def fork(self) -> Swing:
        return self

    def close(self) -> None: ...


class Drive(Swing):
    """The arm stays, the base goes forward at 0.2 m/s."""

    dim = 9

    def actions(self, state: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        actions = np.tile(np.array([0, 0, 0, 0, 0, 50, 0, 0, 0.0]), (CHUNK, 1))
        actions[:, 6] = 0.2 * np.clip(seconds, 0, 1)
        return actions


def swing() -> Swing:
    return Swing()


def drive() -> Drive:
    return Drive()
