"""The journal of an evaluation: an episode is on disk before it counts.

``<task>_episodes.jsonl`` lies beside the result file, which is computed from it. Its first line
says which run it is of; each further line is a finished episode with all its samples, or one that
ended in an error. A line costs the same however many there are before it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from runtime.control.chunk_executor import ExecutorStatistics
from runtime.errors import JournalError
from runtime.evaluation.episode_result import Episode, ErroredEpisode

_ARRAYS = ("action_age_s", "lateness_s", "answer_delay_s", "drawn_latency_s")
"""Fields of ``Episode`` that are arrays."""


@dataclass(frozen=True, slots=True, eq=False)
class JournalContent:
    """What a journal has.

    Attributes:
        run: The first line.
        episodes: The finished ones, in the order in which they ended.
        ends: Where the first line and then the line of each episode ends, in bytes.
    """

    run: Mapping[str, Any]
    episodes: tuple[Episode, ...]
    ends: tuple[int, ...]


class EpisodeJournal:
    """A journal that is open for one writer; the kernel frees its lock if the process dies.

    Args:
        path: The file. What it has stays until an episode is added.

    Raises:
        JournalError: Another process has it open.
        OSError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._first_line = b""
        self._fd = _locked(path)

    def read(self) -> JournalContent | None:
        """Return what the file has; None if it has nothing.

        A last line that was not written in full, and episodes that ended in an error, are left out.

        Raises:
            JournalError: A line cannot be read.
        """
        with self.path.open("rb") as file:
            lines = [line for line in file if line.endswith(b"\n")]
        if not lines:
            return None
        run = self._decode(lines[0], 1).get("run")
        if not isinstance(run, dict):
            raise JournalError(f"{self.path}: line 1: got no run, expected what the run is of")
        end = len(lines[0])
        episodes, ends = [], [end]
        for number, line in enumerate(lines[1:], 2):
            end += len(line)
            entry = self._decode(line, number)
            if "error" in entry:
                continue
            try:
                episodes.append(_episode(entry["episode"]))
            except (KeyError, TypeError, ValueError) as error:
                raise JournalError(
                    f"{self.path}: line {number}: no episode: {error!r}, expected all its fields"
                ) from error
            ends.append(end)
        return JournalContent(run, tuple(episodes), tuple(ends))

    def _decode(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise JournalError(f"{self.path}: line {number}: no JSON: {error}") from error
        if not isinstance(entry, dict):
            raise JournalError(f"{self.path}: line {number}: got {entry!r:.40}, expected an object")
        return entry

    def begin(self, run: Mapping[str, Any]) -> None:
        """Describe a new run. It replaces what the file has once an episode is added."""
        self._first_line = _line({"run": dict(run)})

    def keep(self, content: JournalContent, count: int) -> None:
        """Continue a run after its first ``count`` episodes; the others are removed.

        Raises:
            OSError: The file cannot be written.
        """
        os.ftruncate(self._fd, content.ends[count])

    def add(self, episode: Episode | ErroredEpisode) -> None:
        """Add an episode; it is on the disk when this returns.

        Raises:
            OSError: The file cannot be written; what it had before stays.
        """
        kind = "episode" if isinstance(episode, Episode) else "error"
        line = _line({kind: _plain(episode)})
        if self._first_line:
            os.ftruncate(self._fd, 0)
        before = os.fstat(self._fd).st_size
        try:
            _write(self._fd, self._first_line + line)
            os.fsync(self._fd)
            if self._first_line:
                _sync_folder(self.path.parent)
        except OSError:
            os.ftruncate(self._fd, before)
            raise
        self._first_line = b""

    def close(self) -> None:
        """Let others write; an empty file is removed. Idempotent."""
        if self._fd < 0:
            return
        if not os.fstat(self._fd).st_size:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _locked(path: Path) -> int:
    """Create ``path`` if there is none, and lock it; return a descriptor that appends to it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                return fd
        except BlockingIOError:
            os.close(fd)
            raise JournalError(
                f"{path}: another evaluation writes this result, expected none: wait for its end, "
                "or choose another --output_dir"
            ) from None
        os.close(fd)  # an evaluation without episodes has just removed it


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _sync_folder(folder: Path) -> None:
    """Keep the entries of ``folder`` on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _plain(episode: Episode | ErroredEpisode) -> dict[str, Any]:
    if isinstance(episode, ErroredEpisode):
        return dataclasses.asdict(episode)
    return dataclasses.asdict(episode) | {
        **{name: getattr(episode, name).tolist() for name in _ARRAYS},
        "stages_ns": {
            name: np.asarray(durations, np.int64).tolist()
            for name, durations in episode.stages_ns.items()
        },
    }


def _episode(plain: Mapping[str, Any]) -> Episode:
    return Episode(
        **{
            **plain,
            "executor": ExecutorStatistics(**plain["executor"]),
            **{name: np.asarray(plain[name], np.float64) for name in _ARRAYS},
        }
    )
