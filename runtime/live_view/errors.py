"""The exception of the live view."""

from __future__ import annotations

from runtime.errors import RuntimeFault


class LiveViewError(RuntimeFault):
    """The viewer is not there, or takes nothing more. An evaluation goes on without it."""
