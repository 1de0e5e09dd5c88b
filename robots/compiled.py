"""Small functions compiled ahead of the first tick, so that no tick waits for a compiler."""

from __future__ import annotations

from policies.compiled import compiled, inlined

__all__ = ("compiled", "inlined")
