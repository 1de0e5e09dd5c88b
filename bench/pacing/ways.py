"""The ways to keep time that are compared, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.control.clock import DEFAULT_SPIN_NS as SPIN_NS

PRIORITY = 80


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        kind: ``ours``, a name of ``peers.PEERS``, or ``cyclictest``.
        priority: Of SCHED_FIFO; 0 for what anybody may have.
        spin_ns: Of ours.
    """

    kind: str
    priority: int = 0
    spin_ns: int = 0


WAYS: Mapping[str, Way] = {
    "ours, FIFO, spin": Way("ours", PRIORITY, SPIN_NS),
    "ours, FIFO": Way("ours", PRIORITY),
    "cyclictest, FIFO": Way("cyclictest", PRIORITY),
    "ours, spin": Way("ours", 0, SPIN_NS),
    "ours": Way("ours"),
    "ILStudio": Way("ILStudio"),
    "openpi": Way("openpi"),
    "LeRobot": Way("LeRobot"),
    "cyclictest": Way("cyclictest"),
}
"""With privileges, then without. The peers ask for none."""

PRIVILEGED = tuple(name for name, way in WAYS.items() if way.priority)
UNPRIVILEGED = tuple(name for name, way in WAYS.items() if not way.priority)
