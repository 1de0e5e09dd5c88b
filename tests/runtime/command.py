"""A command run in this process, as a shell would see its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def status_of(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit status of ``main``, which may return it or leave with it."""
    try:
        return main(argv)
    except SystemExit as left:
        assert isinstance(left.code, int)
        return left.code
