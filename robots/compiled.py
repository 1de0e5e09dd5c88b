"""Small functions compiled ahead of the first tick, so that no tick waits for a compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(signature: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as machine code for ``signature``, now; kept on disk where that can be written.

    It runs without the GIL and allocates no Python objects but its result.
    """
    try:
        return njit(signature, cache=True, nogil=True)(function)  # type: ignore[no-any-return]
    except (RuntimeError, OSError):
        # No folder can be written (a read-only install without a home): compile at every start.
        return njit(signature, nogil=True)(function)  # type: ignore[no-any-return]


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for use inside others that are ``compiled``; compiled with them."""
    return njit(nogil=True)(function)  # type: ignore[no-any-return]
