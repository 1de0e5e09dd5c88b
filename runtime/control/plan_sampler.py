"""Samples a chunk executor's plan between its ticks, plus an offset that fades out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.control.blending import DEFAULT_FADE_TICKS, fade_in
from runtime.control.chunk_executor import ChunkExecutor
from runtime.control.interpolation import Interpolator


class PlanSampler:
    """Reads an executor's plan at control ticks. Allocates nothing that outlives a call.

    Args:
        executor: Holds the plan.
        action_dim: A.
        ratio: Control ticks per policy tick.
        hold: Dimensions that keep their value between policy ticks; the others are interpolated
            linearly.

    Attributes:
        target: (A,) float64, the result of ``read``.
    """

    def __init__(
        self, executor: ChunkExecutor, action_dim: int, ratio: int, hold: Sequence[int]
    ) -> None:
        self._executor = executor
        self._ratio = ratio
        self._interpolator = Interpolator(action_dim, hold)
        self.target = np.zeros(action_dim)
        self._offset = np.zeros(action_dim)
        self._residual = np.zeros(action_dim)
        ticks = round(DEFAULT_FADE_TICKS * ratio)
        self._fade_out = 1.0 - fade_in(ticks + 1, ticks)
        self.clear_offset()

    def clear_offset(self) -> None:
        """Set the offset to zero."""
        self._fading = len(self._fade_out)
        self._residual.fill(0.0)

    def align(self, policy_tick: int, part: int, before: NDArray[np.float64]) -> None:
        """Set the offset so that the motion continues from ``before`` at the plan's own speed.

        The counterpart, at the control rate, of ``blending.align``.

        Args:
            policy_tick, part: The next control tick is ``part`` (0 to ratio − 1) of
                ``policy_tick``; the plan must cover it.
            before: (A,) the command of the control tick before.
        """
        self.clear_offset()
        self.read(policy_tick, part / self._ratio)
        np.subtract(before, self.target, out=self._offset)
        following = policy_tick + (part + 1) // self._ratio
        if self._executor.covered_to(policy_tick) > following:
            self._offset -= self.target
            self.read(following, (part + 1) % self._ratio / self._ratio)
            self._offset += self.target
        self._fading = 0

    def fade(self) -> None:
        """Reduce the offset by one control tick of its fade."""
        if self._fading < len(self._fade_out):
            np.multiply(self._offset, self._fade_out[self._fading], out=self._residual)
            self._fading += 1

    def read(self, base: int, fraction: float) -> None:
        """Set ``target`` to the plan at policy time ``base`` + ``fraction``, plus the offset left.

        Args:
            base: A policy tick that the plan covers; the next one too, unless ``fraction`` is 0.
            fraction: In [0, 1).
        """
        executor, interpolator = self._executor, self._interpolator
        executor.copy_planned(base, interpolator.start)
        if fraction:
            executor.copy_planned(base + 1, interpolator.end)
        np.add(interpolator.at(fraction), self._residual, out=self.target)
