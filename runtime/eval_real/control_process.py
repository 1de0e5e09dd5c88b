"""The control process: the loop that commands the robot, and nothing else.

Started as ``python -m runtime.eval_real.control_process``.

Chunks reach it through the mailbox, commands leave through the driver. It imports neither torch nor
zmq nor a simulator, opens no file while it runs and writes to no terminal, which may block: what it
has to say goes through the mailbox as well. Its end, wanted or not, is the guardian's beginning.

It stops the arm by itself when the parent or the sensing process dies or falls silent, when the
server is lost, when a picture or the plan gets too old, on SIGTERM, and when the parent says so.
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
from runtime.eval_real.event_log import ORPHAN_HOLD_S, EventLog
from runtime.eval_real.phases import MOVING, Order, Phase, Server, Signal
from runtime.eval_real.processes import ParentPipe, child_main
from runtime.eval_real.rollout_counts import RolloutCounter, RolloutCounts
from runtime.eval_real.run_config import RobotLimits, RunConfig
from runtime.eval_real.shared_state import SharedState, decode_order, get_text, put_text, read_chunk
from runtime.stats import RequestLatency
from runtime.trace import recorder as trace
from transport.channel import Arrays
from transport.child_process import send_event

logger = logging.getLogger(__name__)

SETTLE_S = 0.25
"""At rest for so long before the policy is shown where the arm is: a servo lags its command."""
FRESH_JOINTS_S = 2.0
"""How long a joint state newer than a reset may take."""


class NotingClock(MonotonicClock):
    """A monotonic clock that remembers the deadline it waited for."""

    deadline_ns = 0

    def wait_until_ns(self, deadline_ns: int) -> None:
        self.deadline_ns = deadline_ns
        super().wait_until_ns(deadline_ns)


class Control:
    """One period at a time: orders, watchdogs, joints, chunks; then the command.

    Args:
        mission: What to do.
        mailbox: Shared with the others.
        robot: Connected for control.
        log: Where events go.
        inherited: Last pose that a dead predecessor commanded; None to begin where the robot is.
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
        self._order, self._watchdog_beat = shared_state.order, shared_state.watchdog_beat
        self._senses = shared_state.latest_reader("senses")
        self._chunks = shared_state.queue_reader("chunks")
        self._progress = shared_state.latest_writer("progress")
        self._commands = shared_state.latest_writer("commands")
        self._joints = shared_state.queue_writer("joints")
        self._ticks = shared_state.queue_writer("ticks")
        self._accepted = shared_state.queue_writer("accepted")
        before = shared_state.latest_reader("progress")
        before.refresh()
        self._leg, self._ask = int(before.values["leg"]), int(before.values["ask"])
        self._obeyed = int(before.values["obeyed"])
        rows = shared_state.latest_reader("commands")
        rows.refresh()
        self._row = int(rows.values["row"]) + 1 if rows.sequence else 0
        self._counter = RolloutCounter(self._machine.stream, RolloutCounts.read(rows.values))
        self._clock = NotingClock(spin_for(config.realtime.priority))
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
        """Command the robot until told to end."""
        signal.signal(signal.SIGTERM, lambda *_: self._end("SIGTERM"))
        with no_garbage_collection():
            self._loop.run(self._step)

    def _step(self, k: int) -> bool:
        advance, self._last_k = k - self._last_k, k
        self._senses.refresh()
        self._obey()
        self._look()
        self._watch(time.monotonic_ns())
        with trace.span("take_chunks"):
            self._take_chunks()
        tick = self._machine.tick
        with trace.span("execute", tick):
            command = self._machine.command(advance)
        intent = self._intend(advance, command, played=self._machine.tick != tick)
        with trace.span("send_action", tick):
            self._robot.send_action(command)
        self._record(intent, time.monotonic_ns())
        self._note_phase()
        self._ask_for_chunk(advance)
        self._publish_progress()
        return not self._leave()

    # Orders

    def _obey(self) -> None:
        number, order, argument = decode_order(self._order.load())
        if number == self._obeyed:
            return
        self._obeyed = number
        machine = self._machine
        if order is Order.START and machine.phase in (Phase.HOLD, Phase.FAULT):
            self._start(argument)
        elif order is Order.RESUME and machine.phase in (Phase.HOLD, Phase.FAULT):
            self._leg += 1
            self._signals |= Signal.RESUME
            with self._counter.across_reset():
                machine.resume()
        elif order is Order.STOP:
            self._stop()
        elif order is Order.RELEASE and machine.phase is Phase.FAULT:
            self._reset(machine.stream.last_command.copy())
        elif order is Order.EMERGENCY:
            self._fail("the emergency key was pressed")
        elif order is Order.QUIT:
            self._end("told to")

    def _start(self, seed: int) -> None:
        if self._robot.reset(seed):
            sample = self._joints_after(time.monotonic_ns())
            self._reset(self._robot.contract.rest_command(sample.position))
        else:
            self._reset(self._machine.stream.last_command.copy())
        self._leg += 1
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

    # Watchdogs

    def _watch(self, now_ns: int) -> None:
        if self._ending and self._machine.phase in (Phase.APPROACH, Phase.WAIT, Phase.RUN):
            self._stop()
        if os.getppid() != self._parent:
            self._fail("the parent process died")
            if self._end_at_ns is None:
                self._end_at_ns = now_ns + round(1e9 * ORPHAN_HOLD_S)
                self._end("there is nobody left to end it")
        phase = self._machine.phase
        if phase not in (Phase.APPROACH, Phase.WAIT, Phase.RUN):
            return
        senses, longest_ns = self._senses.values, self._config.max_sensing_age_s * 1e9
        if self._signals & (Signal.START | Signal.RESUME):
            return  # what it says of now is yet to come
        silent_ns = now_ns - int(senses["beat_ns"])
        picture_ns = now_ns - int(senses["frame_ns"])
        if silent_ns > longest_ns or min(2 * silent_ns, picture_ns) > longest_ns:
            self._fail(f"the sensing process has been silent for {silent_ns / 1e9:.2f} s")
        elif now_ns - self._watchdog_beat.load() > longest_ns:
            self._fail("the guardian is silent: nobody would stop the arm for this process")
        elif senses["fault"][0] and int(senses["leg"]) == self._leg:
            self._fail(get_text(senses["fault"]))
        elif senses["server"] == Server.LOST:
            self._fail("the policy server is lost")
        elif picture_ns > longest_ns:
            self._fail(f"the newest picture is {picture_ns / 1e9:.2f} s old")
        elif phase is Phase.RUN:
            age_ns = now_ns - self._source_ns()
            if self._source_ns() and age_ns > self._config.max_chunk_age_s * 1e9:
                self._fail(f"the plan's observation is {age_ns / 1e9:.2f} s old")
            elif senses["success"] and int(senses["leg"]) == self._leg:
                self._stop()

    def _fail(self, reason: str) -> None:
        if self._machine.fault or self._machine.phase is Phase.FAULT:
            return
        self._signals |= Signal.FAIL
        trace.instant("fault")
        self._machine.fail(reason)

    def _source_ns(self) -> int:
        """Capture of the observation behind the last command; 0 where there is none."""
        source = self._machine.stream.executor.last_source
        return int(self._captured_ns[source % len(self._captured_ns)]) if source >= 0 else 0

    # Chunks

    def _drop_old_chunks(self) -> None:
        while self._chunks.peek() is not None:
            self._chunks.release()

    def _take_chunks(self) -> None:
        while (views := self._chunks.peek()) is not None:
            if int(views["leg"]) == self._leg and self._machine.phase in (Phase.WAIT, Phase.RUN):
                self._take(views)
            self._chunks.release()

    def _take(self, views: Arrays) -> None:
        chunk = read_chunk(views)
        now_ns = time.monotonic_ns()
        self._latency.add(now_ns - chunk.t_capture_ns)
        self._captured_ns[chunk.obs_timestep % len(self._captured_ns)] = chunk.t_capture_ns
        if self._machine.phase is Phase.WAIT:
            self._waited = 0  # whatever comes of it, the next one is asked for anew
        self._machine.accept(chunk)
        copy = self._accepted.claim()
        if copy is not None:
            for name, value in views.items():
                np.copyto(copy[name], value)
            copy["row"][...], copy["arrived_ns"][...] = self._row, now_ns
            self._accepted.publish()

    def _ask_for_chunk(self, advance: int) -> None:
        senses, machine = self._senses.values, self._machine
        if int(senses["leg"]) == self._leg and int(senses["submitted"]) != self._submitted:
            self._submitted = int(senses["submitted"])
            if senses["obs_timestep"] >= 0:
                machine.requested(int(senses["obs_timestep"]))
        if machine.phase is Phase.WAIT:
            self._waited += advance
            if self._waited - advance < self._settle_ticks <= self._waited:
                self._ask += 1
            return
        self._waited = 0
        acknowledged = int(senses["ask"]) == self._ask
        if acknowledged and machine.wants_chunk(self._latency.ticks(self._contract.dt_s)):
            self._ask += 1

    # What it sees, and what the others see

    def _look(self) -> None:
        """The joints; without them it stops as it is told to by any other sense."""
        try:
            self._sample = self._robot.get_joints()
        except SensorLost as error:
            self._fail(str(error))
        self._pass_joints_on(self._sample)

    def _pass_joints_on(self, sample: JointSample) -> None:
        views = self._joints.claim()
        if views is not None:
            views["position"][:] = sample.position
            views["stamp_ns"][...], views["received_ns"][...] = sample.stamp_ns, sample.received_ns
            self._joints.publish()

    def _intend(self, advance: int, command: NDArray[np.float32], *, played: bool) -> Arrays:
        """Write down what is about to be sent, and from which inputs.

        Before it is sent: a successor sends it again, which changes nothing if it was sent.
        """
        views = self._commands.claim()
        views["row"][...], views["leg"][...] = self._row, self._leg
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

    def _record(self, intent: Arrays, sent_ns: int) -> None:
        self._row += 1
        self._signals = Signal.NONE
        views = self._ticks.claim()
        if views is None:
            return
        for name, value in views.items():
            if name != "sent_ns":
                np.copyto(value, intent[name])
        views["sent_ns"][...] = sent_ns
        self._ticks.publish()

    def _note_phase(self) -> None:
        phase = self._machine.phase
        if phase is self._phase:
            return
        self._log.attempt, self._log.tick = self._leg, self._machine.tick
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
        views["phase"][...], views["obeyed"][...] = machine.phase, self._obeyed
        views["leg"][...], views["tick"][...] = self._leg, machine.tick
        views["t0_ns"][...] = self._clock.deadline_ns - (machine.tick - 1) * period_ns
        views["ask"][...] = self._ask
        put_text(views["fault"], machine.fault)
        views["dropped_rows"][...] = self._ticks.refused
        self._progress.publish()

    def _leave(self) -> bool:
        """Whether it may end: told to, and at rest for long enough."""
        if not self._ending or self._machine.phase in (*MOVING, Phase.WAIT):
            return False
        if self._end_at_ns is not None and time.monotonic_ns() < self._end_at_ns:
            return False
        views = self._progress.claim()
        views["phase"][...] = Phase.ENDED
        views["leg"][...], views["ask"][...] = self._leg, self._ask
        views["obeyed"][...] = self._obeyed
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
            # From here on, and not before, is the predecessor's guardian gone.
            log = EventLog(shared_state.queue_writer("events"))
            logging.basicConfig(level=logging.INFO, handlers=[log], force=True)
            last = shared_state.latest_reader("commands")
            inherited = last.values["command"].copy() if last.refresh() else None
            Control(config, shared_state, robot, log, inherited).run()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return child_main("control", _work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
