"""What a twin remembers of its own motion, for whoever must prove how an arm was driven."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

STEPS, COMMANDS = 60_000, 300_000
"""10 minutes at 100 and at 500 Hz."""


class Track:
    """The newest rows of a table, in memory allocated beforehand."""

    def __init__(self, capacity: int, **columns: tuple[type[np.generic], int]) -> None:
        self._columns = {
            name: np.zeros((capacity, width) if width else capacity, kind)
            for name, (kind, width) in columns.items()
        }
        self._capacity = capacity
        self._rows = 0

    def add(self, **values: object) -> None:
        row = self._rows % self._capacity
        for name, value in values.items():
            self._columns[name][row] = value
        self._rows += 1

    def clear(self) -> None:
        self._rows = 0

    def columns(self, prefix: str) -> dict[str, NDArray[np.generic]]:
        """By prefixed name, the rows from the oldest to the newest, copies."""
        kept = min(self._rows, self._capacity)
        order = np.arange(self._rows - kept, self._rows) % self._capacity
        return {f"{prefix}{name}": column[order] for name, column in self._columns.items()}


class TwinMotionLog:
    """Every control step of the arms, and every command as it arrived.

    ``save`` writes an .npz; times are ns of the host's monotonic clock:

    * ``step_due_ns``, ``step_began_ns`` (n,); ``step_position``, ``step_velocity`` (n, A): after
      the step, as measured; ``step_target`` (n, A): the command in force; ``step_reward``,
      ``step_episode`` (n,)
    * ``command_arrived_ns``, ``command_sent_ns`` (m,): of the host and of the sender;
      ``command_action`` (m, A); ``command_source`` (m,): a number per connection;
      ``command_episode`` (m,)
    """

    def __init__(self, action_dim: int) -> None:
        self._steps = Track(
            STEPS,
            due_ns=(np.int64, 0),
            began_ns=(np.int64, 0),
            position=(np.float32, action_dim),
            velocity=(np.float32, action_dim),
            target=(np.float32, action_dim),
            reward=(np.int8, 0),
            episode=(np.int32, 0),
        )
        self._commands = Track(
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
        self._steps.clear()
        self._commands.clear()

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **self._steps.columns("step_"), **self._commands.columns("command_"))  # type: ignore[arg-type]
