"""The hash of a policy's weights and normalizers, which says whether two policies are the same."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from policies.types import Policy, PolicyInfo

logger = logging.getLogger(__name__)

HASH_CHARACTERS = 16


@runtime_checkable
class HashedPolicy(Policy, Protocol):
    """A policy that knows the hash of its weights and normalizers."""

    def weights_hash(self) -> str:
        """Return ``HASH_CHARACTERS`` hexadecimal digits; wait until they are computed.

        Equal for equal weights and normalizers, whatever device and precision compute them. Empty
        if it could not be computed. For any thread.
        """
        ...


class BackgroundHash:
    """A hash that a thread computes, because no start should wait for it.

    Args:
        compute: Returns the hash; may raise ``OSError``, which is logged.
    """

    def __init__(self, compute: Callable[[], str]) -> None:
        self._value = ""
        self._thread = threading.Thread(
            target=self._run, args=(compute,), name="weights hash", daemon=True
        )
        self._thread.start()

    def wait(self) -> str:
        """Return the hash once it is computed; empty if that failed."""
        self._thread.join()
        return self._value

    def _run(self, compute: Callable[[], str]) -> None:
        try:
            self._value = compute()
        except OSError as error:
            logger.warning("the policy has no hash of its weights: %s", error)


def info_with_hash(policy: Policy) -> PolicyInfo:
    """Return ``policy.info`` with ``weights_hash``; wait until a ``HashedPolicy`` has it.

    Any other policy says it in its own ``info``, or has none.
    """
    if isinstance(policy, HashedPolicy):
        return dataclasses.replace(policy.info, weights_hash=policy.weights_hash())
    return policy.info
