"""A ROS node that stands for Agilex's robot: its topics, units and rates, and simple motion.

Reads requests, JSON lines, from stdin: ``{"topic": ..., "mode": ...}`` spoils a topic from now on.
"""

from __future__ import annotations

import json
import sys
import threading
import time

sys.path.append("/usr/lib/python3/dist-packages")

import cv2
import numpy as np
import rospy
import simplejpeg
from sensor_msgs.msg import CompressedImage, Image, JointState

HW = (480, 640)
JOINTS = [f"joint{index}" for index in range(7)]
START = [0.0, 0.002, 0.0158, -0.03, -0.003, 0.001, 3.5578]
PERIOD_S, PICTURE_EVERY = 0.01, 10
STEP = 0.02
COMPRESSED = {
    "/camera_f/color/image_raw/compressed": "bgr8; jpeg compressed bgr8",
    "/camera_l/color/png": "rgb8; png compressed bgr8",
    "/camera_f/depth/image_raw/compressedDepth": "16UC1; compressedDepth png",
}
"""Of image_transport's names, and one of nobody's."""


class Node:
    def __init__(self) -> None:
        rospy.init_node("agilex", disable_signals=True, disable_rosout=True, disable_rostime=True)
        self.modes: dict[str, str] = {}
        self.frozen: dict[str, int] = {}
        self.position = {side: np.array(START) for side in ("left", "right")}
        self.target = {side: np.array(START) for side in ("left", "right")}
        self.publishers: dict[str, rospy.Publisher] = {}
        self.subscribers: dict[str, rospy.Subscriber] = {}
        for side in self.position:
            self.publish_on(f"/puppet/joint_{side}", JointState)
            self.listen(side)
        for camera in "flr":
            self.publish_on(f"/camera_{camera}/color/image_raw", Image)
            self.publish_on(f"/camera_{camera}/depth/image_raw", Image)
        for topic in COMPRESSED:
            self.publish_on(topic, CompressedImage)

    def publish_on(self, topic: str, kind: type) -> None:
        self.publishers[topic] = rospy.Publisher(topic, kind, queue_size=1, tcp_nodelay=True)

    def listen(self, side: str) -> None:
        topic = f"/master/joint_{side}"
        self.subscribers[topic] = rospy.Subscriber(
            topic, JointState, lambda message: self.obey(side, message), tcp_nodelay=True
        )

    def obey(self, side: str, message: JointState) -> None:
        assert message.name == JOINTS, message.name
        self.target[side] = np.array(message.position)

    def set_mode(self, topic: str, mode: str) -> None:
        if topic in self.subscribers:
            self.subscribers[topic].unregister()
            if mode != "deaf":
                self.listen(topic.rpartition("_")[2])
        self.frozen.pop(topic, None)
        self.modes[topic] = mode

    def run(self) -> None:
        tick = 0
        due_s = time.monotonic()
        while True:
            for side in self.position:
                position = self.position[side]
                position += np.clip(self.target[side] - position, -STEP, STEP)
                message = JointState(name=list(JOINTS), position=position.tolist())
                self.publish(f"/puppet/joint_{side}", message)
            if tick % PICTURE_EVERY == 0:
                for index, camera in enumerate("flr"):
                    self.publish(f"/camera_{camera}/color/image_raw", picture(tick, index))
                    self.publish(f"/camera_{camera}/depth/image_raw", depth(tick, index))
                for topic in COMPRESSED:
                    if self.publishers[topic].get_num_connections():
                        self.publish(topic, compressed(topic, tick))
            tick += 1
            due_s += PERIOD_S
            time.sleep(max(0.0, due_s - time.monotonic()))

    def publish(self, topic: str, message: JointState | Image | CompressedImage) -> None:
        mode = self.modes.get(topic, "sound")
        stamp_ns = time.time_ns()
        if mode == "mute":
            return
        if mode == "freeze":
            stamp_ns = self.frozen.setdefault(topic, stamp_ns)
        elif mode == "back":
            stamp_ns -= 3 * 10**9
        elif mode == "names":
            message.name[2:4] = message.name[3:1:-1]
        elif mode == "count":
            message.position, message.name = message.position[:6], []
        elif mode == "nan":
            message.position[4] = float("nan")
        elif mode == "encoding":
            message.encoding = "nv12"
        elif mode == "yuyv":
            rows = np.full((*HW, 2), 128, np.uint8)
            rows[..., 0], message.step = 235, 2 * HW[1]
            message.encoding, message.data = "yuv422_yuy2", rows.tobytes()
        elif mode == "8UC3":
            message.encoding = "8UC3"
        elif mode == "size":
            message.height //= 2
        elif mode == "short":
            message.data = message.data[:-1]
        message.header.stamp = rospy.Time(*divmod(stamp_ns, 10**9))
        self.publishers[topic].publish(message)


def picture(tick: int, index: int) -> Image:
    """Blue left half, the camera's index in red; brighter with every picture. Rows are padded."""
    rows = np.zeros((HW[0], HW[1] + 2, 3), np.uint8)
    rows[:, : HW[1] // 2, 0] = 255
    rows[..., 1], rows[..., 2] = (tick // PICTURE_EVERY) % 200, 10 * index + 5
    return Image(height=HW[0], width=HW[1], encoding="bgr8", step=rows.strides[0],
                 data=rows.tobytes())  # fmt: skip


def depth(tick: int, index: int) -> Image:
    rows = np.full(HW, 1000 * (index + 1) + tick % 100, ">u2")
    return Image(height=HW[0], width=HW[1], encoding="16UC1", is_bigendian=1, step=rows.strides[0],
                 data=rows.tobytes())  # fmt: skip


def compressed(topic: str, tick: int) -> CompressedImage:
    """Of the raw pictures' content."""
    said = COMPRESSED[topic]
    raw = depth(tick, 0) if "Depth" in said else picture(tick, "fl".index(topic[len("/camera_")]))
    if "Depth" in said:
        data = bytes(12) + cv2.imencode(".png", _array(raw, ">u2").astype("<u2"))[1].tobytes()
    elif "jpeg" in said:
        rgb = _array(raw, np.uint8).reshape(HW[0], -1, 3)[:, : HW[1], ::-1]
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=95)
    else:
        data = cv2.imencode(".png", _array(raw, np.uint8).reshape(HW[0], -1, 3)[:, : HW[1]])[1]
        data = data.tobytes()
    return CompressedImage(format=said, data=data)


def _array(raw: Image, kind: str | type) -> np.ndarray:
    return np.frombuffer(raw.data, kind).reshape(HW[0], -1)


def main() -> None:
    node = Node()
    threading.Thread(target=node.run, daemon=True).start()
    for line in sys.stdin:
        request = json.loads(line)
        if request:
            node.set_mode(request["topic"], request["mode"])
        sys.stdout.write("done\n")
        sys.stdout.flush()
    rospy.signal_shutdown("stdin has ended")


if __name__ == "__main__":
    main()
