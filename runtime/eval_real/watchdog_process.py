"""The watchdog process brings the arm to rest when the control process cannot.

The supervisor starts it as ``python -m runtime.eval_real.watchdog_process``.

It connects to the robot beforehand. It sleeps until the control process ends (the kernel wakes it
at once) or has not commanded a moving arm for too long. Then

* it kills the control process, so that one that was only held up cannot send outdated commands
  later;
* it sends the last command again. Control writes each command to shared memory before sending it,
  so the arm either receives a command that was still to be sent, or the same one again;
* from control's next deadline on it brakes within the robot's limits. Then it commands that pose
  until the parent releases it, or for ``ORPHAN_HOLD_S`` if the parent has died.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robots.base import Robot, Role
from robots.errors import RobotLost
from robots.motion_limiter import MotionLimiter
from runtime.control.clock import MonotonicClock
from runtime.control.realtime import Realtime
from runtime.eval_real.control_enums import MOVING, Phase, Signal
from runtime.eval_real.event_log import ORPHAN_HOLD_S, EventLog
from runtime.eval_real.run_config import RunConfig
from runtime.eval_real.shared_state import SharedState
from runtime.eval_real.worker_process import ParentPipe, child_main
from transport.channel import Arrays
from transport.child_process import send_event
from transport.shm.text_field import put_text

logger = logging.getLogger(__name__)

POLL_S = 0.005
"""Interval of the checks for a stall; the kernel reports an end at once."""
STALLED_PERIODS, STALLED_S = 5, 0.1
"""Control has stalled when the arm moves and its command is late by the longer of the two."""
GIVE_UP_S = 5.0
"""Time for which a robot may refuse commands before the watchdog gives up."""


class Watchdog:
    """Watches one control process and takes over its robot.

    Args:
        config: The run's configuration.
        shared_state: The memory shared with the other processes.
        robot: Connected; or not yet, if only one process can be connected at a time.
        pidfd: Descriptor of the control process (``pidfd_open``).
        input_fd: A line or end of file here releases the watchdog.
    """

    def __init__(
        self, config: RunConfig, shared_state: SharedState, robot: Robot, pidfd: int, input_fd: int
    ) -> None:
        self._config, self._shared_state, self._robot = config, shared_state, robot
        self._input_fd = input_fd
        self._pidfd = pidfd
        self._progress = shared_state.latest_reader("progress")
        self._commands = shared_state.latest_reader("commands")
        self._beat = shared_state.watchdog_heartbeat
        self._stall_ns = round(1e9 * max(STALLED_S, STALLED_PERIODS * config.period_s))
        self._parent = os.getppid()
        self._why = "the control process died"
        self._refused_ns = 0
        # Made now, so that the arm does not wait for it later.
        self._planner = MotionLimiter(robot.limits, config.period_s, robot.contract.actions)
        self._recorder = _Recorder(shared_state)

    def watch(self) -> bool:
        """Wait until control ends, or kill it when it stalls; whether to take over."""
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        while not poller.poll(POLL_S * 1e3):
            self._beat.store(time.monotonic_ns())
            if self._stalled():
                self._why = "the control process had stalled and was killed"
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                poller.poll()
        self._progress.refresh()
        return bool(self._progress.sequence) and self._phase is not Phase.ENDED

    @property
    def _phase(self) -> Phase:
        return Phase(int(self._progress.values["phase"]))

    def _stalled(self) -> bool:
        self._progress.refresh()
        if not self._progress.sequence or self._phase not in MOVING:
            return False
        self._commands.refresh()
        return time.monotonic_ns() - int(self._commands.values["deadline_ns"]) > self._stall_ns

    def take_over(self) -> None:
        """Stop the arm, then hold it until released.

        Raises:
            RobotLost: The robot refused commands for ``GIVE_UP_S``.
        """
        if self._robot.role is None:
            self._robot.connect(Role.CONTROL, self._config.connect_timeout_s)
        if not self._commands.refresh() and not self._commands.sequence:
            return  # control never sent a command
        period_s, period_ns = self._config.period_s, round(self._config.period_s * 1e9)
        row = self._commands.values
        last = row["command"].astype(np.float64)
        command = row["command"]
        sent = self._send(command)
        planner, recorder = self._planner, self._recorder
        planner.reset(last, last - row["velocity"] * period_s)
        recorder.take_over(row, self._progress.values)
        if sent:
            recorder.record_sent()
        logger.error("%s: the watchdog brings the arm to rest", self._why)
        clock, deadline_ns = MonotonicClock(), int(row["deadline_ns"])
        rested, left_ns = False, 0
        while not self._released(left_ns):
            now_ns = time.monotonic_ns()
            self._beat.store(now_ns)
            deadline_ns += max(1, -((deadline_ns - now_ns) // period_ns)) * period_ns
            clock.wait_until_ns(deadline_ns)
            if sent:
                command = planner.brake()
                recorder.write_command(command, planner.velocity, deadline_ns)
            sent = self._send(command)
            if not sent:
                continue
            recorder.record_sent()
            if planner.at_rest and not rested:
                rested = True
                logger.error("at rest after a fault, held by the watchdog")
                recorder.latch(self._why)
            if os.getppid() != self._parent and not left_ns and rested:
                left_ns = now_ns + round(1e9 * ORPHAN_HOLD_S)

    def _send(self, command: NDArray[np.float32]) -> bool:
        """Send ``command``; False if the robot refused it, and the caller must send it again."""
        try:
            self._robot.send_action(command)
        except RobotLost:
            now_ns = time.monotonic_ns()
            self._refused_ns = self._refused_ns or now_ns
            if now_ns - self._refused_ns > GIVE_UP_S * 1e9:
                raise
            return False
        self._refused_ns = 0
        return True

    def _released(self, left_ns: int) -> bool:
        """Whether the parent released the watchdog, or died and the hold time is over."""
        if left_ns:
            return time.monotonic_ns() > left_ns
        if os.getppid() != self._parent:
            return False
        readable, _, _ = select.select([self._input_fd], [], [], 0)
        return bool(readable)


class _Recorder:
    """Writes the shared-memory fields of a control process that has died."""

    def __init__(self, shared_state: SharedState) -> None:
        self._ticks = shared_state.queue_writer("ticks")
        self._commands = shared_state.latest_writer("commands")
        self._progress = shared_state.latest_writer("progress")
        self._row: dict[str, NDArray[Any]] = {}
        self._last_progress: dict[str, NDArray[Any]] = {}

    def take_over(self, row: Arrays, progress: Arrays) -> None:
        """Become the writer of control's fields. Control must have ended.

        Args:
            row, progress: Control's last values of ``commands`` and ``progress``.
        """
        for writer in (self._ticks, self._commands, self._progress):
            writer.take_over()
        self._row = {name: value.copy() for name, value in row.items()}
        self._last_progress = {name: value.copy() for name, value in progress.items()}

    def write_command(
        self, command: NDArray[np.float32], velocity: NDArray[np.float64], deadline_ns: int
    ) -> None:
        """Write a command to shared memory before it is sent, for a successor of the watchdog."""
        row = self._row
        row["row"] += 1
        row["played"][...] = 0
        row["phase"][...], row["signals"][...] = Phase.STOP, Signal.WATCHDOG
        row["advance"][...], row["deadline_ns"][...] = 1, deadline_ns
        row["command"][:], row["velocity"][:] = command, velocity
        views = self._commands.claim()
        for name, value in row.items():
            np.copyto(views[name], value)
        self._commands.publish()

    def record_sent(self) -> None:
        """Record the command just sent. If control recorded it already, the row is the same."""
        views = self._ticks.claim()
        if views is not None:
            for name, value in views.items():
                if name != "sent_ns":
                    np.copyto(value, self._row[name])
            views["sent_ns"][...] = time.monotonic_ns()
            self._ticks.publish()

    def latch(self, why: str) -> None:
        """Publish that the arm is at rest after the fault ``why``."""
        views = self._progress.claim()
        for name, value in self._last_progress.items():
            views[name][...] = value
        views["phase"][...] = Phase.FAULT
        put_text(views["fault"], why)
        self._progress.publish()


def _work(config: RunConfig, shared_state: SharedState, parent: ParentPipe, pidfd: int) -> int:
    robot = config.make_robot()
    with robot:
        if robot.shareable:
            parent.connect(robot, Role.CONTROL, config.connect_timeout_s)
        with Realtime(config.realtime):
            watchdog = Watchdog(config, shared_state, robot, pidfd, parent.input_fd)
            send_event("ready")
            if watchdog.watch():
                # Control was the only writer of the queue of events until it died.
                log = EventLog(shared_state.queue_writer("events"))
                logging.basicConfig(level=logging.INFO, handlers=[log], force=True)
                watchdog.take_over()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the watchdog process. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    at = arguments.index("--control")
    pidfd = int(arguments[at + 1])
    del arguments[at : at + 2]
    return child_main(
        "watchdog",
        lambda config, shared_state, parent: _work(config, shared_state, parent, pidfd),
        arguments,
    )


if __name__ == "__main__":
    raise SystemExit(main())
