"""The plan as a function of policy time, with an offset that fades out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.control.blending import DEFAULT_FADE_TICKS, fade_in
from runtime.control.chunk_executor import ChunkExecutor
from runtime.control.interpolation import Interpolator


class PlanSampler:
    """Reads an executor's plan between its ticks. Allocates nothing that outlives a call.

    Args:
        executor: Whose plan.
        action_dim: A.
        ratio: Control ticks per policy tick.
        hold: Dimensions that step at a policy tick; the others move on a line to the next.

    Attributes:
        target: (A,) float64: what ``read`` found.
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
        self.forget()

    def forget(self) -> None:
        """No offset."""
        self._fading = len(self._fade_out)
        self._residual.fill(0.0)

    def align(self, policy_tick: int, part: int, before: NDArray[np.float64]) -> None:
        """Go on from ``before`` at the plan's own speed; what separates the two fades out.

        Args:
            policy_tick, part: The control tick that comes next; the plan must cover it.
            before: (A,) what was commanded in the control tick before.
        """
        self.forget()
        self.read(policy_tick, part / self._ratio)
        np.subtract(before, self.target, out=self._offset)
        following = policy_tick + (part + 1) // self._ratio
        if self._executor.covered_to(policy_tick) > following:
            self._offset -= self.target
            self.read(following, (part + 1) % self._ratio / self._ratio)
            self._offset += self.target
        self._fading = 0

    def fade(self) -> None:
        """One control tick less of the offset."""
        if self._fading < len(self._fade_out):
            np.multiply(self._offset, self._fade_out[self._fading], out=self._residual)
            self._fading += 1

    def read(self, base: int, fraction: float) -> None:
        """``target`` = the plan at policy time ``base`` + ``fraction``, plus what is left to fade.

        Args:
            base: A tick that the plan covers; the one after it too, unless ``fraction`` is 0.
        """
        executor, between = self._executor, self._interpolator
        executor.copy_planned(base, between.start)
        if fraction:
            executor.copy_planned(base + 1, between.end)
        np.add(between.at(fraction), self._residual, out=self.target)
