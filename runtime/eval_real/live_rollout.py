"""Shows the commands and chunks of a robot evaluation in a live view."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robots.base import Robot
from runtime.eval_real.run_config import RunConfig
from runtime.live_view.layout import LiveViewLayout
from runtime.live_view.live_view_writer import LiveViewWriter

Values = dict[str, NDArray[Any]]


class LiveRollout:
    """Turns the rows and chunks of shared memory into messages of a live view.

    Args:
        writer: Where they go.
        config: The run's configuration.
    """

    def __init__(self, writer: LiveViewWriter, config: RunConfig) -> None:
        self._writer = writer
        self._period_ns, self._dt_ns = config.period_s * 1e9, config.contract.dt_s * 1e9
        self._chunks: list[Values] = []

    def chunk(self, values: Values) -> None:
        """Keep an accepted chunk until its attempt plays, which says when its actions are due."""
        self._chunks.append(values)

    def row(self, values: Values) -> None:
        """Show a command with the state read before it, and the chunks that came until then."""
        sent_ns, captured_ns = int(values["sent_ns"]), int(values["captured_ns"])
        deadline_ns = int(values["deadline_ns"])
        self._writer.state(sent_ns, values["state"])
        self._writer.tick(
            sent_ns,
            values["command"],
            attempt=int(values["attempt"]),
            source=int(values["source"]),
            lateness_s=(sent_ns - deadline_ns) / 1e9 if deadline_ns else np.nan,
            age_s=(sent_ns - captured_ns) / 1e9 if captured_ns else np.nan,
        )
        if values["played"] and deadline_ns:
            self._show_chunks(values, deadline_ns - int(values["tick"]) * self._period_ns)

    def _show_chunks(self, row: Values, begins_ns: float) -> None:
        for chunk in self._chunks:
            if chunk["attempt"] != row["attempt"]:
                continue  # of an attempt that was over before it played, or that has yet to play
            first = int(chunk["obs_timestep"]) + int(chunk["first_action_offset"])
            self._writer.chunk(
                int(chunk["arrived_ns"]),
                round(begins_ns + first * self._dt_ns),
                chunk["actions"][: int(chunk["count"])],
                chunk["stages_ns"],
            )
        self._chunks = [one for one in self._chunks if one["attempt"] > row["attempt"]]


def live_view_layout(config: RunConfig, robot: Robot) -> LiveViewLayout:
    """Return what is shown of a run with ``config`` on ``robot``."""
    contract = config.contract
    return LiveViewLayout(
        title=f"{robot.name}, {Path(config.task).stem}",
        state_names=robot.contract.joint_names,
        action_names=robot.contract.action_names,
        cameras={name: robot.contract.cameras[name] for name in contract.camera_names},
        chunk_size=contract.chunk_size,
        step_s=config.strategy().step_s or contract.dt_s,
        origin_ns=time.monotonic_ns(),
        keeps_all=config.live_view.file is not None,
    )
