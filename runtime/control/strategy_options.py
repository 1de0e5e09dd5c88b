"""Which strategy plays a policy's chunks, and why: the user's flags, else the checkpoint's own
recommendation, else ``sequential``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from policies.execution import COEFFICIENT, Execution
from policies.flags import Flag
from policies.number_ranges import TICKS
from policies.types import PolicyContract
from runtime.control.blending import ILSTUDIO_NAMES, STRATEGIES, Strategy, make_strategy

DEFAULT = "sequential"
BY_FLAG = "--action_manager"
BY_DEFAULT = "the default: the checkpoint does not say"


ActionManager = Annotated[
    str | None,
    Flag(
        f"one of {', '.join(STRATEGIES)}; or {', '.join(ILSTUDIO_NAMES)}",
        default=f"the checkpoint's, else {DEFAULT}",
    ),
]
ManagerCoef = Annotated[float | None, COEFFICIENT, Flag("the strategy's coefficient")]
ActionSteps = Annotated[
    int | None,
    TICKS,
    Flag("ticks between re-plannings", default="the checkpoint's, else the strategy's"),
]
"""The options of every command that plays chunks."""


def choose_execution(
    contract: PolicyContract,
    action_manager: str | None = None,
    manager_coef: float | None = None,
    n_action_steps: int | None = None,
) -> Execution:
    """How ``contract``'s chunks are played; ``source`` says why.

    What the checkpoint says of a strategy holds for that strategy alone: with another one, what the
    flags leave open is that one's own default.

    Args:
        contract: The policy's, with its checkpoint's recommendation if there is one.
        action_manager, manager_coef, n_action_steps: The user's; None leaves it to the checkpoint.

    Raises:
        ValueError: An unknown strategy, or a number that it does not take.
    """
    said = contract.execution
    if action_manager is None:
        name = DEFAULT if said is None else said.action_manager
        source = BY_DEFAULT if said is None else said.source
    else:
        name, source = action_manager, BY_FLAG
    same = said is not None and said.action_manager == name
    given = {"--manager_coef": manager_coef, "--n_action_steps": n_action_steps}
    flags = [flag for flag, value in given.items() if value is not None]
    if said is not None and same:
        manager_coef = said.manager_coef if manager_coef is None else manager_coef
        n_action_steps = said.n_action_steps if n_action_steps is None else n_action_steps
    chosen = Execution(name, manager_coef, n_action_steps, ", ".join([source, *flags]))
    strategy_of(contract, chosen)
    return chosen


def strategy_of(contract: PolicyContract, execution: Execution) -> Strategy:
    """What plays ``contract``'s chunks so. Raises ``ValueError`` as ``make_strategy``."""
    return make_strategy(
        execution.action_manager,
        chunk_size=contract.chunk_size,
        n_action_steps=contract.n_action_steps,
        stride=execution.n_action_steps,
        coefficient=execution.manager_coef,
    )


def record(contract: PolicyContract, execution: Execution) -> dict[str, Any]:
    """For result files: the numbers in effect, whoever said them."""
    strategy = strategy_of(contract, execution)
    return {
        "name": strategy.name,
        "coefficient": strategy.coefficient if _has_coefficient(strategy) else None,
        "n_action_steps": strategy.stride,
        "source": execution.source,
    }


def describe(contract: PolicyContract, execution: Execution) -> str:
    """For people, one line: the strategy, its numbers in effect, and why."""
    strategy = strategy_of(contract, execution)
    coefficient = f", coefficient {strategy.coefficient:g}" if _has_coefficient(strategy) else ""
    ticks = "every tick" if strategy.stride == 1 else f"every {strategy.stride} ticks"
    return f"{strategy.name}{coefficient}, a new chunk {ticks} ({execution.source})"


def say_before(
    contract: PolicyContract, execution: Execution, assumed: Sequence[str] | None = None
) -> list[str]:
    """What a person should read before anything moves: the rate, the strategy, the assumptions.

    Args:
        assumed: In place of the contract's own, where more is known.
    """
    if assumed is None:
        assumed = [str(assumption) for assumption in contract.assumed]
    return [
        f"rate         {1 / contract.dt_s:g} Hz",
        f"execution    {describe(contract, execution)}",
        *(f"assumed      {line}" for line in assumed),
    ]


def _has_coefficient(strategy: Strategy) -> bool:
    return strategy.coefficient != 0.0 or strategy.name == "temporal_ensemble"
