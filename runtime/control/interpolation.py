"""Commands between two policy ticks, for a robot that takes commands faster than the policy thinks.

A control rate is an integer multiple r of the policy's: sub-tick j of tick k commands the plan at
time (k + j/r)·dt. Anything else is refused, because it would have to be rounded somewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from transport.jit import compiled, inlined

Curve = Literal["linear", "pchip"]

_HOLD, _LINEAR, _PCHIP, _SLERP, _FOLLOWS = range(5)
_NEARLY_PARALLEL = 1.0 - 1e-9
"""Cosine above which sin(angle) is too small to divide by; there slerp is linear."""


@dataclass(frozen=True, slots=True)
class Interpolation:
    """How each dimension of an action moves between two ticks.

    Attributes:
        curve: ``linear``, or ``pchip`` (Fritsch and Carlson's monotone cubic: smooth velocity,
            never beyond the two ticks' own values; it looks one tick back and two ahead).
        hold: Dimensions that step at the tick, such as grippers that open or close.
        quaternions: Groups of four dimensions that are turned along the shortest arc, at constant
            angular speed (Shoemake's slerp), component order immaterial.
    """

    curve: Curve = "linear"
    hold: tuple[int, ...] = ()
    quaternions: tuple[tuple[int, int, int, int], ...] = ()

    def kinds(self, action_dim: int) -> NDArray[np.int64]:
        """(A,) what is done with each dimension.

        Raises:
            ValueError: Unknown curve, a dimension out of range or named twice, or a group that is
                not four neighbours.
        """
        if self.curve not in get_args(Curve):
            raise ValueError(
                f"interpolation: got {self.curve!r}, expected one of {get_args(Curve)}"
            )
        kinds = np.full(action_dim, _LINEAR if self.curve == "linear" else _PCHIP, np.int64)
        taken: list[int] = [*self.hold, *(d for group in self.quaternions for d in group)]
        for dimension in taken:
            if not 0 <= dimension < action_dim:
                raise ValueError(
                    f"interpolation: got dimension {dimension}, expected 0 to {action_dim - 1}"
                )
        if len(set(taken)) != len(taken):
            raise ValueError(
                f"interpolation: got hold = {self.hold} and quaternions = {self.quaternions}, "
                "expected every dimension at most once"
            )
        for group in self.quaternions:
            if group != tuple(range(group[0], group[0] + 4)):
                raise ValueError(
                    f"interpolation: got a quaternion at {group}, expected four neighbours"
                )
            kinds[group[0] : group[0] + 4] = _FOLLOWS
            kinds[group[0]] = _SLERP
        kinds[list(self.hold)] = _HOLD
        return kinds


def control_ratio(policy_hz: float, control_hz: float) -> int:
    """r, the control rate over the policy's.

    Raises:
        ValueError: It is not a whole number of at least 1 (to within 1e-6); names both rates and
            the nearest that would do.
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


def _slope_impl(left: float, right: float) -> float:
    """Slope at a point between two secants one tick wide: their harmonic mean, 0 at an extremum.

    Fritsch and Butland (1984), equal spacing: the choice that keeps the cubic monotone.
    """
    product = left * right
    if product <= 0.0:
        return 0.0
    return 2.0 * product / (left + right)


_slope = inlined(_slope_impl)


def _pchip_impl(before: float, start: float, end: float, after: float, at: float) -> float:
    """Cubic from ``start`` to ``end`` at fraction ``at``, slopes by the neighbours."""
    secant = end - start
    first: float = _slope(start - before, secant)
    last: float = _slope(secant, after - end)
    square, cube = at * at, at * at * at
    return (
        (2.0 * cube - 3.0 * square + 1.0) * start
        + (cube - 2.0 * square + at) * first
        + (3.0 * square - 2.0 * cube) * end
        + (cube - square) * last
    )


_pchip = inlined(_pchip_impl)


def _slerp_impl(start: np.ndarray, end: np.ndarray, at: float, out: np.ndarray) -> None:
    """Four components from ``start`` to ``end``; both are normalized first."""
    start_norm = math.sqrt((start * start).sum())
    end_norm = math.sqrt((end * end).sum())
    if start_norm == 0.0 or end_norm == 0.0:  # no rotation at all: nothing to turn along
        out[:] = start
        return
    cosine = (start * end).sum() / (start_norm * end_norm)
    # q and −q are one rotation: the nearer of the two is the shorter way.
    sign = 1.0 if cosine >= 0.0 else -1.0
    cosine = min(1.0, abs(cosine))
    if cosine > _NEARLY_PARALLEL:
        from_start, from_end = 1.0 - at, at
    else:
        angle = math.acos(cosine)
        from_start = math.sin((1.0 - at) * angle) / math.sin(angle)
        from_end = math.sin(at * angle) / math.sin(angle)
    for i in range(4):
        out[i] = from_start * start[i] / start_norm + sign * from_end * end[i] / end_norm
    norm = math.sqrt((out * out).sum())
    for i in range(4):
        out[i] /= norm


_slerp = inlined(_slerp_impl)


def _interpolate_impl(points: np.ndarray, at: float, kinds: np.ndarray, out: np.ndarray) -> None:
    """Row 1 of ``points`` (4, A) at fraction 0, row 2 at 1."""
    for dimension in range(out.size):
        kind = kinds[dimension]
        start, end = points[1, dimension], points[2, dimension]
        if kind == _HOLD:
            out[dimension] = start
        elif kind == _LINEAR:
            out[dimension] = start + at * (end - start)
        elif kind == _PCHIP:
            out[dimension] = _pchip(points[0, dimension], start, end, points[3, dimension], at)
        elif kind == _SLERP:
            stop = dimension + 4
            _slerp(points[1, dimension:stop], points[2, dimension:stop], at, out[dimension:stop])


_interpolate = compiled("void(f8[:,::1], f8, i8[::1], f8[::1])")(_interpolate_impl)


class Interpolator:
    """Evaluates one action between two ticks; allocates nothing that outlives a call.

    Args:
        action_dim: A.
        how: See ``Interpolation``.

    Attributes:
        points: (4, A) float64, for the caller to fill: the plan one tick before, at the tick, one
            and two after. Outside what is planned, repeat the nearest.
    """

    def __init__(self, action_dim: int, how: Interpolation) -> None:
        self._kinds = how.kinds(action_dim)
        self.points = np.zeros((4, action_dim))
        self._value = np.zeros(action_dim)

    def at(self, fraction: float) -> NDArray[np.float64]:
        """(A,) float64 at ``fraction`` of the way from ``points[1]`` to ``points[2]``, 0 to 1.

        Exactly ``points[1]`` at 0. Valid until the next call.
        """
        if fraction == 0.0:
            self._value[:] = self.points[1]
        else:
            _interpolate(self.points, fraction, self._kinds, self._value)
        return self._value
