"""The sensing process: cameras, the policy client, the outcome.

Started as ``python -m runtime.eval_real.sensing_process``.

It looks at the cameras at its own rate and, when the control process has asked for a chunk, sends
the newest observation; answers go into the mailbox. An observation is for the policy tick nearest
to its capture, or, while the arm waits at rest, for the tick that will be next.

Its loop is never held up: a lost server is dialled again in a thread, videos are written in one.
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

from policies.errors import ContractMismatch, PolicyError
from policies.types import MetaObs
from robots.base import CameraSample, JointSample, Robot, Role
from robots.errors import RobotError
from runtime.client.policy_client import PolicyClient
from runtime.errors import RuntimeFault, ServerBusy, ServerLost
from runtime.eval_real.phases import Phase, Server
from runtime.eval_real.processes import ParentPipe, child_main
from runtime.eval_real.run_config import RunConfig
from runtime.eval_real.shared_state import SharedState, put_text, write_chunk
from runtime.eval_real.video_recorder import VideoRecorder
from runtime.protocol.messages import check_observation_schema, observation_schema
from runtime.trace import recorder as trace
from transport.child_process import die_with_parent, send_event
from transport.errors import TransportError
from transport.zeromq.malloc import keep_freed_memory

logger = logging.getLogger(__name__)

LOOK_S = 0.001
"""How long it sleeps when there is nothing to do: what a request may wait to be seen."""
ANSWER_WITHIN_S = 1.0
"""Then a request is given up and asked again, with what is seen by then."""
RECONNECT_S = 5.0
"""One attempt at a lost server; there is no end to attempts."""
FRESH_FRAMES = 2
"""New pictures of every camera before an arm at rest is shown: one may have been under way."""
ROLLING = (Phase.WAIT, Phase.APPROACH, Phase.RUN)


class Sensing:
    """One look at a time.

    Args:
        mission, mailbox: Shared with the others.
        robot: Connected for sensing.
        client: Of the policy server, its session open.
        input_fd: Where the parent's lines arrive.
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
        self._senses = shared_state.latest_writer("senses")
        self._chunks = shared_state.queue_writer("chunks")
        self._joints: deque[JointSample] = deque(maxlen=512)
        self._frames: dict[str, CameraSample] = {}
        self._frame_ns = 0
        self._fresh: dict[str, int] = {}
        self._progress.refresh()
        self._leg, self._ask = (int(self._progress.values[name]) for name in ("leg", "ask"))
        self._submitted = 0
        self._obs_timestep = -1
        self._asked_ns = 0
        self._unanswered = False
        self._fault = self._refusal = ""
        self._success, self._reward, self._steps, self._tells = False, 0.0, 0, False
        self._reconnecting: threading.Thread | None = None
        self._lost = False
        self._video: VideoRecorder | None = None
        self._parent = os.getppid()
        self._heard = b""
        self._quit = False
        self._seen_ask = -1

    def run(self) -> None:
        """Look until told to quit or left alone."""
        period_ns = round(1e9 / self._config.sensing_rate)
        next_ns = time.monotonic_ns()
        while not self._quit and os.getppid() == self._parent:
            now_ns = time.monotonic_ns()
            if now_ns >= next_ns:
                with trace.span("look"):
                    self._look(now_ns)
                next_ns = max(next_ns + period_ns, now_ns)
            self._follow()
            self._serve()
            self._publish()
            self._listen(max(0.0, min(LOOK_S, (next_ns - time.monotonic_ns()) / 1e9)))
        if self._reconnecting is not None:
            self._reconnecting.join()

    # What is seen

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
        self._tells = outcome is not None
        if outcome is not None:
            self._success, self._reward, self._steps = outcome
        if self._video is not None:
            self._video.note(frames, now_ns)

    def _take_joints(self) -> None:
        """Where the bus is control's alone, its samples come through the mailbox."""
        while (views := self._joint_queue.peek()) is not None:
            if not self._robot.shareable:
                self._joints.append(
                    JointSample(
                        views["position"].copy(), int(views["stamp_ns"]), int(views["received_ns"])
                    )
                )
            self._joint_queue.release()

    def _joints_at(self, stamp_ns: int) -> JointSample | None:
        """The joint state that belongs to a picture: nearest by the robot's own stamps."""
        if self._robot.shareable:
            return self._robot.get_joints_at(stamp_ns)
        return min(self._joints, key=lambda s: abs(s.stamp_ns - stamp_ns), default=None)

    def first_observation(self) -> MetaObs:
        """One whole observation, waited for.

        Raises:
            RobotError: It does not come; from the robot, or because control passes no joints on.
        """
        deadline_s = time.monotonic() + self._config.connect_timeout_s
        while time.monotonic() < deadline_s:
            self._frames = self._robot.get_cameras()
            self._take_joints()
            obs = self._observation()
            if obs is not None:
                return obs
            time.sleep(LOOK_S)
        raise RobotError(
            f"no joint state from the control process within {self._config.connect_timeout_s:g} s"
        )

    # What control wants

    def _follow(self) -> None:
        self._progress.refresh()
        values = self._progress.values
        attempt, ask, phase = int(values["leg"]), int(values["ask"]), Phase(int(values["phase"]))
        if attempt != self._leg:
            self._leg = attempt
            self._obs_timestep = -1
            self._success, self._reward, self._steps = False, 0.0, 0
            self._unanswered = False
            self._refusal = ""
            if not self._lost:
                with contextlib.suppress(ServerLost):
                    self._client.reset()
        if ask != self._seen_ask:
            self._seen_ask = ask
            self._fresh.clear()
        if phase not in ROLLING:
            if self._unanswered and not self._lost:
                self._client.cancel()
            self._unanswered = False

    def _wanted(self) -> bool:
        values = self._progress.values
        phase = Phase(int(values["phase"]))
        if self._lost or (not self._frames and self._contract.cameras):
            return False
        if int(values["ask"]) == self._ask:
            return self._overdue()
        if phase is Phase.WAIT:
            return all(self._fresh.get(name, 0) >= FRESH_FRAMES for name in self._frames)
        return phase is Phase.RUN

    def _serve(self) -> None:
        if self._reconnecting is not None and not self._reconnecting.is_alive():
            self._reconnecting.join()
            self._reconnecting = None
            if self._lost:
                self._reconnect()
        try:
            if self._wanted():
                self._submit()
            if not self._lost:
                self._pass_chunks_on()
        except ServerLost as error:
            self._lose(str(error))
        except ServerBusy:
            pass  # asked again at the next look, with what is seen then
        except PolicyError as error:
            self._refusal = self._refusal or str(error)
        except RobotError as error:
            self._fault = str(error)
        except RuntimeFault as error:
            self._lose(str(error))

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
        self._asked_ns = time.monotonic_ns()
        self._ask = int(values["ask"])
        self._submitted += 1
        self._unanswered = True

    def _overdue(self) -> bool:
        """Whether the newest request should have been answered by now."""
        late_ns = time.monotonic_ns() - self._asked_ns
        return self._unanswered and late_ns > ANSWER_WITHIN_S * 1e9

    def _observation(self) -> MetaObs | None:
        """The newest pictures and the state that belongs to them; None where that is missing."""
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
            write_chunk(chunk, self._leg, self._ask, views)
            self._chunks.publish()

    # The server's death

    def _lose(self, reason: str) -> None:
        if not self._lost:
            self._lost = True
            send_event("lost", reason=reason)
            self._unanswered = False
        if self._reconnecting is None:
            self._reconnect()

    def _reconnect(self) -> None:
        self._reconnecting = threading.Thread(target=self._dial_again, name="reconnect")
        self._reconnecting.start()

    def _dial_again(self) -> None:
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

    # What the others see and say

    def _publish(self) -> None:
        views = self._senses.claim()
        views["beat_ns"][...], views["frame_ns"][...] = time.monotonic_ns(), self._frame_ns
        views["leg"][...], views["ask"][...] = self._leg, self._ask
        views["submitted"][...], views["obs_timestep"][...] = self._submitted, self._obs_timestep
        views["server"][...] = Server.LOST if self._lost else Server.CONNECTED
        views["success"][...], views["reward"][...] = self._success, self._reward
        views["steps"][...], views["tells"][...] = self._steps, self._tells
        put_text(views["fault"], self._fault or self._refusal)
        self._senses.publish()

    def _listen(self, timeout_s: float) -> None:
        readable, _, _ = select.select([self._input_fd], [], [], timeout_s)
        if not readable:
            return
        part = os.read(self._input_fd, 65536)
        self._quit = not part
        *lines, self._heard = (self._heard + part).split(b"\n")
        for line in lines:
            word, _, argument = line.decode().partition(" ")
            if word == "record":
                self._video = VideoRecorder(self._config.video_fps)
            elif word == "save":
                # A successor has nothing of what its predecessor saw; it says so by no file.
                video, self._video = self._video or VideoRecorder(0.0), None
                video.save(Path(argument))


def _work(config: RunConfig, shared_state: SharedState, parent: ParentPipe) -> int:
    die_with_parent(os.getppid())  # a camera's code that hangs would not let it see the end
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    robot = config.make_robot()
    with (
        robot,
        PolicyClient(
            config.address, kind="robot", **config.demand(), **config.connection.keywords()
        ) as client,
    ):
        client.contract.require(config.served_contract)
        parent.connect(robot, Role.SENSING, config.connect_timeout_s)
        sensing = Sensing(config, shared_state, robot, client, parent.input_fd)
        obs = sensing.first_observation()
        schema = observation_schema(obs)
        check_observation_schema(schema, client.contract)
        client.infer(obs)  # opens the session, and everything has been done once
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
    keep_freed_memory()
    return child_main("sensing", _work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
