"""How smooth a commanded path is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rms_jerk(path: NDArray[np.floating], dt_s: float) -> float | None:
    """Return the root mean square of a path's third derivative, in its unit per s³.

    The derivative is the third difference of consecutive commands divided by ``dt_s``³; the mean is
    over all joints and ticks. None for fewer than four commands.

    Args:
        path: (n, A) one command per tick.
        dt_s: Seconds per tick.
    """
    if len(path) < 4:
        return None
    third = np.diff(path.astype(np.float64), n=3, axis=0)
    return float(np.sqrt(np.mean(third**2))) / dt_s**3
