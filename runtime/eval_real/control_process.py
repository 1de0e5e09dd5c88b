"""The control process: the loop that commands the robot, and nothing else.

The supervisor starts it as ``python -m runtime.eval_real.control_process``.

It reads chunks from shared memory and sends commands through the robot's driver. It imports neither
torch nor zmq nor a simulator. While it runs it opens no file and writes to no terminal, because
either may block; its log goes through shared memory too. When it ends without reporting
``Phase.ENDED``, the watchdog process takes over.

It stops the arm when the parent process dies, when the sensing or watchdog process stops updating
its heartbeat, when the server is lost, when a picture or the plan gets too old, on SIGTERM, and
when the parent commands it.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from robots.base import JointSample, Robot, Role
from robots.errors import RobotError, SensorLost
from runtime.control.clock import MonotonicClock, spin_for
from runtime.control.control_loop import ControlLoop
from runtime.control.realtime import Realtime, no_garbage_collection
from runtime.eval_real.control_enums import MOVING, ControlCommand, Phase, ServerStatus, Signal
from runtime.eval_real.event_log import ORPHAN_HOLD_S, EventLog
from runtime.eval_real.rollout_counts import RolloutCounter, RolloutCounts
from runtime.eval_real.run_config import RobotLimits, RunConfig
from runtime.eval_real.shared_state import (
    SharedState,
    decode_command,
    read_chunk,
)
from runtime.eval_real.worker_process import ParentPipe, child_main
from runtime.latency_stats import RequestLatency
from runtime.trace import recorder as trace
from transport.channel import Arrays
from transport.child_process import send_event
from transport.shm.text_field import get_text, put_text

logger = logging.getLogger(__name__)

SETTLE_S = 0.25
"""Time at rest before the first observation is requested, because a servo lags its command."""
FRESH_JOINTS_S = 2.0
"""Timeout for a joint state that is newer than a reset."""


class DeadlineClock(MonotonicClock):
    """A monotonic clock that keeps the deadline it last waited for in ``deadline_ns``."""

    deadline_ns = 0

    def wait_until_ns(self, deadline_ns: int) -> None:
        """Return at ``deadline_ns``, and keep it."""
        self.deadline_ns = deadline_ns
        super().wait_until_ns(deadline_ns)


class Control:
    """The control loop of one robot.

    Each period it reads the parent's command and the joints, checks for faults, takes chunks, and
    sends one command.

    Args:
        config: The run's configuration.
        shared_state: The memory shared with the other processes.
        robot: Connected for control.
        log: Passes log records to the parent.
        inherited: (A,) the last pose that a predecessor commanded before it died; None to begin
            at the robot's measured pose.
    """

    def __init__(
        self,
        config: RunConfig,
        shared_state: SharedState,
        robot: Robot,
        log: EventLog,
        inherited: NDArray[np.float32] | None,
    ) -> None:
        self._config, self._robot, self._log = config, robot, log
        self._machine = config.make_state_machine(RobotLimits.of(robot))
        self._contract = config.contract
        self._control_command = shared_state.control_command
        self._watchdog_heartbeat = shared_state.watchdog_heartbeat
        self._sensing_report = shared_state.latest_reader("sensing")
        self._chunks = shared_state.queue_reader("chunks")
        self._progress = shared_state.latest_writer("progress")
        self._commands = shared_state.latest_writer("commands")
        self._joints = shared_state.queue_writer("joints")
        self._ticks = shared_state.queue_writer("ticks")
        self._accepted = shared_state.queue_writer("accepted")
        before = shared_state.latest_reader("progress")
        before.refresh()
        self._attempt, self._request_seq = (
            int(before.values[name]) for name in ("attempt", "request_seq")
        )
        self._acked_command = int(before.values["acked_command"])
        rows = shared_state.latest_reader("commands")
        rows.refresh()
        self._row = int(rows.values["row"]) + 1 if rows.sequence else 0
        self._counter = RolloutCounter(self._machine.stream, RolloutCounts.read(rows.values))
        self._clock = DeadlineClock(spin_for(config.realtime.priority))
        self._loop = ControlLoop(self._clock, config.period_s)
        self._settle_ticks = SETTLE_S / config.period_s
        self._latency = RequestLatency()
        self._captured_ns = np.zeros(1 << 16, np.int64)
        self._waited = self._submitted = 0
        self._last_k = -1
        self._parent = os.getppid()
        self._ending = False
        self._end_at_ns: int | None = None
        self._signals = Signal.NONE
        self._pose = np.zeros(self._contract.action_dim, np.float32)
        self._phase = Phase.HOLD
        self._sample = robot.get_joints()
        self._drop_old_chunks()
        rest = robot.contract.rest_command(self._sample.position)
        self._reset(rest if inherited is None else inherited)

    def run(self) -> None:
        """Command the robot until the parent sends ``QUIT``, SIGTERM comes, or the parent dies."""
        signal.signal(signal.SIGTERM, lambda *_: self._end("SIGTERM"))
        with no_garbage_collection():
            self._loop.run(self._step)

    def _step(self, k: int) -> bool:
        advance, self._last_k = k - self._last_k, k
        self._sensing_report.refresh()
        self._read_command()
        self._read_joints()
        self._check_faults(time.monotonic_ns())
        with trace.span("take_chunks"):
            self._take_chunks()
        tick = self._machine.tick
        with trace.span("execute", tick):
            command = self._machine.command(advance)
        row = self._write_command(advance, command, played=self._machine.tick != tick)
        with trace.span("send_action", tick):
            self._robot.send_action(command)
        self._record(row, time.monotonic_ns())
        self._log_phase()
        self._request_chunk(advance)
        self._publish_progress()
        return not self._may_end()

    # Commands of the parent

    def _read_command(self) -> None:
        number, command, argument = decode_command(self._control_command.load())
        if number == self._acked_command:
            return
        self._acked_command = number
        machine = self._machine
        if command is ControlCommand.START and machine.phase in (Phase.HOLD, Phase.FAULT):
            self._start(argument)
        elif command is ControlCommand.RESUME and machine.phase in (Phase.HOLD, Phase.FAULT):
            self._attempt += 1
            self._signals |= Signal.RESUME
            with self._counter.across_reset():
                machine.resume()
        elif command is ControlCommand.STOP:
            self._stop()
        elif command is ControlCommand.RELEASE and machine.phase is Phase.FAULT:
            self._reset(machine.stream.last_command.copy())
        elif command is ControlCommand.EMERGENCY:
            self._fail("the emergency key was pressed")
        elif command is ControlCommand.QUIT:
            self._end("the evaluation is over")

    def _start(self, seed: int) -> None:
        if self._robot.reset(seed):
            sample = self._joints_after(time.monotonic_ns())
            self._reset(self._robot.contract.rest_command(sample.position))
            # The arm was at rest: a reset longer than a period is no stall.
            self._clock.deadline_ns = time.monotonic_ns()
        else:
            self._reset(self._machine.stream.last_command.copy())
        self._attempt += 1
        self._latency = RequestLatency()
        self._signals |= Signal.START
        self._machine.start()
        self._counter.begin()

    def _reset(self, pose: NDArray[np.float32]) -> None:
        self._pose[:] = pose
        self._signals |= Signal.RESET
        with self._counter.across_reset():
            self._machine.reset(self._pose)

    def _joints_after(self, stamp_ns: int) -> JointSample:
        while True:
            sample = self._robot.get_joints()
            if sample.received_ns > stamp_ns:
                return sample
            if time.monotonic_ns() - stamp_ns > FRESH_JOINTS_S * 1e9:
                raise RobotError(f"no joint state within {FRESH_JOINTS_S:g} s of the reset")
            time.sleep(0.001)

    def _stop(self) -> None:
        self._signals |= Signal.STOP
        self._machine.stop()

    def _end(self, reason: str) -> None:
        if not self._ending:
            self._ending = True
            logger.info("the control process ends: %s", reason)

    # Faults

    def _check_faults(self, now_ns: int) -> None:
        if self._ending and self._machine.phase in (Phase.APPROACH, Phase.WAIT, Phase.RUN):
            self._stop()
        if os.getppid() != self._parent:
            self._fail("the parent process died")
            if self._end_at_ns is None:
                self._end_at_ns = now_ns + round(1e9 * ORPHAN_HOLD_S)
                self._end("its parent process died")
        phase = self._machine.phase
        if phase not in (Phase.APPROACH, Phase.WAIT, Phase.RUN):
            return
        sensing, max_age_ns = self._sensing_report.values, self._config.max_sensing_age_s * 1e9
        if self._signals & (Signal.START | Signal.RESUME):
            return  # the sensing process has not reported on this attempt yet
        silent_ns = now_ns - int(sensing["heartbeat_ns"])
        picture_ns = now_ns - int(sensing["frame_ns"])
        if silent_ns > max_age_ns or min(2 * silent_ns, picture_ns) > max_age_ns:
            self._fail(f"the sensing process has been silent for {silent_ns / 1e9:.2f} s")
        elif now_ns - self._watchdog_heartbeat.load() > max_age_ns:
            self._fail(
                "the watchdog process is silent, so nothing would stop the arm after this one"
            )
        elif sensing["fault"][0] and int(sensing["attempt"]) == self._attempt:
            self._fail(get_text(sensing["fault"]))
        elif sensing["server"] == ServerStatus.LOST:
            self._fail("the policy server is lost")
        elif picture_ns > max_age_ns:
            self._fail(f"the newest picture is {picture_ns / 1e9:.2f} s old")
        elif phase is Phase.RUN:
            age_ns = now_ns - self._source_ns()
            if self._source_ns() and age_ns > self._config.max_chunk_age_s * 1e9:
                self._fail(f"the plan's observation is {age_ns / 1e9:.2f} s old")
            elif sensing["success"] and int(sensing["attempt"]) == self._attempt:
                self._stop()

    def _fail(self, reason: str) -> None:
        if self._machine.fault or self._machine.phase is Phase.FAULT:
            return
        self._signals |= Signal.FAIL
        trace.add_instant("fault")
        self._machine.fail(reason)

    def _source_ns(self) -> int:
        """Capture time of the observation behind the last command; 0 if there is none."""
        source = self._machine.stream.executor.last_source
        return int(self._captured_ns[source % len(self._captured_ns)]) if source >= 0 else 0

    # Chunks

    def _drop_old_chunks(self) -> None:
        while self._chunks.peek() is not None:
            self._chunks.release()

    def _take_chunks(self) -> None:
        while (views := self._chunks.peek()) is not None:
            if int(views["attempt"]) == self._attempt and self._machine.phase in (
                Phase.WAIT,
                Phase.RUN,
            ):
                self._take(views)
            self._chunks.release()

    def _take(self, views: Arrays) -> None:
        chunk = read_chunk(views)
        now_ns = time.monotonic_ns()
        self._latency.add(now_ns - chunk.t_capture_ns)
        self._captured_ns[chunk.obs_timestep % len(self._captured_ns)] = chunk.t_capture_ns
        if self._machine.phase is Phase.WAIT:
            self._waited = 0  # if this chunk is not accepted, another is requested
        self._machine.accept(chunk)
        copy = self._accepted.claim()
        if copy is not None:
            for name, value in views.items():
                np.copyto(copy[name], value)
            copy["row"][...], copy["arrived_ns"][...] = self._row, now_ns
            self._accepted.publish()

    def _request_chunk(self, advance: int) -> None:
        sensing, machine = self._sensing_report.values, self._machine
        current = int(sensing["attempt"]) == self._attempt
        if current and int(sensing["submitted"]) != self._submitted:
            self._submitted = int(sensing["submitted"])
            if sensing["obs_timestep"] >= 0:
                machine.requested(int(sensing["obs_timestep"]))
        if machine.phase is Phase.WAIT:
            self._waited += advance
            if self._waited - advance < self._settle_ticks <= self._waited:
                self._request_seq += 1
            return
        self._waited = 0
        acknowledged = int(sensing["request_seq"]) == self._request_seq
        if acknowledged and machine.wants_chunk(self._latency.ticks(self._contract.dt_s)):
            self._request_seq += 1

    # Joints in, commands and progress out

    def _read_joints(self) -> None:
        """Read the joints; a lost sensor is a fault."""
        try:
            self._sample = self._robot.get_joints()
        except SensorLost as error:
            self._fail(str(error))
        self._publish_joints(self._sample)

    def _publish_joints(self, sample: JointSample) -> None:
        views = self._joints.claim()
        if views is not None:
            views["position"][:] = sample.position
            views["stamp_ns"][...], views["received_ns"][...] = sample.stamp_ns, sample.received_ns
            self._joints.publish()

    def _write_command(self, advance: int, command: NDArray[np.float32], *, played: bool) -> Arrays:
        """Write the command and its inputs to shared memory, before it is sent.

        If this process dies in between, the watchdog sends the command again. That changes nothing
        if it had been sent.
        """
        views = self._commands.claim()
        views["row"][...], views["attempt"][...] = self._row, self._attempt
        views["tick"][...], views["played"][...] = self._machine.tick - played, played
        views["phase"][...] = self._machine.phase
        views["signals"][...], views["advance"][...] = self._signals, advance
        views["source"][...] = self._machine.stream.executor.last_source
        views["deadline_ns"][...] = self._clock.deadline_ns
        views["captured_ns"][...] = self._source_ns()
        views["stamp_ns"][...] = self._sample.stamp_ns
        views["received_ns"][...] = self._sample.received_ns
        views["command"][:], views["pose"][:] = command, self._pose
        views["state"][:] = self._sample.position
        views["velocity"][:] = self._machine.stream.limiter.velocity
        self._counter.write(views)
        self._commands.publish()
        return views

    def _record(self, row: Arrays, sent_ns: int) -> None:
        self._row += 1
        self._signals = Signal.NONE
        views = self._ticks.claim()
        if views is None:
            return
        for name, value in views.items():
            if name != "sent_ns":
                np.copyto(value, row[name])
        views["sent_ns"][...] = sent_ns
        self._ticks.publish()

    def _log_phase(self) -> None:
        phase = self._machine.phase
        if phase is self._phase:
            return
        self._log.attempt, self._log.tick = self._attempt, self._machine.tick
        if phase is Phase.FAULT:
            logger.error("at rest after a fault, latched: %s", self._machine.fault)
        elif phase is Phase.STOP:
            logger.info("coming to rest: %s", self._machine.fault or "the rollout ends")
        else:
            logger.info("%s", phase.name.lower())
        self._phase = phase

    def _publish_progress(self) -> None:
        views, machine = self._progress.claim(), self._machine
        period_ns = self._loop.period_ns
        views["phase"][...], views["acked_command"][...] = machine.phase, self._acked_command
        views["attempt"][...], views["tick"][...] = self._attempt, machine.tick
        views["t0_ns"][...] = self._clock.deadline_ns - (machine.tick - 1) * period_ns
        views["request_seq"][...] = self._request_seq
        put_text(views["fault"], machine.fault)
        views["dropped_rows"][...] = self._ticks.refused
        self._progress.publish()

    def _may_end(self) -> bool:
        """Whether it shall end and has rested for long enough; publishes ``Phase.ENDED`` if so."""
        if not self._ending or self._machine.phase in (*MOVING, Phase.WAIT):
            return False
        if self._end_at_ns is not None and time.monotonic_ns() < self._end_at_ns:
            return False
        views = self._progress.claim()
        views["phase"][...] = Phase.ENDED
        views["attempt"][...], views["request_seq"][...] = self._attempt, self._request_seq
        views["acked_command"][...] = self._acked_command
        self._progress.publish()
        return True


def _work(config: RunConfig, shared_state: SharedState, parent: ParentPipe) -> int:
    robot = config.make_robot()
    with robot:
        parent.connect(robot, Role.CONTROL, config.connect_timeout_s)
        with Realtime(config.realtime) as realtime:
            send_event("ready", realtime=realtime.report())
            if not os.read(parent.input_fd, 4096):
                return 0
            # The predecessor's watchdog has ended by now, so this process is the only writer.
            log = EventLog(shared_state.queue_writer("events"))
            logging.basicConfig(level=logging.INFO, handlers=[log], force=True)
            last = shared_state.latest_reader("commands")
            inherited = last.values["command"].copy() if last.refresh() else None
            Control(config, shared_state, robot, log, inherited).run()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the control process. Returns the exit status."""
    return child_main("control", _work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
