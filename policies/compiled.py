"""Small functions compiled ahead of their first use, so that nobody waits for a compiler.

Here, where everything else may import it. ``numba`` is imported with this module, so a module that
seldom needs it imports this one late.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(signature: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as machine code for ``signature``, now; kept on disk where that can be written.

    It runs without the GIL and allocates no Python objects but its result.

    Args:
        signature: numba's, as text or made of ``numba.types``.
    """
    try:
        return njit(signature, cache=True, nogil=True)(function)  # type: ignore[no-any-return]
    except (RuntimeError, OSError):
        # No folder can be written (a read-only install without a home): compile at every start.
        return njit(signature, nogil=True)(function)  # type: ignore[no-any-return]


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for use inside others that are ``compiled``; compiled with them."""
    return njit(nogil=True)(function)  # type: ignore[no-any-return]
