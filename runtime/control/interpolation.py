"""Commands between two policy ticks, for a control rate above the policy's.

The control rate is an integer multiple r of the policy's: control tick j of policy tick k commands
the plan at time (k + j/r)·dt. Any other rate is refused, because times would have to be rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def control_ratio(policy_hz: float, control_hz: float) -> int:
    """r, the control rate divided by the policy's.

    Raises:
        ValueError: It is not an integer of at least 1 (to within 1e-6). The message names both
            rates and the nearest valid ones.
    """
    if not (control_hz > 0 and math.isfinite(control_hz)):
        raise ValueError(f"publish rate: got {control_hz} Hz, expected a positive number")
    ratio = control_hz / policy_hz
    whole = max(1, round(ratio))
    if abs(ratio - whole) > 1e-6 * whole:
        low = max(1, math.floor(ratio))
        raise ValueError(
            f"publish rate: got {control_hz:g} Hz, expected a whole multiple of the policy's "
            f"{policy_hz:g} Hz: {low * policy_hz:g} or {(low + 1) * policy_hz:g}, for example"
        )
    return whole


class Interpolator:
    """Linear interpolation of an action between two ticks.

    A call allocates nothing that outlives it.

    Args:
        action_dim: A.
        hold: Dimensions that keep their value between ticks, such as grippers that open or close.

    Attributes:
        start, end: (A,) float64, filled by the caller: the plan at a tick and one tick later.
    """

    def __init__(self, action_dim: int, hold: Sequence[int] = ()) -> None:
        self.start, self.end = np.zeros(action_dim), np.zeros(action_dim)
        self._holds = np.zeros(action_dim, np.bool_)
        self._holds[list(hold)] = True
        self._value = np.zeros(action_dim)

    def at(self, fraction: float) -> NDArray[np.float64]:
        """(A,) float64: start + fraction·(end − start), with ``fraction`` in [0, 1].

        Exactly ``start`` at 0. Valid until the next call.
        """
        if fraction == 0.0:
            return self.start
        value = self._value
        np.subtract(self.end, self.start, out=value)
        value *= fraction
        value += self.start
        np.copyto(value, self.start, where=self._holds)
        return value
