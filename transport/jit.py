"""Functions compiled to machine code by numba, ahead of their first use.

``numba`` is imported with this module, and that takes a while: a module that seldom needs it
imports this one late.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(
    signature: Any, *, nogil: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for this one signature, now, and cache it where a folder can be written.

    So nobody waits for the compiler during a call, and a second start does not wait either. numba
    discards what it cached when the function's own file changes. It does not notice a change of
    another file, so a compiled function takes its constants from its own file.

    Args:
        signature: numba's, as text or made of ``numba.types``.
        nogil: Let other threads run Python meanwhile. Only for what runs for milliseconds: the
            caller then has to get the GIL back, and where another thread is busy that takes up to
            5 ms.
    """

    def compile_now(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            made: Callable[..., Any] = njit(signature, cache=True, nogil=nogil)(function)
        except (RuntimeError, OSError):
            # No folder can be written (a read-only install without a home): compile at each start.
            made = njit(signature, nogil=nogil)(function)
        return made

    return compile_now


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for use inside others that are ``compiled``; compiled with them."""
    return njit(function)  # type: ignore[no-any-return]
