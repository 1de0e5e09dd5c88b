"""The owner process of a ``ros2`` robot: its node, under a Python that has ``rclpy``.

The executor's thread receives and decodes messages and publishes them in shared memory. The main
thread serves connections and publishes commands, so no callback delays the control loop, which is
another process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robots.base import CameraSample, JointSample, rest_command
from robots.device_owner import DeviceOwner
from robots.errors import ConnectFailed, ContractViolated, RobotError
from robots.ros2_config import CameraTopic, CommandTopic, Ros2Config
from robots.ros2_messages import encode_command
from robots.ros2_node import MESSAGES, POLL_PERIOD_S, Ros2Node, full_type, stamp_ns
from robots.ros_compressed_images import decode_compressed_colour
from robots.ros_images import message_type
from robots.ros_topics import (
    colour_decoder,
    join_joints,
    pick_joints,
    sample_receiver,
    wait_for_topics,
)
from robots.ros_twin_reports import TwinReports, new_request
from robots.sample_buffer import SampleBuffer
from robots.sensor_memory import JOINTS, SensorMemory
from transport.channel import Arrays
from transport.child_process import Isolation, isolate, send_event
from transport.shm.latest_value import LatestValueWriter

PERIOD_S = 0.01


class Sensors:
    """Receives the topics of joints and cameras, and publishes their samples in shared memory.

    Args:
        config: The configuration.
        ros: Not spun yet.
        sensor_memory: Written by the executor's thread.
        deadline_s: For all topics to have a publisher, by ``time.monotonic``.

    Attributes:
        reports: Of a simulated robot.

    Raises:
        SensorLost: A topic has no publisher.
        ContractViolated: A topic's type or reliability is another one.
    """

    def __init__(
        self, config: Ros2Config, ros: Ros2Node, sensor_memory: SensorMemory, deadline_s: float
    ) -> None:
        self._memory, self.reports = sensor_memory, TwinReports()
        topics = [state.topic for state in config.states]
        topics += [camera.topic for camera in config.cameras.values()]
        types = ros.published_types(topics, deadline_s)
        self._joints: list[SampleBuffer[JointSample]] = []
        self._cameras: dict[str, SampleBuffer[CameraSample]] = {}
        publish = self._publisher(
            JOINTS,
            sensor_memory.joint_writer(),
            self._joints,
            self.newest_joints,
            self._fill_joints,
        )
        for state in config.states:
            _check_type(state.topic, types[state.topic], "JointState")
            ros.check_reliability(state.topic, state.qos)
            joints = SampleBuffer[JointSample](
                state.topic,
                timeout_s=config.sensor_timeout_s,
                longest_jump_s=config.sensor_timeout_s,
            )
            self._joints.append(joints)
            receive = sample_receiver(
                joints, JointSample, functools.partial(pick_joints, wanted=state.joints), stamp_ns
            )
            ros.subscribe(state.topic, "JointState", _in_sequence(receive, publish), state.qos)
        for name, camera in config.cameras.items():
            kind = message_type(camera.topic, types[camera.topic].replace("/msg/", "/"))
            ros.check_reliability(camera.topic, camera.qos)
            images = SampleBuffer[CameraSample](
                camera.topic,
                timeout_s=config.sensor_timeout_s,
                keep=2,
                longest_jump_s=config.sensor_timeout_s,
            )
            self._cameras[name] = images
            receive = sample_receiver(images, CameraSample, _decoder(camera, kind), stamp_ns)
            writer = sensor_memory.camera_writer(name)
            publish = self._publisher(name, writer, [images], images.newest, _fill_image)
            ros.subscribe(camera.topic, kind, _in_sequence(receive, publish), camera.qos)
        if config.twin is not None:
            ros.subscribe(
                config.twin.outcome, "String", lambda message: self.reports.receive(message.data)
            )

    @property
    def streams(self) -> list[SampleBuffer[Any]]:
        """The samples of every topic."""
        return [*self._joints, *self._cameras.values()]

    def newest_joints(self) -> JointSample:
        """The newest state. Raises as ``SampleBuffer.newest``."""
        return join_joints([stream.newest() for stream in self._joints])

    def failure(self, name: str) -> Mapping[str, str]:
        """The fault of a sensor as ``kind`` and ``reason``; an empty reason without one."""
        try:
            for stream in self._joints if name == JOINTS else [self._cameras[name]]:
                stream.newest()
        except RobotError as error:
            return {"kind": type(error).__name__, "reason": str(error)}
        return {"reason": ""}

    def _publisher(
        self,
        name: str,
        writer: LatestValueWriter,
        streams: Sequence[SampleBuffer[Any]],
        newest: Callable[[], Any],
        fill: Callable[[Arrays, Any], None],
    ) -> Callable[[], None]:
        """A function that publishes the newest sample of the sensor ``name``, and its last fault.

        Args:
            name: The sensor's name in the shared memory.
            writer: Its writer.
            streams: The samples of its topics.
            newest: Returns the newest sample made from them. Raises as ``SampleBuffer.newest``.
            fill: Writes a sample's values, beside its times, into a slot.
        """
        fault = self._memory.fault_until_ns[name]
        published_ns: int | None = None

        def publish() -> None:
            nonlocal published_ns
            fault.store(max(stream.fault_until_ns for stream in streams))
            try:
                sample = newest()
            except RobotError:
                return  # readers notice, and ask for the reason
            if sample.stamp_ns == published_ns:
                return
            published_ns = sample.stamp_ns
            slot = writer.claim()
            slot["stamp_ns"][...], slot["received_ns"][...] = sample.stamp_ns, sample.received_ns
            fill(slot, sample)
            writer.publish()

        return publish

    def _fill_joints(self, slot: Arrays, sample: JointSample) -> None:
        slot["position"][...] = sample.position
        if self.reports.received:
            slot["success"][...], slot["reward"][...], slot["step"][...] = self.reports.outcome()


def _fill_image(slot: Arrays, sample: CameraSample) -> None:
    slot["image"][...] = sample.image


class Ros2Owner(DeviceOwner):
    """Serves connections and publishes commands.

    Args:
        config: The configuration.
        ros: The process's node.

    Raises:
        SensorLost, ContractViolated: A topic sends nothing, or what does not fit.
        ConnectFailed: Nobody takes the commands.
    """

    def __init__(self, config: Ros2Config, ros: Ros2Node) -> None:
        deadline_s = time.monotonic() + config.connect_timeout_s
        self._config, self._ros = config, ros
        actions = config.actions
        shape: dict[str, Any] = {
            "qpos": 0,
            "joints": len(config.joint_names),
            "cameras": {camera: topic.hw for camera, topic in config.cameras.items()},
        }
        memory_fd = SensorMemory.create(**shape)
        sensor_memory = SensorMemory(memory_fd, writable=True, **shape)
        self._sensors = Sensors(config, ros, sensor_memory, deadline_s)
        self._publishers = self._make_publishers(deadline_s)
        if config.twin is not None:
            self._resets = ros.publisher(config.twin.reset, "String")
        ros.spin_in_thread()
        hint = f" in {ros.where}: are the nodes of the arms and cameras running?"
        wait_for_topics(self._sensors.streams, deadline_s, config.connect_timeout_s, hint=hint)
        state = self._sensors.newest_joints().position
        super().__init__(
            sensor_memory,
            memory_fd,
            actions=actions,
            limits=config.limits.of(actions, "limits"),
            last_sent=rest_command(config.joint_names, actions, state),
            period_s=PERIOD_S,
        )

    def _make_publishers(self, deadline_s: float) -> list[tuple[CommandTopic, Any]]:
        """Wait for a subscriber of every command topic, check its type, make our publishers."""
        commands = self._config.commands
        while missing := [c.topic for c in commands if self._ros.taken_type(c.topic) is None]:
            if time.monotonic() >= deadline_s:
                raise ConnectFailed(
                    f"got no subscriber on {missing} in {self._ros.where} within "
                    f"{self._config.connect_timeout_s:g} s, expected one on each: are the arms' "
                    "controllers running?"
                )
            time.sleep(POLL_PERIOD_S)
        for command in commands:
            _check_type(command.topic, self._ros.taken_type(command.topic), command.message)
        return [
            (command, self._ros.publisher(command.topic, command.message, command.qos))
            for command in commands
        ]

    def _write(self, action: NDArray[np.float32]) -> str:
        low, high = self._config.control_hz
        period_s = min(max(self._delivery.period_s or 1 / low, 1 / high), 1 / low)
        first = 0
        for command, publisher in self._publishers:
            if not publisher.get_subscription_count():
                return f"the last subscriber on {command.topic} has gone"
            values = action[first : first + len(command.joints)]
            publisher.publish(encode_command(command, values, period_s))
            first += len(command.joints)
        return ""

    def _tick(self) -> None:
        """Nothing: messages are handled when they arrive."""

    def _handle_call(self, call: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            if call == "failure_reason":
                source = str(arguments["source"])
                if source == "commands":
                    return {"reason": self._failures.get(source, "")}
                return self._sensors.failure(source)
            if call == "reset" and self._config.twin is not None:
                request, message = new_request(int(arguments["seed"]))
                self._resets.publish(MESSAGES["String"](data=message))
                return {"request": request}
            if call == "reset_answer":
                return {"stamp_ns": self._sensors.reports.answer(arguments["request"], 0.0)}
            if call == "restart":
                state = self._sensors.newest_joints().position
                names = self._config.joint_names
                self._restart_at(rest_command(names, self._config.actions, state))
                return {}
        except RobotError as error:
            return {"error": str(error)}
        return {"error": f"unknown call {call!r}"}


def _in_sequence(
    receive: Callable[[Any], None], publish: Callable[[], None]
) -> Callable[[Any], None]:
    def callback(message: Any) -> None:
        receive(message)
        publish()

    return callback


def _check_type(topic: str, got: str | None, expected: str) -> None:
    if got != full_type(expected):
        raise ContractViolated(
            f"{topic}: got messages of type {got}, expected {full_type(expected)}; check the "
            "topic's name"
        )


def _decoder(camera: CameraTopic, kind: str) -> Callable[[Any], NDArray[np.uint8]]:
    if kind == "Image":
        return colour_decoder(camera.topic, camera.hw, camera.encoding)
    return functools.partial(decode_compressed_colour, hw=camera.hw, encoding=camera.encoding)


def _run_owner(config: Ros2Config, isolation: Isolation) -> None:
    """Start the node, report ``ready`` and serve; at the end stop all motion."""
    try:
        ros = Ros2Node("metronome", config.discovery, config.domain_id)
    except Exception as error:  # rclpy's own, e.g. of a security folder without keys
        send_event("failed", error=isolation.explain(error), kind=ConnectFailed.__name__)
        return
    try:
        with contextlib.closing(ros):
            _serve(Ros2Owner(config, ros), isolation)
    except RobotError as error:
        # The parent ends this process at once: by then the node is closed.
        send_event("failed", error=" ".join(str(error).split()), kind=type(error).__name__)


def _serve(owner: Ros2Owner, isolation: Isolation) -> None:
    signal.signal(signal.SIGTERM, lambda *_: owner.stop_requested.set())
    owner.watch_parent(isolation.input_fd)
    send_event("ready", address=owner.address)
    try:
        owner.run()
    finally:
        owner.stop_motion()


def main(arguments: list[str] | None = None) -> None:
    """Run the process; started by ``robots.ros2_robot``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent may give up before the topics are found.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    isolation = isolate()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        _run_owner(Ros2Config.from_json(options.config), isolation)
        sys.stdout.flush()
    finally:
        # Waits for no thread and no destructor.
        os._exit(0)


if __name__ == "__main__":
    main()
