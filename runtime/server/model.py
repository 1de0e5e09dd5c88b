"""The model that a server serves, which may be replaced between two inferences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from policies.errors import PolicyError
from policies.types import ActionChunk, MetaObs, Policy
from runtime.protocol import messages

logger = logging.getLogger(__name__)

InferBatch = Callable[[Sequence[MetaObs]], list[ActionChunk | PolicyError]]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A policy, already warm, and what a server has to know of it.

    Attributes:
        policy: Every session's is a fork of it.
        generation: 1 for the first, one more for each that replaced another.
        exclusive: It cannot be forked: one session at a time.
        shared: A fork is the policy itself: it keeps nothing between observations.
        infer_batch: For several sessions' observations at once; None where it cannot.
        sizes: Batch sizes that it is prepared for.
        exact: Whether an answer has the same bits whatever is computed with it.
    """

    policy: Policy
    generation: int
    exclusive: bool
    shared: bool
    infer_batch: InferBatch | None
    sizes: tuple[int, ...]
    exact: bool

    @classmethod
    def of(cls, policy: Policy, generation: int = 1, max_batch: int | None = None) -> LoadedModel:
        """What ``policy`` can do, of which batches up to ``max_batch`` are used."""
        exclusive, shared = False, False
        try:
            fork = policy.fork()
        except PolicyError as error:
            logger.warning("one session at a time: %s", error)
            exclusive = True
        else:
            shared = fork is policy
            if not shared:
                fork.close()
        able: Any = policy
        infer_batch = getattr(able, "infer_batch", None) if shared else None
        sizes = tuple(getattr(able, "batch_sizes", (1,))) if infer_batch else (1,)
        sizes = tuple(n for n in sizes if max_batch is None or n <= max_batch) or (1,)
        if sizes == (1,):
            infer_batch = None
        exact = bool(getattr(able, "batch_is_exact", False))
        return cls(
            policy,
            generation,
            exclusive,
            shared,
            cast("InferBatch | None", infer_batch),
            sizes,
            exact,
        )

    def describe(self) -> dict[str, Any]:
        """What a client is told that asks."""
        described = messages.describe(self.policy.contract, self.policy.info)
        return {**described, "policy_id": self.generation}


def close(policy: Policy) -> None:
    """Anyone's policy: there is nothing left to lose."""
    try:
        policy.close()
    except Exception:
        logger.exception("a policy failed to close")
