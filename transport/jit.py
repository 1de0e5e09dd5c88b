"""Compile functions to machine code with numba, before their first call.

This module imports ``numba``, which takes a while. Modules that seldom need it import this one
late.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(
    signature: Any, *, nogil: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: compile a function for one signature now, and cache the code in a writable folder.

    No call waits for the compiler, and a second start uses the cache. numba discards the cached
    code when the function's own file changes. It does not notice a change of another file, so a
    compiled function takes its constants from its own file.

    Args:
        signature: In numba's form, as text or made of ``numba.types``.
        nogil: Release the GIL during the call. Only for functions that run for milliseconds: the
            caller has to get the GIL back afterwards, which takes up to 5 ms while another thread
            is busy.
    """

    def compile_now(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            made: Callable[..., Any] = njit(signature, cache=True, nogil=nogil)(function)
        except (RuntimeError, OSError):
            # No writable folder (a read-only install without a home): compile at each start.
            made = njit(signature, nogil=nogil)(function)
        return made

    return compile_now


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: a function to call from ``compiled`` functions; it is compiled with them."""
    return njit(function)  # type: ignore[no-any-return]
