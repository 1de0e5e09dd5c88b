"""The arithmetic of ``robots.motion_limiter``, per joint, compiled by numba.

h is the control period, a the acceleration limit, u = a·h the change of speed allowed per command.
Braking from speed v covers D(v) = h·Σ_{i>=0} max(0, v − i·u), the first term being the command
itself. Its inverse, the discrete sqrt(2·a·d), bounds the speed towards a limit at distance d:
with n the least integer for which h·u·n·(n+1)/2 >= d, it is d/(n·h) + u·(n−1)/2. Because
D(v − u) = D(v) − h·v, a joint at the bound stays at the bound by braking, so the three limits never
contradict each other. The continuous sqrt(2·a·d) was rejected: it overshoots the limit by up to
half a period of travel.

A joint that is commanded by velocity has no position here: its command is v itself, kept within its
bounds and within u of the previous command. At rest it is zero.
"""

from __future__ import annotations

import math

import numpy as np

from transport.jit import compiled, inlined

POSITION, VELOCITY, ACCELERATION = 0, 1, 2
"""Rows of the clamp counts."""
ROUNDING = 1e-9
"""Relative tolerance; far above the rounding of float64, far below what a robot could resolve."""


def _stop_speed_impl(distance: float, quantum: float, period: float) -> float:
    """Highest speed from which braking, including this command, covers at most ``distance``."""
    if distance <= 0.0:
        return 0.0
    reach = quantum * period
    if distance <= reach or math.isinf(distance):
        return distance / period
    steps = math.ceil((math.sqrt(1.0 + 8.0 * distance / reach) - 1.0) / 2.0)
    return distance / (steps * period) + 0.5 * quantum * (steps - 1.0)


_stop_speed = inlined(_stop_speed_impl)


def _send_impl(position: float, lower: float, upper: float, inside: np.ndarray) -> float:
    """``position`` as float32, inside the limits if the float64 is."""
    sent = np.float32(position)
    if position <= upper and sent > inside[1]:
        sent = inside[1]
    if position >= lower and sent < inside[0]:
        sent = inside[0]
    return sent  # type: ignore[return-value]


_send = inlined(_send_impl)


def _limit_impl(  # noqa: PLR0917 - numba takes arrays, not objects
    target: np.ndarray,
    bounds: np.ndarray,
    inside: np.ndarray,
    by_velocity: np.ndarray,
    period: float,
    state: np.ndarray,
    sent: np.ndarray,
    counts: np.ndarray,
) -> int:
    """Compute one command. Returns 0: equal to ``target``; 1: changed; −1−j: joint j of ``target``
    is NaN or infinity, and nothing was changed."""
    for joint in range(target.size):
        if not math.isfinite(target[joint]):
            return -1 - joint
    changed = 0
    for joint in range(target.size):
        lower, upper, fastest, quantum = bounds[joint]
        position, velocity, aim = state[joint]
        goal = min(max(target[joint], lower), upper)
        if by_velocity[joint]:
            speed = goal
            if goal != target[joint]:
                counts[VELOCITY, joint] += 1
                changed = 1
            if abs(speed - velocity) > quantum:
                speed = velocity + math.copysign(quantum, speed - velocity)
                counts[ACCELERATION, joint] += 1
                changed = 1
            state[joint, 0], state[joint, 1], state[joint, 2] = speed, speed, goal
            sent[joint] = _send(speed, lower, upper, inside[joint])
            continue
        if goal != target[joint]:
            counts[POSITION, joint] += 1
            changed = 1

        # Keep the target's own speed, and close the gap at a speed from which it can brake.
        lag = aim - position
        closing = _stop_speed(abs(lag), quantum, period)
        wanted = (goal - position) / period
        speed = wanted
        catching_up = abs(lag) > quantum * period
        if catching_up:
            speed = (goal - aim) / period + math.copysign(closing, lag)
        if abs(speed) > fastest:
            speed = math.copysign(fastest, speed)
            counts[VELOCITY, joint] += 1
        too_hard = abs(speed - velocity) > quantum
        if too_hard:
            speed = velocity + math.copysign(quantum, speed - velocity)
        if catching_up or too_hard:
            counts[ACCELERATION, joint] += 1
        # Last, so that it takes precedence where rounding makes the limits contradict each other.
        ahead = upper - position if speed > 0.0 else position - lower
        can_stop = _stop_speed(ahead, quantum, period)
        if abs(speed) > can_stop:
            speed = math.copysign(can_stop, speed)
            counts[POSITION, joint] += 1

        if speed == wanted:
            position = goal
        else:
            changed = 1
            # Rounding must not move a joint past the limit that it was about to reach.
            inner = position >= lower and position <= upper
            position += speed * period
            if inner:
                position = min(max(position, lower), upper)
        state[joint, 0], state[joint, 1], state[joint, 2] = position, speed, goal
        sent[joint] = _send(position, lower, upper, inside[joint])
    return changed


def _brake_impl(  # noqa: PLR0917 - numba takes arrays, not objects
    bounds: np.ndarray,
    inside: np.ndarray,
    by_velocity: np.ndarray,
    period: float,
    state: np.ndarray,
    sent: np.ndarray,
) -> int:
    """Compute one command of the shortest stop. Returns 1 once every joint is at rest, else 0."""
    rested = 1
    for joint in range(sent.size):
        lower, upper, _, quantum = bounds[joint]
        position, velocity, _ = state[joint]
        speed = abs(velocity) - quantum
        if speed <= ROUNDING * quantum:  # what rounding left of a multiple of u
            speed = 0.0
        if by_velocity[joint]:
            speed = math.copysign(speed, velocity) if speed > 0.0 else 0.0
            if speed != 0.0:
                rested = 0
            state[joint, 0], state[joint, 1], state[joint, 2] = speed, speed, 0.0
            sent[joint] = _send(speed, lower, upper, inside[joint])
            continue
        # Only needed for a state that MotionLimiter did not produce; there the position limit takes
        # precedence over the acceleration limit.
        ahead = upper - position if velocity > 0.0 else position - lower
        speed = math.copysign(min(speed, max(0.0, ahead) / period), velocity)
        position += speed * period
        if ahead > 0.0:
            position = min(max(position, lower), upper)
        if speed != 0.0:
            rested = 0
        state[joint, 0], state[joint, 1], state[joint, 2] = position, speed, position
        sent[joint] = _send(position, lower, upper, inside[joint])
    return rested


limit = compiled("i8(f8[::1], f8[:,::1], f4[:,::1], b1[::1], f8, f8[:,::1], f4[::1], i8[:,::1])")(
    _limit_impl
)
brake = compiled("i8(f8[:,::1], f4[:,::1], b1[::1], f8, f8[:,::1], f4[::1])")(_brake_impl)
