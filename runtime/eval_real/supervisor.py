"""Starts, commands, watches and replaces the processes that drive a robot; runs in the parent."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from robots.base import Robot
from runtime.eval_real.control_enums import MOVING, ControlCommand, Phase, ServerStatus
from runtime.eval_real.live_rollout import LiveRollout
from runtime.eval_real.recording import RecordingWriter
from runtime.eval_real.run_config import RunConfig
from runtime.eval_real.shared_state import SharedState, create_segment, encode_command
from runtime.eval_real.worker_process import WorkerProcess, WorkerProcessFailed
from runtime.live_view.live_view import LiveView
from transport.child_process import REPORT_EVERY_S
from transport.shm.text_field import get_text

logger = logging.getLogger(__name__)

READY_WITHIN_S = 60.0
"""For a worker process to start, or the server to be connected again."""
HANGS_AFTER_S = 2.0
"""Silence beyond the age at which control stops the arm; then the sensing process is killed."""
STOP_WITHIN_S = 10.0
"""For the arm to come to rest before the processes are killed: far more than any limit implies."""


class Supervisor:
    """Runs the control, watchdog and sensing processes.

    Args:
        config: The run's configuration; passed to each process.
        robot: The same robot, not connected; for its dimensions.
        tell: Called with one line of text for every event.
        live_view: Shows the run; None for no live view.

    Attributes:
        config: As given; its address changes when the server is replaced.
        recorder: Collects the commands and chunks of the rollout.
        lost: Why the policy server is lost; empty while it is connected.
        setting: The ``ready`` event of the sensing process: transport, its reason, the policy's
            info.
        realtime: The real-time options that the control process was granted, as text.

    Raises:
        WorkerProcessFailed: A process did not start; the message says why. Nothing has moved.
    """

    def __init__(
        self,
        config: RunConfig,
        robot: Robot,
        tell: Callable[[str], None],
        live_view: LiveView | None = None,
    ) -> None:
        self.config = config
        self._tell = tell
        self._live_view = live_view
        dims = config.dims(robot)
        self._fd = create_segment(dims)
        self._shared_state = SharedState(self._fd, dims)
        self._progress = self._shared_state.latest_reader("progress")
        self._sensing_report = self._shared_state.latest_reader("sensing")
        self._events = self._shared_state.queue_reader("events")
        self.recorder = RecordingWriter(
            self._shared_state.queue_reader("ticks"),
            self._shared_state.queue_reader("accepted"),
            LiveRollout(live_view.writer, config) if live_view is not None else None,
        )
        self._commands_sent = 0
        self._control: WorkerProcess | None = None
        self._watchdog: WorkerProcess | None = None
        self._sensing: WorkerProcess | None = None
        self._reported: set[int] = set()
        self._closing = False
        self._saved: dict[str, Any] = {}
        self._spooled: dict[str, Any] = {}
        self.lost = ""
        self.setting: dict[str, Any] = {}
        self.realtime = ""
        try:
            self._start_control()
            self._start_sensing()
        except BaseException:
            self.close()
            raise

    # State of the processes

    @property
    def phase(self) -> Phase:
        """What the control process is doing."""
        self._progress.refresh()
        return Phase(int(self._progress.values["phase"]))

    @property
    def attempt(self) -> int:
        """Number of starts and resumptions so far."""
        return int(self._progress.values["attempt"])

    @property
    def acked_command(self) -> bool:
        """Whether the control process has read the last command."""
        self._progress.refresh()
        return int(self._progress.values["acked_command"]) == self._commands_sent

    @property
    def played(self) -> int:
        """Control ticks of the rollout so far."""
        return int(self._progress.values["tick"])

    def sensing_report(self) -> dict[str, Any]:
        """The numbers that the sensing process published last, by name."""
        self._sensing_report.refresh()
        return {n: v.item() for n, v in self._sensing_report.values.items() if v.size == 1}

    @property
    def fault(self) -> str:
        """Why the arm was stopped; empty without a fault."""
        self._progress.refresh()
        return get_text(self._progress.values["fault"])

    @property
    def dead(self) -> list[str]:
        """Short names of the processes that have died."""
        workers = (self._control, self._watchdog, self._sensing)
        return [worker.short_name for worker in workers if worker is not None and not worker.alive]

    def poll(self) -> None:
        """Drain the recording queues and report events. Call it 100 times a second or more."""
        self.recorder.drain()
        if self._live_view is not None:
            self._live_view.poll()
        while (views := self._events.peek()) is not None:
            self._tell(get_text(views["text"]))
            self._events.release()
        for worker in (self._control, self._watchdog, self._sensing):
            for event in worker.events() if worker is not None else ():
                self._handle_event(event)
            if worker is None or worker.alive or worker.pid in self._reported:
                continue
            self._reported.add(worker.pid)
            if not self._closing or worker.returncode:
                self._tell(f"{worker.name} ended: {worker.status}")

    def _handle_event(self, event: dict[str, Any]) -> None:
        name = event["event"]
        if name == "lost":
            self.lost = event["reason"]
            self._tell(f"server lost: {event['reason']}")
        elif name == "connected":
            self.lost = ""
            self._tell(f"server connected again, over {event['transport']}")
        elif name == "failed":
            self._tell(f"a process failed: {event['error']}")
        elif name == "saved":
            self._saved.update(event)
        elif name == "spooled":
            self._spooled.update(event)
        elif name == "wrong_policy":
            self._tell(f"another policy answered: {event['reason']}")

    # Actions

    def send_command(self, command: ControlCommand, argument: int = 0) -> None:
        """Send the control process a command and a 24-bit argument (the seed of ``START``)."""
        self._commands_sent += 1
        self._shared_state.control_command.store(
            encode_command(self._commands_sent, command, argument)
        )

    def wait_for(self, condition: Callable[[], bool], timeout_s: float, what: str = "") -> bool:
        """Poll until ``condition`` is true; False after ``timeout_s``.

        Args:
            what: Named in a line every few seconds while waiting; empty for no such line.
        """
        began_s = time.monotonic()
        next_line_s = began_s + REPORT_EVERY_S
        while not condition():
            now_s = time.monotonic()
            if now_s - began_s > timeout_s:
                return False
            if what and now_s > next_line_s:
                next_line_s += REPORT_EVERY_S
                self._tell(f"waiting for {what}, {now_s - began_s:.0f} s so far")
            self.poll()
            time.sleep(0.005)
        self.poll()
        return True

    def stop(self) -> bool:
        """Bring the arm to rest; False if it still moves after ``STOP_WITHIN_S``."""
        self.send_command(ControlCommand.STOP)
        return self.wait_for(lambda: self.phase not in (*MOVING, Phase.WAIT), STOP_WITHIN_S)

    def restore(self, address: str | None = None) -> None:
        """Replace the processes that died. The arm must be at rest, and stays there.

        Args:
            address: The policy server's new address; None if it has not changed.

        Raises:
            WorkerProcessFailed: A new process did not start, or the server is still lost.
        """
        if self._control is not None and not (self._control.alive and self._watchdog_alive):
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
        sensing = self.sensing_report()
        recent = time.monotonic_ns() - sensing["heartbeat_ns"] < 1e8
        return bool(recent and sensing["server"] == ServerStatus.CONNECTED)

    @property
    def _watchdog_alive(self) -> bool:
        return self._watchdog is not None and self._watchdog.alive

    def _start_control(self) -> None:
        """Start a control process and its watchdog.

        The watchdog of a control process that died holds the arm until these are ready.
        """
        predecessors = (self._control, self._watchdog)
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
        for worker in predecessors:
            if worker is not None:
                if worker.short_name == "control" and worker.alive:
                    worker.terminate()  # its watchdog died; it comes to rest first
                worker.close(STOP_WITHIN_S)
        self._control, self._watchdog = control, watchdog
        self._progress.refresh()
        acked_command = int(self._progress.values["acked_command"])
        control.send_line("go")
        self._commands_sent = max(self._commands_sent, acked_command)
        in_time = self.wait_for(
            lambda: not control.alive or self._progress.refresh(),
            READY_WITHIN_S,
            "the control process to command",
        )
        if not (in_time and control.alive):
            raise WorkerProcessFailed(f"the control process does not command ({control.status})")

    def _start_sensing(self) -> None:
        live = self._live_view
        pass_fds = [live.fd] if live is not None else []
        self._sensing = WorkerProcess("sensing", self.config, self._fd, pass_fds=pass_fds)
        self.setting = dict(self._sensing.wait_ready(READY_WITHIN_S, self._tell))
        if live is not None:
            self._sensing.send_line(f"show {live.fd} {live.layout.to_json()}")
        self.lost = ""

    def _sensing_hangs(self) -> bool:
        """Whether the sensing process has been silent for so long that it counts as hung."""
        silent_s = (time.monotonic_ns() - self.sensing_report()["heartbeat_ns"]) / 1e9
        return bool(silent_s > self.config.max_sensing_age_s + HANGS_AFTER_S)

    def _end_sensing(self) -> None:
        if self._sensing is not None:
            if self._sensing_hangs():
                self._sensing.kill()
            self._sensing.close(STOP_WITHIN_S)
            self._sensing = None

    def record_video(self) -> None:
        """Tell the sensing process to keep pictures for a new video."""
        if self._sensing is not None:
            self._sensing.send_line("record")

    def save_video(self, stem: str, timeout_s: float) -> list[str]:
        """Have the sensing process write its videos; returns their paths.

        Args:
            stem: Path without the camera's name and the suffix, see ``VideoRecorder.save``.
            timeout_s: Then it returns without the videos.
        """
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

    def spool_pictures(self, folder: Path) -> None:
        """Have the sensing process write every picture to a new ``PictureSpool`` in ``folder``."""
        self._spooled.clear()
        if self._sensing is not None:
            self._sensing.send_line(f"spool {folder}")

    def end_spool(self, timeout_s: float) -> str:
        """Have the sensing process finish its spool; returns the problem, empty without one."""
        if self._sensing is not None:
            self._sensing.send_line("end_spool")
        self.wait_for(
            lambda: bool(self._spooled) or "sensing" in self.dead or self._sensing_hangs(),
            timeout_s,
            "the pictures",
        )
        if not self._spooled:  # another process than the one that began it, or none
            return "the sensing process lost the pictures"
        if dropped := self._spooled["dropped"]:
            self._tell(f"the disk is slow: {dropped} pictures are missing in the dataset")
        return str(self._spooled["problem"])

    def close(self) -> None:
        """Bring the arm to rest and end all processes. Idempotent."""
        if self._fd < 0:
            return
        self._closing = True
        self.send_command(ControlCommand.QUIT)
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
