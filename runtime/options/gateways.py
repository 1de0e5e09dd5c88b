"""What a gateway's own command and a server that starts gateways share."""

from __future__ import annotations

from typing import Literal

from policies.number_ranges import Range

PROTOCOLS = ("ilstudio", "openpi", "lerobot", "groot")
"""Names of the gateways."""
DEADLINE_MS = Range(0, 60_000, above=True)
Kind = Literal["robot", "sim"]
"""Kind of a gateway's sessions."""


def check_demand(kind: Kind, rate_hz: float | None, deadline_ms: float | None) -> None:
    """Raise ``ValueError`` unless a robot's sessions declare rate and deadline."""
    if kind == "robot" and (rate_hz is None or deadline_ms is None):
        raise ValueError("kind robot: expected rate_hz and deadline_ms, too")
