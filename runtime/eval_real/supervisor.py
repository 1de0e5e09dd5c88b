"""The parent's view of the processes that drive a robot: started, ordered, watched, replaced."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from robots.base import Robot
from runtime.eval_real.phases import MOVING, Order, Phase, Server
from runtime.eval_real.processes import WorkerProcess, WorkerProcessFailed
from runtime.eval_real.recording import RecordingWriter
from runtime.eval_real.run_config import RunConfig
from runtime.eval_real.shared_state import SharedState, create_segment, encode_order, get_text
from transport.child_process import REPORT_EVERY_S

logger = logging.getLogger(__name__)

READY_WITHIN_S = 60.0
HANGS_AFTER_S = 2.0
"""Beyond the age at which control stops the arm; then a sensing process is not waited for."""
STOP_WITHIN_S = 10.0
"""For the arm to come to rest before the processes are killed: far more than any limit implies."""


class Supervisor:
    """Runs the control process, its guardian and the sensing process.

    Args:
        mission: What they are told.
        robot: The same robot, not connected; for its dimensions.
        tell: Called with a line for everything that happens.

    Attributes:
        setting: What sensing said when it was ready: transport, its reason, the policy's info.
        realtime: What the control process could have of the kernel, in words.

    Raises:
        WorkerProcessFailed: One did not come up; says why. Nothing has moved.
    """

    def __init__(self, config: RunConfig, robot: Robot, tell: Callable[[str], None]) -> None:
        self.config = config
        self._tell = tell
        dims = config.dims(robot)
        self._fd = create_segment(dims)
        self._shared_state = SharedState(self._fd, dims)
        self._progress = self._shared_state.latest_reader("progress")
        self._senses = self._shared_state.latest_reader("senses")
        self._events = self._shared_state.queue_reader("events")
        self.recorder = RecordingWriter(
            self._shared_state.queue_reader("ticks"), self._shared_state.queue_reader("accepted")
        )
        self._orders = 0
        self._control: WorkerProcess | None = None
        self._watchdog: WorkerProcess | None = None
        self._sensing: WorkerProcess | None = None
        self._reported: set[int] = set()
        self._closing = False
        self._saved: dict[str, Any] = {}
        self.lost = ""
        self.setting: dict[str, Any] = {}
        self.realtime = ""
        try:
            self._start_control()
            self._start_sensing()
        except BaseException:
            self.close()
            raise

    # What it sees

    @property
    def phase(self) -> Phase:
        self._progress.refresh()
        return Phase(int(self._progress.values["phase"]))

    @property
    def attempt(self) -> int:
        """Counts starts and resumptions."""
        return int(self._progress.values["leg"])

    @property
    def acked_command(self) -> bool:
        """Whether the last order was seen."""
        self._progress.refresh()
        return int(self._progress.values["obeyed"]) == self._orders

    @property
    def played(self) -> int:
        """Control ticks of the rollout."""
        return int(self._progress.values["tick"])

    def senses(self) -> dict[str, Any]:
        """What the sensing process published last."""
        self._senses.refresh()
        return {n: v.item() for n, v in self._senses.values.items() if v.size == 1}

    @property
    def fault(self) -> str:
        """Why the arm was stopped."""
        self._progress.refresh()
        return get_text(self._progress.values["fault"])

    @property
    def dead(self) -> list[str]:
        """Members that ended although nobody told them to."""
        workers = (self._control, self._watchdog, self._sensing)
        return [worker.short_name for worker in workers if worker is not None and not worker.alive]

    def poll(self) -> None:
        """Record what came, tell what happened. To be called a hundred times a second or more."""
        self.recorder.drain()
        while (views := self._events.peek()) is not None:
            self._tell(get_text(views["text"]))
            self._events.release()
        for worker in (self._control, self._watchdog, self._sensing):
            for event in worker.events() if worker is not None else ():
                self._hear(event)
            if worker is None or worker.alive or worker.pid in self._reported:
                continue
            self._reported.add(worker.pid)
            if not self._closing or worker.returncode:
                self._tell(f"{worker.name} ended: {worker.status}")

    def _hear(self, said: dict[str, Any]) -> None:
        event = said["event"]
        if event == "lost":
            self.lost = said["reason"]
            self._tell(f"server lost: {said['reason']}")
        elif event == "connected":
            self.lost = ""
            self._tell(f"server connected again, over {said['transport']}")
        elif event == "failed":
            self._tell(f"a process failed: {said['error']}")
        elif event == "saved":
            self._saved.update(said)
        elif event == "wrong_policy":
            self._tell(f"another policy answered: {said['reason']}")

    # What it does

    def order(self, order: Order, argument: int = 0) -> None:
        self._orders += 1
        self._shared_state.order.store(encode_order(self._orders, order, argument))

    def wait_for(self, condition: Callable[[], bool], timeout_s: float, what: str = "") -> bool:
        """Poll until ``condition``; whether it came true in time.

        Args:
            what: Is said every few seconds to be waited for.
        """
        began_s = time.monotonic()
        say_s = began_s + REPORT_EVERY_S
        while not condition():
            now_s = time.monotonic()
            if now_s - began_s > timeout_s:
                return False
            if what and now_s > say_s:
                say_s += REPORT_EVERY_S
                self._tell(f"waiting for {what}, {now_s - began_s:.0f} s so far")
            self.poll()
            time.sleep(0.005)
        self.poll()
        return True

    def stop(self) -> bool:
        """Bring the arm to rest; whether it is."""
        self.order(Order.STOP)
        return self.wait_for(lambda: self.phase not in (*MOVING, Phase.WAIT), STOP_WITHIN_S)

    def restore(self, address: str | None = None) -> None:
        """Replace whoever died. The arm is at rest and stays there.

        Args:
            address: Of the server that is to be asked from now on, where that has changed.

        Raises:
            WorkerProcessFailed: A successor did not come up, or the server is still lost.
        """
        if self._control is not None and not (self._control.alive and self._guardian_alive):
            self._start_control()
        if address is not None and address != self.config.address:
            self.config = replace(self.config, address=address)
            self._end_sensing()
        if self._sensing is None or not self._sensing.alive or self._sensing_hangs():
            self._end_sensing()
            self._start_sensing()
        if not self.wait_for(self._connected, READY_WITHIN_S, "the server"):
            raise WorkerProcessFailed(f"the server is still lost: {self.lost}")

    def _connected(self) -> bool:
        senses = self.senses()
        recent = time.monotonic_ns() - senses["beat_ns"] < 1e8
        return bool(recent and senses["server"] == Server.CONNECTED)

    @property
    def _guardian_alive(self) -> bool:
        return self._watchdog is not None and self._watchdog.alive

    def _start_control(self) -> None:
        """A control process and its guardian; the guardian of a dead one holds until then."""
        before = (self._control, self._watchdog)
        control = WorkerProcess("control", self.config, self._fd)
        watchdog = None
        try:
            self.realtime = control.wait_ready(READY_WITHIN_S, self._tell)["realtime"]
            watchdog = WorkerProcess(
                "watchdog",
                self.config,
                self._fd,
                pass_fds=[control.pidfd],
                arguments=["--control", str(control.pidfd)],
            )
            watchdog.wait_ready(READY_WITHIN_S, self._tell)
        except BaseException:
            for worker in (control, watchdog):
                if worker is not None:
                    worker.close(1.0)
            raise
        for worker in before:
            if worker is not None:
                if worker.short_name == "control" and worker.alive:
                    worker.terminate()  # its guardian died; it comes to rest first
                worker.close(STOP_WITHIN_S)
        self._control, self._watchdog = control, watchdog
        self._progress.refresh()
        acked_command = int(self._progress.values["obeyed"])
        control.send_line("go")
        self._orders = max(self._orders, acked_command)
        commands = self.wait_for(
            lambda: not control.alive or self._progress.refresh(),
            READY_WITHIN_S,
            "the control process to command",
        )
        if not (commands and control.alive):
            raise WorkerProcessFailed(f"the control process does not command ({control.status})")

    def _start_sensing(self) -> None:
        self._sensing = WorkerProcess("sensing", self.config, self._fd)
        self.setting = dict(self._sensing.wait_ready(READY_WITHIN_S, self._tell))
        self.lost = ""

    def _sensing_hangs(self) -> bool:
        """Whether the sensing process has given no sign of life for so long that none will come."""
        silent_s = (time.monotonic_ns() - self.senses()["beat_ns"]) / 1e9
        return bool(silent_s > self.config.max_sensing_age_s + HANGS_AFTER_S)

    def _end_sensing(self) -> None:
        if self._sensing is not None:
            if self._sensing_hangs():
                self._sensing.kill()
            self._sensing.close(STOP_WITHIN_S)
            self._sensing = None

    def record_video(self) -> None:
        if self._sensing is not None:
            self._sensing.send_line("record")

    def save_video(self, stem: str, timeout_s: float) -> list[str]:
        """Have what was recorded written; which files there are."""
        if self._sensing is None:
            return []
        self._saved.clear()
        self._sensing.send_line(f"save {stem}")
        self.wait_for(
            lambda: bool(self._saved) or "sensing" in self.dead or self._sensing_hangs(),
            timeout_s,
            "the videos",
        )
        if problem := self._saved.get("problem"):
            self._tell(problem)
        return list(self._saved.get("paths", ()))

    def close(self) -> None:
        """Bring the arm to rest and end everybody. Idempotent."""
        if self._fd < 0:
            return
        self._closing = True
        self.order(Order.QUIT)
        if self._control is not None and self._control.alive:
            self.wait_for(lambda: not (self._control and self._control.alive), STOP_WITHIN_S)
        if self._sensing is not None and self._sensing_hangs():
            self._sensing.kill()
        for worker in (self._sensing, self._control, self._watchdog):
            if worker is not None:
                worker.close(STOP_WITHIN_S)
        self.poll()
        self._sensing = self._control = self._watchdog = None
        self._shared_state.close()
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
