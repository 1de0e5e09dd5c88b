"""Runs rollouts one after another, attended by an operator or unattended."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.control.chunk_executor import ExecutorStatistics
from runtime.datasets.dataset_recorder import DatasetRecorder
from runtime.datasets.errors import DatasetError
from runtime.datasets.layout import spool_folder
from runtime.datasets.spooled_episode import picture_times, write_columns
from runtime.errors import RuntimeFault
from runtime.eval_real.control_enums import MOVING, ControlCommand, Phase, Signal
from runtime.eval_real.dataset_episode import frames_of
from runtime.eval_real.operator_console import QUIT, OperatorConsole
from runtime.eval_real.recording import Recording
from runtime.eval_real.replay import replay, weights
from runtime.eval_real.rollout_counts import last_counts
from runtime.eval_real.run_config import RobotLimits
from runtime.eval_real.supervisor import Supervisor
from runtime.evaluation.episode_result import Episode
from runtime.latency_stats import StageTimes
from runtime.trace import recorder as trace

BEGIN_WITHIN_S = 20.0
"""For the first chunk, once the arm waits for it."""
ACKED_WITHIN_S = 20.0
"""For the control process to read a command."""
SAVED_WITHIN_S = 120.0
"""For the videos to be written."""
SPOOLED_WITHIN_S = 60.0
"""For the pictures of a dataset to be on the disk."""
RECORDED_WITHIN_S = 600.0
MOST_PENDING = 1
"""Episodes that may still be encoded when a rollout begins."""
POLL_S = 0.005
"""Wait for a key between two polls of the processes."""


class SessionOver(RuntimeFault):
    """No more rollouts: something was lost, and the operator did not resume or there is none."""


class Interrupted(RuntimeFault):
    """The session was ended by a key, SIGINT or SIGTERM."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """The result of one rollout.

    Attributes:
        episode: As in simulation; ``seed`` numbers the rollouts if the robot takes no seed.
        judged: Whether the robot or the operator reported success or failure.
        clamped_ticks: Commands that the limits changed.
        faults: The reason of each stop during the rollout.
        stem: Path of the recording's files without their suffix.
        replayed: Whether the recording replays to the same commands, bit for bit.
    """

    episode: Episode
    judged: bool
    clamped_ticks: int
    faults: tuple[str, ...]
    stem: Path
    replayed: bool

    def details(self) -> dict[str, Any]:
        """Entries of the result file beside those of every episode."""
        return {
            "judged": self.judged,
            "clamped_ticks": self.clamped_ticks,
            "faults": list(self.faults),
            "recording": str(self.stem),
            "replays_bit_for_bit": self.replayed,
        }


class RolloutSession:
    """Runs the rollouts of one evaluation.

    Args:
        supervisor: Runs the processes; the arm is at rest.
        robot_limits: The robot's limits, for recordings.
        operator: Reads the operator's keys.
        folder: For recordings and videos.
        unattended: Ask no questions, and end the session at a fault.
        new_server: Restarts the private server if it died and returns its address; else returns
            None.
        tell: Called with one line of text for every event.
        recorder: Adds the rollouts to a dataset; None for no dataset.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        robot_limits: RobotLimits,
        operator: OperatorConsole,
        *,
        folder: Path,
        unattended: bool,
        new_server: Callable[[], str | None],
        tell: Callable[[str], None],
        recorder: DatasetRecorder | None = None,
    ) -> None:
        self._supervisor, self._robot_limits, self._operator = supervisor, robot_limits, operator
        self._folder, self._unattended = folder, unattended
        self._new_server, self._tell = new_server, tell
        self._recorder = recorder
        self._spool: Path | None = None
        self._faults: list[str] = []
        self._unwritten = ""

    def run(self, seeds: Iterable[int]) -> Iterator[Rollout]:
        """Run one rollout per seed and yield each result. The arm is at rest in between.

        Raises:
            SessionOver, Interrupted: There are no more rollouts; the arm is at rest.
        """
        for index, seed in enumerate(seeds):
            if not self._unattended:
                answer = self._ask(f"rollout {index}, seed {seed}:", {"\n": "start", QUIT: "quit"})
                if answer == QUIT:
                    raise Interrupted
            over: RuntimeFault | None = None
            try:
                with trace.span("rollout", seed):
                    self._spool_pictures(index)
                    self._play(seed)
            except (SessionOver, Interrupted) as error:
                over = error
            except KeyboardInterrupt:
                over = Interrupted()
                self._stop()
            rollout = self._conclude(index, seed, cut=over is not None)
            if rollout is not None:
                yield rollout
            if over is not None:
                raise over
            if self._unwritten:
                raise SessionOver(self._unwritten)

    def _play(self, seed: int) -> None:
        supervisor = self._supervisor
        if supervisor.dead:
            self._restore()
        supervisor.recorder.clear()
        self._faults.clear()
        self._began_s = time.monotonic()
        supervisor.record_video()
        supervisor.send_command(ControlCommand.START, seed)
        self._wait_acked()
        waiting_since_s = time.monotonic()
        while True:
            supervisor.poll()
            if {"control", "watchdog"} <= set(supervisor.dead):
                raise SessionOver("neither the control process nor its watchdog reach the robot")
            phase = supervisor.phase
            if phase is Phase.HOLD and supervisor.acked_command:
                return
            if phase in (Phase.FAULT, Phase.ENDED):
                self._on_fault()
                waiting_since_s = time.monotonic()
                continue
            if phase is not Phase.WAIT:
                waiting_since_s = time.monotonic()
            elif time.monotonic() - waiting_since_s > BEGIN_WITHIN_S:
                self._stop()
                raise SessionOver(f"no first chunk within {BEGIN_WITHIN_S:g} s")
            if self._operator.key(POLL_S) and phase in (*MOVING, Phase.WAIT):
                supervisor.send_command(ControlCommand.EMERGENCY)
                self._tell("a key was pressed: stopping")

    def _wait_acked(self) -> None:
        """Wait until the control process has read the last command, or has died."""
        supervisor = self._supervisor
        if not supervisor.wait_for(
            lambda: supervisor.acked_command or "control" in supervisor.dead, ACKED_WITHIN_S
        ):
            raise SessionOver("the control process does not read its commands")

    def _on_fault(self) -> None:
        """Resume or end the rollout after a latched fault, as the operator chooses.

        Raises:
            SessionOver: The session is unattended, or cannot go on.
            Interrupted: The operator quit.
        """
        supervisor = self._supervisor
        reason = supervisor.fault or "the control process ended"
        self._faults.append(reason)
        if self._unattended:
            raise SessionOver(reason)
        answer = self._ask(
            f"stopped: {reason}.", {"r": "resume", "e": "end this rollout", QUIT: "quit"}
        )
        if answer == QUIT:
            raise Interrupted
        self._restore()
        supervisor.send_command(ControlCommand.RESUME if answer == "r" else ControlCommand.RELEASE)
        self._wait_acked()

    def _restore(self) -> None:
        try:
            self._supervisor.restore(self._new_server())
        except RuntimeFault as error:
            raise SessionOver(str(error)) from error

    def _stop(self) -> None:
        with contextlib.suppress(KeyboardInterrupt):  # the arm is stopping already
            if not self._supervisor.stop():
                self._tell("the arm did not come to rest in time")

    def _ask(self, question: str, choices: dict[str, str]) -> str:
        return self._operator.ask(question, choices, self._supervisor.poll)

    # Results

    def _conclude(self, index: int, seed: int, *, cut: bool) -> Rollout | None:
        """Save the recording and return the result; None if no tick was played."""
        supervisor = self._supervisor
        supervisor.poll()
        sensing = supervisor.sensing_report()
        recording = supervisor.recorder.take(supervisor.config, self._robot_limits)
        if not recording.rows or not recording.rows["played"].any():
            self._discard_spool()
            return None
        if sensing["reports_outcome"]:
            judged, success = True, bool(sensing["success"])
        else:
            judged, success = self._judge(cut)
        stem = self._folder / f"rollout_{index:03d}"
        identical = replay(recording).first_difference(recording) is None
        if not identical:
            self._tell(f"{stem}: the recording does not replay to the same commands")
        facts = {
            "seed": seed,
            "judged": judged,
            "success": success,
            "reward": sensing["reward"],
            "faults": list(self._faults),
            "videos": supervisor.save_video(str(stem), SAVED_WITHIN_S),
        }
        recording = replace(recording, facts=facts)
        try:
            recording.save(stem, weights(recording))
        except OSError as error:  # the result is known all the same
            self._unwritten = f"{stem}: not recorded: {error.strerror or error}"
            self._faults.append(self._unwritten)
        self._add_to_dataset(recording)
        counts = last_counts(recording.rows)
        episode = _episode(recording, counts.executor, time.monotonic() - self._began_s)
        verdict = ("success" if success else "failure") if judged else "not judged"
        self._tell(
            f"rollout {index}, seed {seed}: {verdict}, "
            f"{episode.horizon} ticks, {episode.missed_ticks} missed, "
            f"{episode.executor.starved_ticks} starved"
        )
        faults = tuple(self._faults)
        return Rollout(episode, judged, counts.clamped_ticks, faults, stem, identical)

    def _spool_pictures(self, index: int) -> None:
        """Begin to keep every picture for the dataset.

        Raises:
            SessionOver: The recorder failed.
        """
        recorder = self._recorder
        if recorder is None:
            return
        try:
            self._supervisor.wait_for(
                lambda: recorder.pending <= MOST_PENDING, RECORDED_WITHIN_S, "the dataset"
            )
        except DatasetError as error:
            raise SessionOver(str(error)) from error
        self._spool = spool_folder(recorder.root, f"rollout_{index}")
        self._supervisor.spool_pictures(self._spool)

    def _discard_spool(self) -> None:
        if self._spool is not None:
            self._supervisor.end_spool(SPOOLED_WITHIN_S)
            shutil.rmtree(self._spool, ignore_errors=True)
            self._spool = None

    def _add_to_dataset(self, recording: Recording) -> None:
        """Give the rollout to the dataset's recorder; a failure ends the session afterwards."""
        recorder, spool = self._recorder, self._spool
        if recorder is None or spool is None:
            return
        self._spool = None
        problem = self._supervisor.end_spool(SPOOLED_WITHIN_S)
        config = recording.config
        try:
            if not problem:
                columns, shown = frames_of(recording, picture_times(spool))
                write_columns(spool, columns, shown, config.language or Path(config.task).stem)
                recorder.add(spool)
        except (DatasetError, OSError, ValueError) as error:
            problem = str(error)
        if problem:
            shutil.rmtree(spool, ignore_errors=True)
            self._unwritten = f"not in the dataset: {problem}"
            self._faults.append(self._unwritten)

    def _judge(self, cut: bool) -> tuple[bool, bool]:
        """(judged, success) as the operator says; not judged when unattended or cut short."""
        if self._unattended or cut:
            return False, False
        answer = self._ask("how did it go?", {"s": "success", "f": "failure", "k": "skip"})
        return answer in ("s", "f"), answer == "s"


def _episode(recording: Recording, executor: ExecutorStatistics, wall_s: float) -> Episode:
    rows, chunks = recording.rows, recording.chunks
    played = rows["played"].astype(bool)
    ratio = recording.config.ratio
    stages = StageTimes()
    for index in range(len(chunks.get("row", ()))):
        stages.add(recording.chunk(index).stages_ns)
    known = played & (rows["captured_ns"] > 0)
    facts = recording.facts
    missed = np.where(rows["signals"] & Signal.RESET, 0, rows["advance"] - 1)[played]
    return Episode(
        seed=facts["seed"],
        success=facts["success"],
        reward=facts["reward"],
        horizon=-(-int(played.sum() + missed.sum()) // ratio),
        missed_ticks=int(missed.sum()),
        executor=executor,
        action_age_s=(rows["sent_ns"] - rows["captured_ns"])[known] / 1e9,
        lateness_s=(rows["sent_ns"] - rows["deadline_ns"])[played] / 1e9,
        stages_ns=stages.samples_ns(),
        wall_s=wall_s,
    )
