"""The sensing process: cameras, the policy client, the outcome.

The supervisor starts it as ``python -m runtime.eval_real.sensing_process``.

It reads the cameras at its own rate. When the control process has requested a chunk, it sends the
newest observation to the policy server, and writes the answer to shared memory. An observation
belongs to the policy tick nearest to its capture or, while the arm waits at rest, to the next tick.

Its loop never blocks for long: threads reconnect to a lost server and write videos and pictures.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from policies.errors import ContractMismatch, DeviceLost, PolicyError
from policies.types import MetaObs
from robots.base import CameraSample, JointSample, Robot, Role
from robots.errors import RobotError
from runtime.client.policy_client import PolicyClient
from runtime.errors import RuntimeFault, ServerBusy, ServerLost
from runtime.eval_real.control_enums import Phase, ServerStatus
from runtime.eval_real.live_pictures import LivePictures
from runtime.eval_real.picture_spooler import PictureSpooler
from runtime.eval_real.run_config import RunConfig
from runtime.eval_real.shared_state import SharedState, write_chunk
from runtime.eval_real.video_recorder import VideoRecorder
from runtime.eval_real.worker_process import ParentPipe, child_main
from runtime.live_view.layout import LiveViewLayout
from runtime.protocol.messages import check_observation_schema, observation_schema
from runtime.trace import recorder as trace
from transport.child_process import die_with_parent, send_event
from transport.errors import TransportError
from transport.shm.text_field import put_text
from transport.zeromq.malloc import keep_freed_memory

logger = logging.getLogger(__name__)

POLL_S = 0.001
"""Sleep when there is nothing to do; a request waits at most this long."""
ANSWER_WITHIN_S = 1.0
"""A request without an answer by then is replaced by one with a newer observation."""
RECONNECT_S = 5.0
"""Timeout of one attempt to reconnect; the number of attempts is not limited."""
FRESH_FRAMES = 2
"""New pictures of every camera before the first request at rest: one may show the arm moving."""
ROLLOUT_PHASES = (Phase.WAIT, Phase.APPROACH, Phase.RUN)


class Sensing:
    """The sensing loop of one robot.

    Args:
        config: The run's configuration.
        shared_state: The memory shared with the other processes.
        robot: Connected for sensing.
        client: Connected to the policy server, its session open.
        input_fd: Carries the parent's lines.
    """

    def __init__(
        self,
        config: RunConfig,
        shared_state: SharedState,
        robot: Robot,
        client: PolicyClient,
        input_fd: int,
    ) -> None:
        self._config, self._robot, self._client = config, robot, client
        self._input_fd = input_fd
        self._contract, self._ratio = config.contract, config.ratio
        self._progress = shared_state.latest_reader("progress")
        self._joint_queue = shared_state.queue_reader("joints")
        self._sensing_report = shared_state.latest_writer("sensing")
        self._chunks = shared_state.queue_writer("chunks")
        self._joints: deque[JointSample] = deque(maxlen=512)
        self._frames: dict[str, CameraSample] = {}
        self._frame_ns = 0
        self._fresh: dict[str, int] = {}
        self._progress.refresh()
        self._attempt, self._request_seq = (
            int(self._progress.values[name]) for name in ("attempt", "request_seq")
        )
        self._submitted = 0
        self._obs_timestep = -1
        self._request_sent_ns = 0
        self._unanswered = False
        self._fault = self._refusal = ""
        self._success, self._reward, self._steps, self._reports_outcome = False, 0.0, 0, False
        self._reconnecting: threading.Thread | None = None
        self._lost = False
        self._video: VideoRecorder | None = None
        self._spooler: PictureSpooler | None = None
        self._shown: LivePictures | None = None
        self._parent = os.getppid()
        self._input_buffer = b""
        self._quit = False
        self._seen_request_seq = -1

    def run(self) -> None:
        """Run until the parent closes its pipe or dies."""
        period_ns = round(1e9 / self._config.sensing_rate)
        next_ns = time.monotonic_ns()
        while not self._quit and os.getppid() == self._parent:
            now_ns = time.monotonic_ns()
            if now_ns >= next_ns:
                with trace.span("look"):
                    self._look(now_ns)
                next_ns = max(next_ns + period_ns, now_ns)
            self._read_progress()
            self._exchange()
            self._publish()
            if self._shown is not None:
                self._shown.pump()
            self._read_commands(max(0.0, min(POLL_S, (next_ns - time.monotonic_ns()) / 1e9)))
        if self._shown is not None:
            self._shown.close()
        if self._reconnecting is not None:
            self._reconnecting.join()

    # Cameras and joints

    def _look(self, now_ns: int) -> None:
        try:
            frames = self._robot.get_cameras()
            self._take_joints()
            outcome = self._robot.outcome()
        except RobotError as error:
            self._fault = str(error)
            return
        self._fault = ""
        for name, sample in frames.items():
            before = self._frames.get(name)
            if before is None or sample.stamp_ns != before.stamp_ns:
                self._fresh[name] = self._fresh.get(name, 0) + 1
        self._frames = frames
        self._frame_ns = min((s.received_ns for s in frames.values()), default=now_ns)
        self._reports_outcome = outcome is not None
        if outcome is not None:
            self._success, self._reward, self._steps = outcome
        if self._video is not None:
            self._video.add(frames, now_ns)
        if self._spooler is not None:
            self._spooler.add(frames)
        if self._shown is not None:
            self._shown.add(frames)

    def _take_joints(self) -> None:
        """If only control can read the joints, its samples come through shared memory."""
        while (views := self._joint_queue.peek()) is not None:
            if not self._robot.shareable:
                self._joints.append(
                    JointSample(
                        views["position"].copy(), int(views["stamp_ns"]), int(views["received_ns"])
                    )
                )
            self._joint_queue.release()

    def _joints_at(self, stamp_ns: int) -> JointSample | None:
        """The joint state of a picture: the nearest by the robot's own stamps."""
        if self._robot.shareable:
            return self._robot.get_joints_at(stamp_ns)
        return min(self._joints, key=lambda s: abs(s.stamp_ns - stamp_ns), default=None)

    def first_observation(self) -> MetaObs:
        """Wait for the first complete observation.

        Raises:
            RobotError: From the robot, or control published no joints in time.
        """
        deadline_s = time.monotonic() + self._config.connect_timeout_s
        while time.monotonic() < deadline_s:
            self._frames = self._robot.get_cameras()
            self._take_joints()
            obs = self._observation()
            if obs is not None:
                return obs
            time.sleep(POLL_S)
        raise RobotError(
            f"no joint state from the control process within {self._config.connect_timeout_s:g} s"
        )

    # Requests of the control process

    def _read_progress(self) -> None:
        self._progress.refresh()
        values = self._progress.values
        attempt, request_seq = int(values["attempt"]), int(values["request_seq"])
        if attempt != self._attempt:
            self._attempt = attempt
            self._obs_timestep = -1
            self._success, self._reward, self._steps = False, 0.0, 0
            self._unanswered = False
            self._refusal = ""
            if not self._lost:
                with contextlib.suppress(ServerLost):
                    self._client.reset()
        if request_seq != self._seen_request_seq:
            self._seen_request_seq = request_seq
            self._fresh.clear()
        if Phase(int(values["phase"])) not in ROLLOUT_PHASES:
            if self._unanswered and not self._lost:
                self._client.cancel()
            self._unanswered = False

    def _should_request(self) -> bool:
        values = self._progress.values
        phase = Phase(int(values["phase"]))
        if self._lost or (not self._frames and self._contract.cameras):
            return False
        if int(values["request_seq"]) == self._request_seq:
            return self._overdue()
        if phase is Phase.WAIT:
            return all(self._fresh.get(name, 0) >= FRESH_FRAMES for name in self._frames)
        return phase is Phase.RUN

    def _exchange(self) -> None:
        """Send the observation that control requested, and pass chunks on to it."""
        if self._reconnecting is not None and not self._reconnecting.is_alive():
            self._reconnecting.join()
            self._reconnecting = None
            if self._lost:
                self._start_reconnect()
        try:
            if self._should_request():
                self._submit()
            if not self._lost:
                self._pass_chunks_on()
        except (ServerLost, DeviceLost) as error:  # a server that lost its device ends
            self._report_lost(str(error))
        except ServerBusy:
            pass  # sent again in the next cycle, with the newest observation
        except PolicyError as error:
            self._refusal = self._refusal or str(error)
        except RobotError as error:
            self._fault = str(error)
        except RuntimeFault as error:
            self._report_lost(str(error))

    def _submit(self) -> None:
        values = self._progress.values
        obs = self._observation()
        if obs is None:
            return
        tick, t0_ns = int(values["tick"]), int(values["t0_ns"])
        if Phase(int(values["phase"])) is Phase.RUN:
            dt_ns = self._contract.dt_s * 1e9
            obs.timestep = round((obs.t_capture_ns - t0_ns) / dt_ns)
            if obs.timestep <= self._obs_timestep:
                return  # a newer picture will come
        else:
            obs.timestep = -(-tick // self._ratio)
        if self._overdue():
            self._client.cancel()
        self._client.submit(obs)
        self._obs_timestep = obs.timestep
        self._request_sent_ns = time.monotonic_ns()
        self._request_seq = int(values["request_seq"])
        self._submitted += 1
        self._unanswered = True

    def _overdue(self) -> bool:
        """Whether the newest request has waited too long for its answer."""
        late_ns = time.monotonic_ns() - self._request_sent_ns
        return self._unanswered and late_ns > ANSWER_WITHIN_S * 1e9

    def _observation(self) -> MetaObs | None:
        """The newest pictures and the joint state of their capture; None without a joint state."""
        if self._frames:
            oldest = min(self._frames.values(), key=lambda sample: sample.stamp_ns)
            joints = self._joints_at(oldest.stamp_ns)
        elif self._robot.shareable:
            joints = self._robot.get_joints()
        else:
            joints = self._joints[-1] if self._joints else None
        if joints is None:
            return None
        received = [sample.received_ns for sample in self._frames.values()]
        return MetaObs(
            images={name: self._frames[name].image for name in self._contract.camera_names},
            state=np.ascontiguousarray(joints.position, np.float32),
            raw_lang=self._config.language,
            t_capture_ns=min([joints.received_ns, *received]),
        )

    def _pass_chunks_on(self) -> None:
        while (chunk := self._client.poll()) is not None:
            self._unanswered = self._unanswered and chunk.obs_timestep < self._obs_timestep
            views = self._chunks.claim()
            if views is None:
                logger.warning("the control process does not take chunks: one is dropped")
                continue
            write_chunk(chunk, self._attempt, self._request_seq, views)
            self._chunks.publish()

    # A lost server

    def _report_lost(self, reason: str) -> None:
        if not self._lost:
            self._lost = True
            send_event("lost", reason=reason)
            self._unanswered = False
        if self._reconnecting is None:
            self._start_reconnect()

    def _start_reconnect(self) -> None:
        self._reconnecting = threading.Thread(target=self._reconnect_once, name="reconnect")
        self._reconnecting.start()

    def _reconnect_once(self) -> None:
        try:
            self._client.reconnect(RECONNECT_S)
        except ContractMismatch as error:
            send_event("wrong_policy", reason=str(error))
            time.sleep(RECONNECT_S)
        except (RuntimeFault, TransportError) as error:
            logger.debug("%s", error)
        else:
            self._lost = False
            send_event("connected", transport=self._client.transport)

    # Other processes

    def _publish(self) -> None:
        views = self._sensing_report.claim()
        views["heartbeat_ns"][...], views["frame_ns"][...] = time.monotonic_ns(), self._frame_ns
        views["attempt"][...], views["request_seq"][...] = self._attempt, self._request_seq
        views["submitted"][...], views["obs_timestep"][...] = self._submitted, self._obs_timestep
        views["server"][...] = ServerStatus.LOST if self._lost else ServerStatus.CONNECTED
        views["success"][...], views["reward"][...] = self._success, self._reward
        views["steps"][...], views["reports_outcome"][...] = self._steps, self._reports_outcome
        put_text(views["fault"], self._fault or self._refusal)
        self._sensing_report.publish()

    def _read_commands(self, timeout_s: float) -> None:
        readable, _, _ = select.select([self._input_fd], [], [], timeout_s)
        if not readable:
            return
        part = os.read(self._input_fd, 65536)
        self._quit = not part
        *lines, self._input_buffer = (self._input_buffer + part).split(b"\n")
        for line in lines:
            word, _, argument = line.decode().partition(" ")
            if word == "record":
                self._video = VideoRecorder(self._config.video_fps)
            elif word == "save":
                # A process started after ``record`` has no pictures, and writes no file.
                video, self._video = self._video or VideoRecorder(0.0), None
                video.save(Path(argument))
            elif word == "show":
                fd, _, layout = argument.partition(" ")
                self._shown = LivePictures(int(fd), LiveViewLayout.from_json(layout))
            elif word == "spool":
                self._start_spool(Path(argument))
            elif word == "end_spool" and self._spooler is not None:
                self._spooler.close()
                self._spooler = None

    def _start_spool(self, folder: Path) -> None:
        sizes = self._robot.contract.cameras
        cameras = {name: sizes[name] for name in self._contract.camera_names}
        self._spooler = PictureSpooler(folder, cameras)
        self._spooler.add(self._frames)


def _work(config: RunConfig, shared_state: SharedState, parent: ParentPipe) -> int:
    die_with_parent(os.getppid())  # a camera driver that hangs would keep it from ending
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    robot = config.make_robot()
    with (
        robot,
        PolicyClient(
            config.address, kind="robot", **config.demand(), **config.connection.keywords()
        ) as client,
    ):
        client.contract.require(config.served_contract)
        client.require_weights(config.weights_hash)
        parent.connect(robot, Role.SENSING, config.connect_timeout_s)
        sensing = Sensing(config, shared_state, robot, client, parent.input_fd)
        obs = sensing.first_observation()
        schema = observation_schema(obs)
        check_observation_schema(schema, client.contract)
        client.infer(obs)  # opens the session, and warms up the whole path
        client.reset()
        info = client.info
        send_event(
            "ready",
            transport=client.transport,
            transport_reason=client.transport_reason,
            pictures=client.pictures,
            info={name: getattr(info, name) for name in type(info).__slots__},
        )
        sensing.run()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sensing process. Returns the exit status."""
    keep_freed_memory()
    return child_main("sensing", _work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
