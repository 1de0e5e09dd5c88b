"""What a checkpoint says of how it is to be executed, and what it leaves to be assumed.

numpy-free and torch-free: contracts carry both to every client.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from policies.number_ranges import FRACTION, TICKS, Range, check_ranges

STRATEGIES = (
    "sequential",
    "temporal_ensemble",
    "overlap",
    "crossfade",
    "align_fade",
    "latest",
)
"""How chunks become commands; ``runtime.control.blending`` implements them."""
ILSTUDIO_NAMES = (
    "OlderFirstManager",
    "TemporalAggManager",
    "TemporalOlderManager",
    "DelayFreeManager",
    "BasicActionManager",
)
"""ILStudio's names of theirs."""

COEFFICIENT = Range(-1e6, 1e6)
"""Of any strategy."""
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
"""What each strategy's coefficient may be; None for those that have no use for one."""


def check_strategy(name: str, coefficient: float | None) -> None:
    """Raises ``ValueError``: an unknown strategy, or a coefficient that it does not take."""
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
    """How a checkpoint says that its chunks are to be played. A flag of the user's wins.

    Attributes:
        action_manager: One of ``STRATEGIES`` or ``ILSTUDIO_NAMES``.
        manager_coef: The strategy's coefficient; None for its default.
        n_action_steps: Ticks between re-plannings; None for the strategy's default.
        source: Where that is said, e.g. ``"config.json: temporal_ensemble_coeff"``.

    Raises:
        ValueError: An unknown strategy, or a number out of range.
    """

    action_manager: str
    manager_coef: Annotated[float, COEFFICIENT] | None = None
    n_action_steps: Annotated[int, TICKS] | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_ranges(self)
        check_strategy(self.action_manager, self.manager_coef)


@dataclass(frozen=True, slots=True)
class Assumption:
    """Something that a checkpoint does not say, and that was assumed.

    Attributes:
        what: e.g. ``"rate"``.
        value: What was assumed, in words, e.g. ``"50 Hz"``.
        flag: What says it instead, e.g. ``"--fps"``.
    """

    what: str
    value: str
    flag: str

    def __str__(self) -> str:
        return f"{self.what} {self.value}: the checkpoint does not say it; {self.flag} does"


RATE = "rate"
"""``Assumption.what`` of the policy's rate, which a robot must not be driven with."""


def assumed_rate(dt_s: float) -> Assumption:
    """That a policy's ticks are ``dt_s`` apart."""
    return Assumption(RATE, f"{_hertz(dt_s)} Hz", "--fps")


def _hertz(dt_s: float) -> str:
    return f"{1 / dt_s:g}" if dt_s > 0 and math.isfinite(dt_s) else "?"
