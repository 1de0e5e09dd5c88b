"""A rollout on disk: every command with its inputs. numpy arrays and JSON, no pickle.

``<stem>.npz`` holds the rows, one per command, and the chunks. ``<stem>.json`` holds the run's
configuration (``mission``) and the robot's limits (``body``), from which a replay computes the same
commands again, and the outcome.

Rows (n of them): ``row``, ``leg`` (the attempt), ``tick``, ``played``, ``phase``, ``signals``,
``advance``, ``source``, ``deadline_ns``, ``sent_ns``, ``captured_ns``, ``stamp_ns``,
``received_ns`` (n,) int64; ``command``, ``pose`` (n, A), ``state`` (n, S) float32. Counts of the
rollout up to the row: ``chunks``, ``dropped_stale``, ``discarded_actions``, ``starved_ticks``,
``staleness_ticks``, ``clamped_ticks`` (n,) int64, ``seam_jump`` (n,) float64. Older recordings have
no counts, and a replay needs none.

Chunks (m): ``chunk_row`` (the chunk was taken before the command of this row), ``chunk_leg``,
``chunk_ask`` (the request it answers), ``chunk_obs_timestep``, ``chunk_first_action_offset``,
``chunk_count``, ``chunk_t_capture_ns``, ``chunk_arrived_ns`` (m,) int64, ``chunk_stages_ns`` (m, 8)
int64, ``chunk_actions`` (m, T, A) float32.

``weights`` (ticks, m) float32: the share of each chunk in the policy's action for each tick played.

In a ``Recording`` the columns ``leg`` and ``ask`` are called ``attempt`` and ``request_seq``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from policies.types import STAGES, ActionChunk
from policies.yaml_config import as_plain, parse_config
from runtime.eval_real.control_enums import Signal
from runtime.eval_real.live_rollout import LiveRollout
from runtime.eval_real.run_config import RobotLimits, RunConfig
from runtime.evaluation.results import write_arrays, write_atomically
from transport.shm.spsc_queue import QueueReader

FORMAT = 4
FLAT = 3
"""The format before: ``mission`` has fewer keys, and its ``trace`` is a text, empty for none."""

_COLUMNS_ON_DISK = {"attempt": "leg", "request_seq": "ask"}
_COLUMNS = {stored: name for name, stored in _COLUMNS_ON_DISK.items()}
_CONFIG_ON_DISK = {"connection": "wishes"}
_CONFIG = {stored: name for name, stored in _CONFIG_ON_DISK.items()}
"""Names in this program and on disk, where they differ; the file format keeps the older names."""

Columns = Mapping[str, NDArray[Any]]
"""Arrays of equal length by name."""
T = TypeVar("T")


def _renamed(values: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """``values`` in the same order, with the keys in ``names`` replaced."""
    return {names.get(name, name): value for name, value in values.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """One rollout.

    Attributes:
        rows, chunks: Columns as in the module's docstring; those of chunks without their prefix.
        config: The run's configuration.
        robot_limits: The robot's limits.
        facts: Further entries of the JSON file: seed, outcome, faults, videos.
    """

    rows: Columns
    chunks: Columns
    config: RunConfig
    robot_limits: RobotLimits
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows["row"])

    def chunk(self, index: int) -> ActionChunk:
        """Chunk ``index``, in the order in which the chunks were taken."""
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
        rows, chunks = (_renamed(columns, _COLUMNS_ON_DISK) for columns in (self.rows, self.chunks))
        chunks = {f"chunk_{name}": column for name, column in chunks.items()}
        write_arrays(stem.with_suffix(".npz"), {"weights": weights, **rows, **chunks})
        text = {
            "format": FORMAT,
            "mission": _renamed(as_plain(self.config), _CONFIG_ON_DISK),
            "body": self.robot_limits.to_dict(),
            **self.facts,
        }
        write_atomically(stem.with_suffix(".json"), json.dumps(text, indent=1).encode())

    @classmethod
    def load(cls, stem: Path) -> Recording:
        """Read the files that ``save`` wrote.

        Raises:
            OSError: A file is missing or cannot be read.
            ValueError, KeyError, TypeError, AttributeError, InvalidConfig: It is not a recording of
                this format or of the one before.
        """
        facts = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        made_as = facts.pop("format", None)
        if made_as not in (FLAT, FORMAT):
            raise ValueError(
                f"{stem}.json: not a recording of format {FLAT} or {FORMAT}, but another version's"
            )
        mission = _renamed(facts.pop("mission"), _CONFIG)
        if made_as == FLAT:
            mission["trace"] = mission.get("trace") or None
        config = parse_config(RunConfig, mission, source=f"{stem}.json: mission")
        robot_limits = RobotLimits.from_dict(facts.pop("body"))
        with np.load(stem.with_suffix(".npz"), allow_pickle=False) as arrays:
            columns = dict(arrays)
        columns.pop("weights")
        chunks = {
            name.removeprefix("chunk_"): columns.pop(name)
            for name in list(columns)
            if name.startswith("chunk_")
        }
        rows, chunks = _renamed(columns, _COLUMNS), _renamed(chunks, _COLUMNS)
        return cls(rows, chunks, config, robot_limits, facts)


class RecordingWriter:
    """Collects the rows and chunks of a rollout from shared memory.

    Args:
        ticks, accepted: Queues that the control process fills with commands and accepted chunks.
        live: Shows them; None for no live view.
    """

    def __init__(
        self, ticks: QueueReader, accepted: QueueReader, live: LiveRollout | None = None
    ) -> None:
        self._ticks, self._accepted, self._live = ticks, accepted, live
        self._rows: dict[int, dict[str, NDArray[Any]]] = {}
        self._chunks: list[dict[str, NDArray[Any]]] = []

    def drain(self) -> None:
        """Empty both queues. Chunks first, so that those of a row are there when it is taken."""
        for queue, keep in ((self._accepted, self._keep_chunk), (self._ticks, self._keep_row)):
            while (views := queue.peek()) is not None:
                keep({name: value.copy() for name, value in views.items()})
                queue.release()

    def _keep_chunk(self, values: dict[str, NDArray[Any]]) -> None:
        self._chunks.append(values)
        if self._live is not None:
            self._live.chunk(values)

    def _keep_row(self, values: dict[str, NDArray[Any]]) -> None:
        # The watchdog repeats the row during which the control process may have died.
        if self._rows.setdefault(int(values["row"]), values) is values and self._live is not None:
            self._live.row(values)

    def clear(self) -> None:
        """Forget the rows and chunks so far, before a rollout begins."""
        self.drain()
        self._rows.clear()
        self._chunks.clear()

    def take(self, config: RunConfig, robot_limits: RobotLimits) -> Recording:
        """The rollout so far, from its last ``Signal.START`` on; empty columns without one."""
        self.drain()
        rows = [self._rows[number] for number in sorted(self._rows)]
        starts = [i for i, row in enumerate(rows) if row["signals"] & Signal.START]
        rows = rows[starts[-1] if starts else len(rows) :]
        first = int(rows[0]["row"]) if rows else 0
        chunks = [chunk for chunk in self._chunks if chunk["row"] >= first]
        return Recording(_columns(rows), _columns(chunks), config, robot_limits)


def _columns(rows: list[dict[str, NDArray[Any]]]) -> Columns:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}
