"""Reads the flags ``--env.KEY VALUE``, ``--robot.KEY VALUE`` and ``--KEY VALUE``: YAML keys."""

from __future__ import annotations

from collections.abc import Sequence


def read_overrides(rest: Sequence[str], prefix: str, program: str) -> dict[str, str]:
    """Return the values by key, from ``--env.KEY VALUE`` and ``--env.KEY=VALUE`` pairs.

    Args:
        rest: The arguments that the parser of ``program`` does not know.
        prefix: The text before each key: ``"env."``, or empty for ``--KEY VALUE``.
        program: The command's name, for errors.

    Raises:
        ValueError: Another argument, or a key that an earlier one already sets, whole or in part.
    """
    start = f"--{prefix}"
    overrides: dict[str, str] = {}
    tokens = iter(rest)
    for token in tokens:
        key, equals, value = token.partition("=")
        if not key.startswith(start):
            raise ValueError(f"got {token!r}, expected a flag of `{program} --help` or {start}KEY")
        if not equals:
            following = next(tokens, None)
            if following is None:
                raise ValueError(f"{token}: expected a value after it")
            value = following
        name = key.removeprefix(start)
        for before in overrides:
            if before == name or before.startswith(f"{name}."):
                raise ValueError(f"{key}: got it after {start}{before}, expected one of them")
        overrides[name] = value
    return overrides
