"""Chooses the strategy that executes a policy's chunks.

The user's flags come first, then the checkpoint's recommendation, then ``sequential``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from policies.execution import COEFFICIENT, Execution
from policies.flag_builder import Flag
from policies.number_ranges import TICKS
from policies.types import PolicyContract
from runtime.control.blending import ILSTUDIO_NAMES, STRATEGIES, Strategy, make_strategy

DEFAULT = "sequential"
ENSEMBLE = "temporal_ensemble"
BY_FLAG = "--action_manager"
BY_DEFAULT = "the default: the checkpoint does not say"


ActionManager = Annotated[
    str | None,
    Flag(
        f"strategy that executes chunks: {', '.join(STRATEGIES)}; ILStudio's names: "
        f"{', '.join(ILSTUDIO_NAMES)}",
        default=f"the checkpoint's, else {DEFAULT}",
    ),
]
ManagerCoef = Annotated[
    float | None,
    COEFFICIENT,
    Flag("the strategy's coefficient", default="the checkpoint's, else the strategy's"),
]
ActionSteps = Annotated[
    int | None,
    TICKS,
    Flag(
        "policy ticks from one chunk to the next", default="the checkpoint's, else the strategy's"
    ),
]
EnsembleStride = Annotated[
    int | None,
    TICKS,
    Flag(
        "with temporal_ensemble: policy ticks from one inference to the next",
        default="the checkpoint's, else 1",
    ),
]
"""The flags of every command that executes chunks."""


def choose_execution(
    contract: PolicyContract,
    action_manager: str | None = None,
    manager_coef: float | None = None,
    n_action_steps: int | None = None,
    ensemble_stride: int | None = None,
) -> Execution:
    """Return how the chunks of ``contract`` are executed; its ``source`` names what chose it.

    The checkpoint's numbers apply to the strategy that it recommends. With another strategy, a
    number that the flags leave open is that strategy's own default. The latency up to which the
    recommendation holds is kept only if nothing else is chosen.

    Args:
        contract: The policy's contract, with the checkpoint's recommendation if there is one.
        action_manager, manager_coef, n_action_steps, ensemble_stride: The user's flags; None if not
            given.

    Raises:
        ValueError: An unknown strategy, a number that it does not accept, ``ensemble_stride`` for
            another strategy than ``temporal_ensemble``, or beside ``n_action_steps``.
    """
    recommended = contract.execution
    if action_manager is None:
        name = DEFAULT if recommended is None else recommended.action_manager
        source = BY_DEFAULT if recommended is None else recommended.source
    else:
        name, source = action_manager, BY_FLAG
    given = {
        "--manager_coef": manager_coef,
        "--n_action_steps": n_action_steps,
        "--ensemble_stride": ensemble_stride,
    }
    flags = [flag for flag, value in given.items() if value is not None]
    if ensemble_stride is not None:
        n_action_steps = _checked_stride(name, ensemble_stride, n_action_steps)
    if recommended is not None and recommended.action_manager == name:
        if manager_coef is None:
            manager_coef = recommended.manager_coef
        if n_action_steps is None:
            n_action_steps = recommended.n_action_steps
    chosen = Execution(name, manager_coef, n_action_steps, ", ".join([source, *flags]))
    strategy_of(contract, chosen)
    if recommended is not None and chosen == dataclasses.replace(recommended, max_latency_ms=None):
        chosen = dataclasses.replace(chosen, max_latency_ms=recommended.max_latency_ms)
    return chosen


def _checked_stride(name: str, ensemble_stride: int, n_action_steps: int | None) -> int:
    if name != ENSEMBLE:
        raise ValueError(
            f"--ensemble_stride: got {ensemble_stride} with {name}, expected it with "
            f"{BY_FLAG} {ENSEMBLE}; other strategies take --n_action_steps"
        )
    if n_action_steps is not None:
        raise ValueError(
            f"--ensemble_stride: got {ensemble_stride} beside --n_action_steps {n_action_steps}, "
            f"expected one of them: for {ENSEMBLE} both are the ticks between inferences"
        )
    return ensemble_stride


def strategy_of(contract: PolicyContract, execution: Execution) -> Strategy:
    """Return the strategy of ``execution`` for ``contract``'s chunks. Raises ``ValueError``."""
    return make_strategy(
        execution.action_manager,
        chunk_size=contract.chunk_size,
        n_action_steps=contract.n_action_steps,
        stride=execution.n_action_steps,
        coefficient=execution.manager_coef,
    )


def result_entry(contract: PolicyContract, execution: Execution) -> dict[str, Any]:
    """Return the entry of a result file: the strategy and the numbers in effect."""
    strategy = strategy_of(contract, execution)
    return {
        "name": strategy.name,
        "coefficient": strategy.coefficient if _has_coefficient(strategy) else None,
        "n_action_steps": strategy.stride,
        "source": execution.source,
        "max_latency_ms": execution.max_latency_ms,
    }


def describe(contract: PolicyContract, execution: Execution) -> str:
    """Return one line of text: the strategy, the numbers in effect, and their source."""
    strategy = strategy_of(contract, execution)
    coefficient = f", coefficient {strategy.coefficient:g}" if _has_coefficient(strategy) else ""
    ticks = "every tick" if strategy.stride == 1 else f"every {strategy.stride} ticks"
    known = execution.max_latency_ms
    holds = "" if known is None else f", measured up to {known:g} ms of latency"
    return f"{strategy.name}{coefficient}, a new chunk {ticks}{holds} ({execution.source})"


def latency_warning(execution: Execution, latency_ms: float) -> str | None:
    """Return a line of text if ``latency_ms`` is beyond what ``execution`` was measured to hold
    for; otherwise None.
    """
    known = execution.max_latency_ms
    if known is None or latency_ms <= known:
        return None
    return (
        f"a latency of {latency_ms:.0f} ms is beyond the {known:g} ms up to which "
        f"{execution.action_manager} was measured to hold ({execution.source}): expect failures"
    )


def summary_lines(
    contract: PolicyContract, execution: Execution, assumed: Sequence[str] | None = None
) -> list[str]:
    """Return the lines that a command prints before it starts: rate, strategy, assumptions.

    Args:
        contract: The policy's contract, at the rate used.
        execution: How its chunks are executed.
        assumed: The assumptions to print; None for the contract's.
    """
    if assumed is None:
        assumed = [str(assumption) for assumption in contract.assumed]
    return [
        f"rate         {1 / contract.dt_s:g} Hz",
        f"execution    {describe(contract, execution)}",
        *(f"assumed      {line}" for line in assumed),
    ]


def _has_coefficient(strategy: Strategy) -> bool:
    return strategy.coefficient != 0.0 or strategy.name == ENSEMBLE
