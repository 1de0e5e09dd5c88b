"""A log of the twin's motion and commands, from which tests check how an arm was driven."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

STEPS, COMMANDS = 60_000, 300_000
"""Rows kept: 10 minutes at 100 and at 500 Hz."""


class RingTable:
    """The newest rows of a table, in preallocated memory.

    Args:
        capacity: Rows kept.
        columns: Name to (dtype, width); width 0: a scalar per row.
    """

    def __init__(self, capacity: int, **columns: tuple[type[np.generic], int]) -> None:
        self._columns = {
            name: np.zeros((capacity, width) if width else capacity, kind)
            for name, (kind, width) in columns.items()
        }
        self._capacity = capacity
        self._rows = 0

    def add(self, **values: object) -> None:
        """Append a row, by column; the oldest row is overwritten when the table is full."""
        row = self._rows % self._capacity
        for name, value in values.items():
            self._columns[name][row] = value
        self._rows += 1

    def clear(self) -> None:
        """Delete all rows."""
        self._rows = 0

    def columns(self, prefix: str) -> dict[str, NDArray[np.generic]]:
        """Copies of the columns by prefixed name, from the oldest row to the newest."""
        kept = min(self._rows, self._capacity)
        order = np.arange(self._rows - kept, self._rows) % self._capacity
        return {f"{prefix}{name}": column[order] for name, column in self._columns.items()}


class TwinMotionLog:
    """Every control step of the arms, and every command as it arrived.

    ``save`` writes an .npz; times are ns of this host's monotonic clock:

    * ``step_due_ns``, ``step_began_ns`` (n,); ``step_position``, ``step_velocity`` (n, A): measured
      after the step; ``step_target`` (n, A): the command in force; ``step_reward``,
      ``step_episode`` (n,)
    * ``command_arrived_ns``, ``command_sent_ns`` (m,): when the simulator received it and the
      client sent it; ``command_action`` (m, A); ``command_source`` (m,): number of the connection;
      ``command_episode`` (m,)

    Args:
        action_dim: A.
    """

    def __init__(self, action_dim: int) -> None:
        self._steps = RingTable(
            STEPS,
            due_ns=(np.int64, 0),
            began_ns=(np.int64, 0),
            position=(np.float32, action_dim),
            velocity=(np.float32, action_dim),
            target=(np.float32, action_dim),
            reward=(np.int8, 0),
            episode=(np.int32, 0),
        )
        self._commands = RingTable(
            COMMANDS,
            arrived_ns=(np.int64, 0),
            sent_ns=(np.int64, 0),
            action=(np.float32, action_dim),
            source=(np.int32, 0),
            episode=(np.int32, 0),
        )
        self.add_step = self._steps.add
        self.add_command = self._commands.add

    def clear(self) -> None:
        """Delete all steps and commands."""
        self._steps.clear()
        self._commands.clear()

    def save(self, path: Path) -> None:
        """Write all steps and commands to ``path``, an .npz. Raises ``OSError``."""
        with path.open("wb") as file:
            np.savez(file, **self._steps.columns("step_"), **self._commands.columns("command_"))  # type: ignore[arg-type]
