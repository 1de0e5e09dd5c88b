"""``--env.KEY VALUE`` and ``--robot.KEY VALUE``: a configuration's keys from the command line."""

from __future__ import annotations

from collections.abc import Sequence


def read_overrides(rest: Sequence[str], prefix: str, program: str) -> dict[str, str]:
    """Values by key, from ``--PREFIX.KEY VALUE`` and ``--PREFIX.KEY=VALUE`` pairs.

    Args:
        rest: What the parser of ``program`` did not know.

    Raises:
        ValueError: Anything else, or a key that was given before, or of which a part was.
    """
    start = f"--{prefix}."
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
