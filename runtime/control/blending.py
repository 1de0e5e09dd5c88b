"""Strategies that combine overlapping chunks into one action per tick, by name.

A strategy defines when the next chunk is requested (``stride``), and how its action for a tick is
combined with the action already planned for it (``blend``, a pure function over whole arrays).

Re-planning every tick with blending is never a default: on the same checkpoint its success rate has
ranged from better to 0 %. So the user or the checkpoint must select it by name, and its effect is
reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.execution import ILSTUDIO_NAMES, STRATEGIES, check_strategy

__all__ = ["ILSTUDIO_NAMES", "STRATEGIES", "Strategy", "make_strategy"]

Blend = Callable[[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], float], None]
"""(planned (n, A), new (n, A), count (n,), coefficient): combine ``new`` into ``planned`` in place.

``count`` is the number of chunks that have contributed to each tick so far. Where it is 0,
``planned`` is undefined.
"""


def replace(
    planned: NDArray[np.float64],
    new: NDArray[np.float64],
    count: NDArray[np.int64],
    coefficient: float,
) -> None:
    """Replace the plan by the new chunk."""
    planned[:] = new


def ensemble(
    planned: NDArray[np.float64],
    new: NDArray[np.float64],
    count: NDArray[np.int64],
    coefficient: float,
) -> None:
    """Weighted mean with w_i = exp(-m·i), i the chunk's rank by age, 0 the oldest (ACT).

    A negative m favours the newest.

    Computed as a running mean: after i contributions the planned value has the total weight
    W_i = Σ_{j<i} exp(-m·j), so planned += (new − planned)·w_i / (W_i + w_i).
    """
    # m = 0: plain mean. Otherwise the geometric sum in closed form, so that no sum is stored.
    if coefficient == 0.0:
        share = 1.0 / (count + 1.0)
    elif coefficient < 0.0:  # the same share, with terms that cannot overflow
        share = np.expm1(coefficient) / np.expm1(coefficient * (count + 1.0))
    else:
        share = np.expm1(-coefficient) * np.exp(-coefficient * count)
        share /= np.expm1(-coefficient * (count + 1.0))
    np.copyto(planned, new, where=(count == 0)[:, None])
    planned += (new - planned) * share[:, None]


def overlap(
    planned: NDArray[np.float64],
    new: NDArray[np.float64],
    count: NDArray[np.int64],
    coefficient: float,
) -> None:
    """(1 − c)·new + c·planned where both exist; elsewhere the new."""
    np.copyto(planned, new, where=(count == 0)[:, None])
    planned += (1.0 - coefficient) * (new - planned)


def crossfade(
    planned: NDArray[np.float64],
    new: NDArray[np.float64],
    count: NDArray[np.int64],
    coefficient: float,
) -> None:
    """Fade from the planned to the new over the first ``coefficient`` ticks, where both exist."""
    np.copyto(planned, new, where=(count == 0)[:, None])
    planned += fade_in(len(new), coefficient)[:, None] * (new - planned)


def align(planned: NDArray[np.float64], before: NDArray[np.floating], fade: float) -> None:
    """Shift the plan, in place, so that it continues from ``before``, and fade the shift out.

    The offset is ``before`` minus the plan extrapolated to the tick before, by its first step. So
    the motion continues from ``before`` at the plan's own speed.

    Args:
        planned: (n, A) the plan from the first tick after ``before`` on.
        before: (A,) the action of the tick before.
        fade: Ticks until the offset is 0; at most n are used.
    """
    step = planned[1] - planned[0] if len(planned) > 1 else 0.0
    offset = before - (planned[0] - step)
    planned += (1.0 - fade_in(len(planned), min(fade, len(planned))))[:, None] * offset


def fade_in(length: int, ticks: float) -> NDArray[np.float64]:
    """(length,) weights from above 0 to 1 at index ``ticks``: smoothstep, flat at both ends."""
    x = np.minimum(1.0, np.arange(1, length + 1) / (ticks + 1.0))
    return x * x * (3.0 - 2.0 * x)


@dataclass(frozen=True, slots=True)
class Strategy:
    """When chunks are requested, and how they are combined.

    Attributes:
        name: As the user gave it.
        blend: Combines a new chunk with the plan.
        stride: Ticks from one requested observation to the next.
        coefficient: m of ``ensemble``, c of ``overlap``, ticks of ``crossfade`` and ``align``;
            unused by ``replace``.
        windowed: The next chunk takes over only after ``stride`` ticks of this one were played.
        step_s: Seconds between a chunk's actions; None for the contract's dt.
        aligned: Every new chunk is shifted with ``align``.
    """

    name: str
    blend: Blend
    stride: int
    coefficient: float = 0.0
    windowed: bool = False
    step_s: float | None = None
    aligned: bool = False


DEFAULT_FADE_TICKS = 10.0
"""0.2 s at 50 Hz: long against a joint's response, short against a chunk."""


def make_strategy(
    name: str,
    *,
    chunk_size: int,
    n_action_steps: int,
    stride: int | None = None,
    coefficient: float | None = None,
) -> Strategy:
    """The strategy called ``name``.

    Args:
        name: One of ``STRATEGIES``, or of ILStudio's ``ILSTUDIO_NAMES`` with the meaning they
            intend.
        chunk_size: Actions per chunk, T.
        n_action_steps: The contract's; ``sequential``'s stride unless ``stride`` is given.
        stride: Ticks between re-plannings; the blending strategies default to 1.
        coefficient: m for ``temporal_ensemble`` (default 0.01), ticks for ``crossfade`` and
            ``align_fade`` (default 10), c for the others (see each).

    Raises:
        ValueError: Unknown name, or a stride or coefficient out of range.
    """
    check_strategy(name, coefficient)
    if stride is not None and not 1 <= stride <= chunk_size:
        raise ValueError(f"n_action_steps: got {stride}, expected 1 to chunk_size = {chunk_size}")

    def given(default: float) -> float:
        return default if coefficient is None else coefficient

    def every(default: int) -> int:
        return default if stride is None else stride

    match name:
        case "sequential":
            return Strategy(name, replace, every(n_action_steps), windowed=True)
        case "temporal_ensemble":
            return Strategy(name, ensemble, every(1), given(0.01))
        case "overlap" | "TemporalAggManager":
            return Strategy(name, overlap, every(1), given(0.1))
        case "crossfade":
            # By default half of a chunk is played; the other half is left to fade from.
            played = every(min(n_action_steps, max(1, chunk_size // 2)))
            return Strategy(name, crossfade, played, given(DEFAULT_FADE_TICKS), windowed=True)
        case "align_fade":
            fade = given(DEFAULT_FADE_TICKS)
            return Strategy(name, replace, every(n_action_steps), fade, windowed=True, aligned=True)
        case "latest" | "BasicActionManager":
            return Strategy(name, replace, every(1))
        case "OlderFirstManager":
            steps = max(1, math.floor(given(1.0) * chunk_size))
            return Strategy(name, replace, every(steps), windowed=True)
        case "TemporalOlderManager":
            steps = max(1, math.ceil(0.75 * chunk_size))
            return Strategy(name, overlap, every(steps), given(0.1))
        case "DelayFreeManager":
            return Strategy(name, replace, every(1), step_s=coefficient)
    raise AssertionError(f"{name} is listed but not made")
