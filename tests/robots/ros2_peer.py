"""An arm or a camera on ROS 2, as a node of its own: real rclpy, and nothing of this project.

``ros2_peer.py DESCRIPTION``, JSON with the keys ``joints`` (names), ``start``, ``states`` (topic),
``commands`` ([[topic, message, [joint, ...]], ...]), ``images`` ([topic, ...]), ``record`` (a file:
every command as it arrived) and ``pictures`` (a file: every picture's number, and when it left).
Lines on stdin, ``TOPIC MODE``, spoil a topic from now on.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time

import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, QoSReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

MESSAGES = {kind.__name__: kind for kind in (JointState, JointTrajectory, Float64MultiArray)}
HW = (48, 64)
PERIOD_S, PICTURE_EVERY, STEP = 0.01, 3, 0.03
BEST_EFFORT = QoSProfile(depth=1, reliability=QoSReliabilityPolicy.BEST_EFFORT)
RELIABLE = QoSProfile(depth=100)


class Peer:
    def __init__(self, described: dict) -> None:
        self.described = described
        self.names = described.get("joints", [])
        self.node = rclpy.create_node(f"peer_{time.time_ns()}")
        self.modes: dict[str, str] = {}
        self.frozen: dict[str, int] = {}
        self.position = np.array(described.get("start", []), float)
        self.target = self.position.copy()
        self.speed = np.zeros(len(self.names))
        self.by_velocity = np.zeros(len(self.names), bool)
        self.row = struct.Struct(f"<q{1 + len(self.names)}d")
        self.record = open(described["record"], "ab", buffering=0) if self.names else None  # noqa: SIM115, PTH123
        self.pictures = open(described["pictures"], "ab", buffering=0) if self.names else None  # noqa: SIM115, PTH123
        self.publishers = {}
        self.ended = threading.Event()
        if self.names:
            self.publish_on(described["states"], JointState)
            for topic, message, joints in described["commands"]:
                self.node.create_subscription(
                    MESSAGES[message],
                    topic,
                    lambda got, message=message, joints=joints: self.obey(message, joints, got),
                    RELIABLE,
                )
        for topic in described.get("images", []):
            self.publish_on(topic, CompressedImage if topic.endswith("compressed") else Image)

    def publish_on(self, topic: str, kind: type) -> None:
        self.publishers[topic] = self.node.create_publisher(kind, topic, BEST_EFFORT)

    def obey(self, message: str, joints: list[str], got) -> None:
        arrived_ns = time.monotonic_ns()
        within_s = 0.0
        at = [self.names.index(joint) for joint in joints]
        if message == "Float64MultiArray":
            values = got.data
        elif message == "JointTrajectory":
            assert list(got.joint_names) == joints and len(got.points) == 1, got
            assert (got.header.stamp.sec, got.header.stamp.nanosec) == (0, 0), got
            values, duration = got.points[0].positions, got.points[0].time_from_start
            within_s = duration.sec + duration.nanosec / 1e9
        else:
            assert list(got.name) == joints, got.name
            values = got.position
            if len(got.velocity):
                self.speed[at], self.by_velocity[at] = got.velocity, True
                at = []
        if at:
            self.target[at] = values
        shown = np.where(self.by_velocity, self.speed, self.target)
        self.record.write(self.row.pack(arrived_ns, within_s, *shown))

    def run(self) -> None:
        tick, due_s = 0, time.monotonic()
        generator = np.random.default_rng(0)
        while not self.ended.is_set():
            if self.names:
                self.target += self.speed * PERIOD_S
                self.position += np.clip(self.target - self.position, -STEP, STEP)
                # Others on the same topic, in another order, as real robots have it.
                message = JointState(name=[*self.names[::-1], "mimic"])
                message.position = [*self.position[::-1].tolist(), 0.5]
                self.publish(self.described["states"], message)
            if tick % PICTURE_EVERY == 0:
                pixels = generator.integers(0, 256, (*HW, 3), np.uint8)
                number = tick // PICTURE_EVERY % 2**16
                pixels[0, 0] = 255, *divmod(number, 256)
                if self.pictures is not None:
                    self.pictures.write(struct.pack("<2q", number, time.monotonic_ns()))
                for topic in self.described.get("images", []):
                    self.publish(topic, picture(topic, pixels))
            tick += 1
            due_s = max(due_s + PERIOD_S, time.monotonic())
            time.sleep(max(0.0, due_s - time.monotonic()))

    def publish(self, topic: str, message) -> None:
        mode = self.modes.get(topic, "sound")
        stamp_ns = time.time_ns()
        if mode == "mute":
            return
        if mode == "freeze":
            stamp_ns = self.frozen.setdefault(topic, stamp_ns)
        elif mode in ("back", "ahead"):
            stamp_ns += {"back": -3, "ahead": 3600}[mode] * 10**9
        elif mode == "names":
            message.name[2] = "another"
        elif mode == "count":
            message.position = message.position[:5]
        elif mode == "nan":
            message.position[4] = float("nan")
        elif mode == "encoding":
            message.encoding = "nv12"
        elif mode == "size":
            message.height //= 2
            message.data = message.data[: len(message.data) // 2]
        elif mode == "short":
            message.data = message.data[:-1]
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
        self.publishers[topic].publish(message)


def picture(topic: str, pixels: np.ndarray):
    if topic.endswith("compressed"):
        import simplejpeg

        data = simplejpeg.encode_jpeg(pixels, quality=90)
        return CompressedImage(format="rgb8; jpeg compressed bgr8", data=data)
    message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding="bgr8")
    message.step = 3 * message.width
    message.data.frombytes(np.ascontiguousarray(pixels[..., ::-1]).tobytes())
    return message


def main() -> None:
    rclpy.init()
    peer = Peer(json.loads(sys.argv[1]))
    executor = SingleThreadedExecutor()
    executor.add_node(peer.node)
    publisher = threading.Thread(target=peer.run, daemon=True)
    publisher.start()
    listener = threading.Thread(target=executor.spin, daemon=True)
    listener.start()
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        topic, mode = line.split()
        peer.frozen.pop(topic, None)
        peer.modes[topic] = mode
        print("done", flush=True)  # noqa: T201
    peer.ended.set()
    publisher.join()
    executor.shutdown()
    listener.join()
    rclpy.shutdown()
    peer.node.destroy_node()  # removes its shared memory, once no thread uses it
    os._exit(0)  # not even the threads' destructors


if __name__ == "__main__":
    main()
