"""How a checkpoint recommends to execute its chunks, and the values that it does not define.

This module imports neither numpy nor torch, for every client reads both from the contract.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from policies.number_ranges import FRACTION, LATENCY_MS, TICKS, Range, check_ranges

STRATEGIES = (
    "sequential",
    "temporal_ensemble",
    "overlap",
    "crossfade",
    "align_fade",
    "latest",
)
"""Ways to turn chunks into commands; ``runtime.control.blending`` implements them."""
ILSTUDIO_NAMES = (
    "OlderFirstManager",
    "TemporalAggManager",
    "TemporalOlderManager",
    "DelayFreeManager",
    "BasicActionManager",
)
"""Names of ILStudio's strategies, which are accepted too."""

COEFFICIENT = Range(-1e6, 1e6)
"""The coefficients of all strategies together."""
_FADE_TICKS = Range(0, 1_000_000, above=True)
COEFFICIENTS: dict[str, Range | None] = {
    "sequential": None,
    "temporal_ensemble": COEFFICIENT,
    "overlap": FRACTION,
    "crossfade": _FADE_TICKS,
    "align_fade": _FADE_TICKS,
    "latest": None,
    "OlderFirstManager": FRACTION,
    "TemporalAggManager": FRACTION,
    "TemporalOlderManager": FRACTION,
    "DelayFreeManager": Range(0, 100, above=True),
    "BasicActionManager": None,
}
"""The valid coefficients of each strategy; None for a strategy without one."""


def check_strategy(name: str, coefficient: float | None) -> None:
    """Check a strategy's name and coefficient.

    Args:
        name: One of ``STRATEGIES`` or ``ILSTUDIO_NAMES``.
        coefficient: None for the strategy's default.

    Raises:
        ValueError: An unknown strategy, or a coefficient that it does not accept.
    """
    if name not in COEFFICIENTS:
        raise ValueError(
            f"action_manager: got {name!r}, expected one of {STRATEGIES + ILSTUDIO_NAMES}"
        )
    if coefficient is None:
        return
    allowed = COEFFICIENTS[name]
    if allowed is None:
        raise ValueError(
            f"manager_coef: got {coefficient}, expected none: {name} has no use for it"
        )
    if coefficient not in allowed:
        raise ValueError(f"manager_coef: got {coefficient}, expected {allowed} for {name}")


@dataclass(frozen=True, slots=True)
class Execution:
    """How chunks are executed: the strategy and its numbers. The user's flags come first.

    Attributes:
        action_manager: One of ``STRATEGIES`` or ``ILSTUDIO_NAMES``.
        manager_coef: The strategy's coefficient; None for its default.
        n_action_steps: Ticks from one chunk to the next; None for the strategy's default.
        source: Where the values come from, e.g. ``"config.json: temporal_ensemble_coeff"``.
        max_latency_ms: Latency up to which the recommendation was measured to hold, from an
            observation until its answer can be used; None if it was not measured.

    Raises:
        ValueError: An unknown strategy, or a number out of range.
    """

    action_manager: str
    manager_coef: Annotated[float, COEFFICIENT] | None = None
    n_action_steps: Annotated[int, TICKS] | None = None
    source: str = field(default="", compare=False)
    max_latency_ms: Annotated[float, LATENCY_MS] | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        check_strategy(self.action_manager, self.manager_coef)


@dataclass(frozen=True, slots=True)
class Assumption:
    """A value that the checkpoint does not define and that is assumed.

    Attributes:
        what: The value's name, e.g. ``"rate"``.
        value: The assumed value as text, e.g. ``"50 Hz"``.
        flag: The flag that sets it, e.g. ``"--fps"``.
    """

    what: str
    value: str
    flag: str

    def __str__(self) -> str:
        return f"{self.what} {self.value}: the checkpoint does not say it; {self.flag} does"


RATE = "rate"
"""``Assumption.what`` of the policy's rate; a robot is not driven at an assumed rate."""


def assumed_rate(dt_s: float) -> Assumption:
    """Return the assumption that a policy's ticks are ``dt_s`` seconds apart."""
    return Assumption(RATE, f"{_hertz(dt_s)} Hz", "--fps")


def _hertz(dt_s: float) -> str:
    return f"{1 / dt_s:g}" if dt_s > 0 and math.isfinite(dt_s) else "?"
