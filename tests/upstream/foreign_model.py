"""The model of the tests' foreign servers. Needs numpy only: it runs in their interpreters, too."""

import numpy as np

CHUNK, DRIVE_CHUNK = 10, 50


def toy(image: np.ndarray, state: np.ndarray) -> np.ndarray:
    """(10, A) float32: the state, the row and the picture's brightness decide, nothing else."""
    brightness = np.float32(image.mean(dtype=np.float64) / 1000)
    rows = np.arange(CHUNK, dtype=np.float32)[:, None] / 100
    return (np.asarray(state, np.float32)[None] * np.float32(0.99) + rows + brightness).astype(
        np.float32
    )


def drive(state: np.ndarray) -> np.ndarray:
    """(50, 2) float32 for ``tests.faults.base_robot``: (lift in mm, velocity in m/s)."""
    actions = np.empty((DRIVE_CHUNK, 2), np.float32)
    actions[:, 0] = state[1]
    actions[:, 1] = 0.3
    return actions
