"""The policy server. ``PolicyServer`` is imported on first use, because it is heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.server.policy_server import PolicyServer

__all__ = ["PolicyServer"]


def __getattr__(name: str) -> Any:
    """Import ``PolicyServer`` on first use."""
    if name == "PolicyServer":
        from runtime.server.policy_server import PolicyServer

        return PolicyServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
