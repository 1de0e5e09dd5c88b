"""The exceptions of ``runtime.fleet``."""

from __future__ import annotations

from runtime.errors import RuntimeFault


class FleetError(RuntimeFault):
    """The cluster cannot run the evaluation; the message says got and expected."""
