"""Loads ``python:package.module:factory``: the user's own policy."""

from __future__ import annotations

import importlib
from typing import Any

from policies.errors import CheckpointError, PolicyError
from policies.types import (
    ActionChunk,
    MetaObs,
    Policy,
    PolicyContract,
    PolicyInfo,
)

PREFIX = "python:"
_MEMBERS = ("contract", "info", "infer", "reset", "close")


class UnforkablePolicy:
    """Wraps a policy that has no ``fork``, so that it serves one session at a time.

    Args:
        policy: The user's policy.
        source: Its name, for errors.
    """

    def __init__(self, policy: Any, source: str) -> None:
        self._policy, self._source = policy, source

    @property
    def contract(self) -> PolicyContract:
        """The wrapped policy's contract."""
        contract: PolicyContract = self._policy.contract
        return contract

    @property
    def info(self) -> PolicyInfo:
        """The wrapped policy's info."""
        info: PolicyInfo = self._policy.info
        return info

    def infer(self, obs: MetaObs) -> ActionChunk:
        """Return the wrapped policy's chunk."""
        chunk: ActionChunk = self._policy.infer(obs)
        return chunk

    def reset(self) -> None:
        """Reset the wrapped policy."""
        self._policy.reset()

    def fork(self) -> Policy:
        """Always raises ``PolicyError``."""
        raise PolicyError(
            f"{self._source}: this policy has no fork(), so it serves one session at a time; "
            "return self from fork() if it keeps nothing between observations"
        )

    def close(self) -> None:
        """Close the wrapped policy."""
        self._policy.close()


def load_factory(source: str) -> Policy:
    """Call the factory that ``source`` names and return its policy.

    Raises:
        CheckpointError: ``source`` is malformed or cannot be imported, the factory fails, or it
            returns something that is not a policy.
    """
    module_name, separator, name = source.removeprefix(PREFIX).partition(":")
    if not separator or not module_name or not name:
        raise CheckpointError(f"{source!r}: expected {PREFIX}package.module:factory")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # user code may raise anything
        raise CheckpointError(f"{source}: the module cannot be imported: {error!r}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        callables = sorted(
            n
            for n, v in vars(module).items()
            if callable(v) and n[0] != "_" and getattr(v, "__module__", "") == module.__name__
        )
        raise CheckpointError(f"{source}: no function {name!r} there, got {callables}")
    try:
        policy = factory()
    except PolicyError:
        raise
    except Exception as error:  # user code may raise anything
        raise CheckpointError(f"{source}: the factory failed: {error!r}") from error
    missing = [member for member in _MEMBERS if not hasattr(policy, member)]
    if missing:
        raise CheckpointError(
            f"{source}: returned a {type(policy).__name__} without {missing}, expected a Policy"
        )
    if not isinstance(policy.contract, PolicyContract) or not isinstance(policy.info, PolicyInfo):
        raise CheckpointError(
            f"{source}: contract is a {type(policy.contract).__name__} and info a "
            f"{type(policy.info).__name__}, expected PolicyContract and PolicyInfo"
        )
    return policy if isinstance(policy, Policy) else UnforkablePolicy(policy, source)
