"""The loaded model of a server. It can be replaced between two inferences."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from policies.errors import DeviceLost, PolicyError
from policies.types import ActionChunk, MetaObs, Policy
from policies.weights_hash import info_with_hash
from runtime.protocol import messages
from runtime.server.segment_registrar import MemoryRegistry

logger = logging.getLogger(__name__)

MOST_REPLACED_HASHES = 100
"""Hashes of replaced weights that a description has."""

InferBatch = Callable[[Sequence[MetaObs]], list[ActionChunk | PolicyError]]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A warm policy and its capabilities.

    Attributes:
        policy: Each session gets a fork of it.
        generation: 1 for the first model of a server, one more for each replacement.
        exclusive: The policy cannot be forked: one session at a time.
        shared: A fork is the policy itself, because it has no state between observations.
        infer_batch: Computes the observations of several sessions at once; None if the policy
            cannot.
        sizes: Batch sizes that the policy is prepared for.
        exact: Whether a reply has the same bits whatever else is in its batch.
        registered_memory: Where to register memory that holds images; None if the policy does not
            need that.
        replaced_hashes: Hashes of the weights that it and its predecessors replaced, the newest
            last.
    """

    policy: Policy
    generation: int
    exclusive: bool
    shared: bool
    infer_batch: InferBatch | None
    sizes: tuple[int, ...]
    exact: bool
    registered_memory: MemoryRegistry | None
    replaced_hashes: tuple[str, ...] = ()

    @classmethod
    def of(cls, policy: Policy, generation: int = 1, max_batch: int | None = None) -> LoadedModel:
        """Find out the capabilities of ``policy``; use batch sizes up to ``max_batch``.

        Raises:
            DeviceLost: From ``policy.fork``.
        """
        exclusive, shared = False, False
        try:
            fork = policy.fork()
        except DeviceLost:
            raise
        except PolicyError as error:
            logger.warning("one session at a time: %s", error)
            exclusive = True
        else:
            shared = fork is policy
            if not shared:
                fork.close()
        optional: Any = policy  # may have attributes beyond ``Policy``
        infer_batch = getattr(optional, "infer_batch", None) if shared else None
        sizes = tuple(getattr(optional, "batch_sizes", (1,))) if infer_batch else (1,)
        sizes = tuple(n for n in sizes if max_batch is None or n <= max_batch) or (1,)
        if sizes == (1,):
            infer_batch = None
        exact = bool(getattr(optional, "batch_is_exact", False))
        return cls(
            policy,
            generation,
            exclusive,
            shared,
            cast("InferBatch | None", infer_batch),
            sizes,
            exact,
            getattr(optional, "registered_memory", None),
        )

    def describe(self) -> dict[str, Any]:
        """The description of the model for clients, JSON values.

        It waits for the hash of the weights. That holds up no session: each began with a
        description, and a replacement is hashed before it is served.
        """
        return {
            **messages.describe(self.policy.contract, info_with_hash(self.policy)),
            "policy_id": self.generation,
            "episode_state": not self.shared,
            "replaced_hashes": list(self.replaced_hashes),
        }

    def replace(self, old: LoadedModel) -> LoadedModel:
        """Return this model as the successor of ``old``, whose hash clients may still know."""
        known = (*old.replaced_hashes, info_with_hash(old.policy).weights_hash)
        return dataclasses.replace(self, replaced_hashes=known[-MOST_REPLACED_HASHES:])


def close_policy(policy: Policy) -> None:
    """Close a policy; log whatever it raises, because the policy is third-party code."""
    try:
        policy.close()
    except Exception:
        logger.exception("a policy failed to close")
