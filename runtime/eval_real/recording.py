"""A rollout on disk: every command with what it was made from. numpy arrays and JSON, no pickle.

``<stem>.npz`` holds the rows, one per command, and the chunks; ``<stem>.json`` what else a pilot
needs to make the same commands again, and what came of it.

Rows (n of them): ``row``, ``leg``, ``tick``, ``played``, ``phase``, ``signals``, ``advance``,
``source``, ``deadline_ns``, ``sent_ns``, ``captured_ns``, ``stamp_ns``, ``received_ns`` (n,) int64;
``command``, ``pose`` (n, A), ``state`` (n, S) float32. What the control process had counted of the
rollout by then: ``chunks``, ``dropped_stale``, ``discarded_actions``, ``starved_ticks``,
``staleness_ticks``, ``clamped_ticks`` (n,) int64, ``seam_jump`` (n,) float64; older recordings have
none of these, and a replay needs none.

Chunks (m): ``chunk_row`` (the row before whose command it was taken), ``chunk_leg``,
``chunk_ask``, ``chunk_obs_timestep``, ``chunk_first_action_offset``, ``chunk_count``,
``chunk_t_capture_ns``, ``chunk_arrived_ns`` (m,), ``chunk_stages_ns`` (m, 8), ``chunk_actions``
(m, T, A) float32.

``weights`` (ticks, m) float32: the share that each chunk has
in the policy's action for each tick that was played.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.types import STAGES, ActionChunk
from policies.yaml_config import parse_config
from runtime.eval_real.phases import Signal
from runtime.eval_real.run_config import RobotLimits, RunConfig
from runtime.evaluation.results import write_arrays, write_whole
from transport.shm.spsc_queue import QueueReader

FORMAT = 4
FLAT = 3
"""The format before, in which a mission had no more than its own fields and ``trace`` was text."""

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """One rollout.

    Attributes:
        rows, chunks: By column, see the module; chunk columns without their prefix.
        mission, body: What the pilot was made for.
        facts: What else is to be known: seed, outcome, events.
    """

    rows: Columns
    chunks: Columns
    config: RunConfig
    robot_limits: RobotLimits
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows["row"])

    def chunk(self, index: int) -> ActionChunk:
        columns = self.chunks
        return ActionChunk(
            actions=columns["actions"][index, : columns["count"][index]],
            obs_timestep=int(columns["obs_timestep"][index]),
            t_capture_ns=int(columns["t_capture_ns"][index]),
            first_action_offset=int(columns["first_action_offset"][index]),
            stages_ns=dict(zip(STAGES, columns["stages_ns"][index].tolist(), strict=True)),
        )

    def save(self, stem: Path, weights: NDArray[np.float32]) -> None:
        """Write ``<stem>.npz`` and ``<stem>.json``, whole or not at all. Raises ``OSError``."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        chunks = {f"chunk_{name}": column for name, column in self.chunks.items()}
        write_arrays(stem.with_suffix(".npz"), {"weights": weights, **self.rows, **chunks})
        text = {
            "format": FORMAT,
            "mission": json.loads(self.config.to_json()),
            "body": self.robot_limits.to_dict(),
            **self.facts,
        }
        write_whole(stem.with_suffix(".json"), json.dumps(text, indent=1).encode())

    @classmethod
    def load(cls, stem: Path) -> Recording:
        """What ``save`` wrote.

        Raises:
            OSError, ValueError, KeyError, ConfigError: It is not there, or not such a recording.
        """
        facts = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        made_as = facts.pop("format", None)
        if made_as not in (FLAT, FORMAT):
            raise ValueError(
                f"{stem}.json: not a recording of format {FLAT} or {FORMAT}, but another version's"
            )
        said = facts.pop("mission")
        if made_as == FLAT:
            said = {**said, "trace": said.get("trace") or None}
            said["connection"] = said.pop("wishes", {})
        config = parse_config(RunConfig, said, source=f"{stem}.json: mission")
        robot_limits = RobotLimits.from_dict(facts.pop("body"))
        with np.load(stem.with_suffix(".npz"), allow_pickle=False) as arrays:
            columns = dict(arrays)
        columns.pop("weights")
        chunks = {
            name.removeprefix("chunk_"): columns.pop(name)
            for name in list(columns)
            if name.startswith("chunk_")
        }
        return cls(columns, chunks, config, robot_limits, facts)


class RecordingWriter:
    """Collects what the mailbox brings, rollout by rollout.

    Args:
        ticks, accepted: The queues that the control process fills.
    """

    def __init__(self, ticks: QueueReader, accepted: QueueReader) -> None:
        self._ticks, self._accepted = ticks, accepted
        self._rows: dict[int, dict[str, NDArray[Any]]] = {}
        self._chunks: list[dict[str, NDArray[Any]]] = []

    def drain(self) -> None:
        """Take what is there. Chunks first: a row is complete when it comes."""
        for queue, keep in ((self._accepted, self._keep_chunk), (self._ticks, self._keep_row)):
            while (views := queue.peek()) is not None:
                keep({name: value.copy() for name, value in views.items()})
                queue.release()

    def _keep_chunk(self, values: dict[str, NDArray[Any]]) -> None:
        self._chunks.append(values)

    def _keep_row(self, values: dict[str, NDArray[Any]]) -> None:
        # A successor repeats the row that its predecessor may have died over.
        self._rows.setdefault(int(values["row"]), values)

    def rest(self) -> None:
        """Forget what was before the rollout that begins now."""
        self.drain()
        self._rows.clear()
        self._chunks.clear()

    def take(self, config: RunConfig, robot_limits: RobotLimits) -> Recording:
        """The rollout so far, from its start on."""
        self.drain()
        rows = [self._rows[number] for number in sorted(self._rows)]
        starts = [i for i, row in enumerate(rows) if row["signals"] & Signal.START]
        rows = rows[starts[-1] if starts else len(rows) :]
        first = int(rows[0]["row"]) if rows else 0
        chunks = [chunk for chunk in self._chunks if chunk["row"] >= first]
        return Recording(_columns(rows), _columns(chunks), config, robot_limits)


def _columns(rows: list[dict[str, NDArray[Any]]]) -> Columns:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}
