"""Compute the commands of a recording again, and compare them with the recorded ones.

``python -m runtime.eval_real.replay RUN``, where RUN is a folder of recordings, or one recording by
its name without suffix. Exit status: 0 every command is the same bit for bit, 1 a command differs,
2 there is no recording.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from policies.command_line import CommandLine
from policies.flag_builder import Flag, add_flags, from_flags
from policies.standard_streams import run_command
from policies.types import ActionChunk
from policies.yaml_config import InvalidConfig
from robots.motion_limiter import MotionLimiter
from runtime.control.chunk_executor import ChunkExecutor
from runtime.eval_real.control_enums import Signal
from runtime.eval_real.motion_state_machine import MotionStateMachine
from runtime.eval_real.recording import Recording

DIFFERENT, BAD_INPUT = 1, 2
_SILENT = logging.getLogger(f"{__name__}.silent")
"""A replay does not log the recorded faults again."""
_SILENT.disabled = True


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """The result of a replay.

    Attributes:
        commands: (n, A) float32, computed again.
        gaps: Number of rows missing from the recording; commands after the first gap may differ.
    """

    commands: NDArray[np.float32]
    gaps: int

    def first_difference(self, recording: Recording) -> int | None:
        """Index of the first row whose command differs in any bit; None if all are the same."""
        recorded = recording.rows["command"]
        same = (self.commands.view(np.uint32) == recorded.view(np.uint32)).all(axis=1)
        return None if same.all() else int(np.argmin(same))


def replay(recording: Recording) -> Replay:
    """Feed the recording's inputs to a new motion state machine.

    Raises:
        ValueError: The recording holds no commands.
    """
    if not recording.rows:
        raise ValueError("the recording holds no commands")
    machine = recording.config.make_state_machine(recording.robot_limits, log=_SILENT)
    rows = recording.rows
    commands = np.empty_like(rows["command"])
    chunks = _by_row(recording)
    stopping: MotionLimiter | None = None
    for i, number in enumerate(rows["row"].tolist()):
        signals = Signal(int(rows["signals"][i]))
        if signals & Signal.WATCHDOG:
            stopping = stopping or _watchdog_brake(machine, recording)
            commands[i] = stopping.brake()
            continue
        stopping = None
        _apply_signals(machine, signals, rows["pose"][i])
        for chunk in chunks.get(number, ()):
            machine.accept(chunk)
        commands[i] = machine.command(int(rows["advance"][i]))
    gaps = int(rows["row"][-1] - rows["row"][0]) + 1 - len(recording)
    return Replay(commands, gaps)


def _by_row(recording: Recording) -> dict[int, list[ActionChunk]]:
    chunks: dict[int, list[ActionChunk]] = {}
    for index, number in enumerate(recording.chunks.get("row", np.empty(0, np.int64)).tolist()):
        chunks.setdefault(number, []).append(recording.chunk(index))
    return chunks


def _apply_signals(machine: MotionStateMachine, signals: Signal, pose: NDArray[np.float32]) -> None:
    """Make the calls of ``signals`` in the order in which the control process makes them."""
    if signals & Signal.RESET:
        machine.reset(pose)
    if signals & Signal.START:
        machine.start()
    if signals & Signal.RESUME:
        machine.resume()
    if signals & Signal.STOP:
        machine.stop()
    if signals & Signal.FAIL:
        machine.fail("as recorded")


def _watchdog_brake(machine: MotionStateMachine, recording: Recording) -> MotionLimiter:
    """The watchdog's brake, from the last command that control wrote."""
    limiter = machine.stream.limiter
    robot_limits = recording.robot_limits
    brake = MotionLimiter(robot_limits.limits, recording.config.period_s, robot_limits.actions)
    last = limiter.command.astype(np.float64)
    brake.reset(last, last - limiter.velocity * recording.config.period_s)
    return brake


def weights(recording: Recording) -> NDArray[np.float32]:
    """(ticks, m) float32: the share of each chunk in the action of each policy tick played.

    Blending is linear. So chunk i is replaced by one that is 1 in column i and 0 elsewhere; the
    blended plan of these chunks holds the shares.
    """
    count = len(recording.chunks.get("row", ()))
    ratio = recording.config.ratio
    rows = recording.rows
    played = rows["played"].astype(bool) if rows else np.empty(0, bool)
    if not count or not played.any():
        return np.zeros((0, count), np.float32)
    executor = ChunkExecutor(
        replace(recording.config.contract, action_dim=count, action_names=()),
        recording.config.strategy(),
    )
    shares: list[NDArray[np.float32]] = []
    index_at = _indices_by_row(recording)
    for i, number in enumerate(rows["row"].tolist()):
        for index in index_at.get(number, ()):
            chunk = recording.chunk(index)
            column = np.zeros((len(chunk), count), np.float32)
            column[:, index] = 1
            executor.accept(replace(chunk, actions=column))
        tick = int(rows["tick"][i]) // ratio
        if played[i] and tick >= executor.next_tick and executor.covers(tick):
            shares.append(executor.command(tick).copy())
    return np.stack(shares) if shares else np.zeros((0, count), np.float32)


def _indices_by_row(recording: Recording) -> dict[int, list[int]]:
    indices: dict[int, list[int]] = {}
    for index, number in enumerate(recording.chunks["row"].tolist()):
        indices.setdefault(number, []).append(index)
    return indices


@dataclass(frozen=True, slots=True)
class ReplayCommand:
    """What is played again."""

    run: Annotated[Path, Flag("folder of an evaluation, or one rollout in it", positional=True)]


def find(run: Path) -> list[Path]:
    """Paths without suffix of the recordings in the folder ``run``, or of the recording ``run``."""
    if run.is_dir():
        return sorted(path.with_suffix("") for path in run.rglob("*.npz") if _is_whole(path))
    return [run.with_suffix("")] if _is_whole(run.with_suffix(".npz")) else []


def _is_whole(path: Path) -> bool:
    return path.is_file() and path.with_suffix(".json").is_file()


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    cli = CommandLine(
        prog="metronome replay",
        description="Recompute the commands of a recording and compare them.",
    )
    add_flags(cli, ReplayCommand)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Replay the recordings and print one line for each. Returns the exit status."""
    run = from_flags(ReplayCommand, parser().parse_args(argv)).run
    try:
        stems = find(run)
    except OSError as error:
        print(f"error: {str(run)[:200]}: {error.strerror}", file=sys.stderr)
        return BAD_INPUT
    if not stems:
        print(f"error: {run}: no recording there (an .npz and its .json)", file=sys.stderr)
        return BAD_INPUT
    status = 0
    for stem in stems:
        try:
            recording = Recording.load(stem)
            result = replay(recording)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidConfig) as error:
            print(f"error: {stem}: {error}", file=sys.stderr)
            return BAD_INPUT
        row = result.first_difference(recording)
        if row is None:
            print(f"{stem}: {len(recording)} commands, identical")
        else:
            status = DIFFERENT
            gaps = f"; {result.gaps} rows were not recorded" if result.gaps else ""
            print(f"{stem}: differs from row {row} of {len(recording)} on{gaps}")
    return status


if __name__ == "__main__":
    raise SystemExit(run_command(main))
