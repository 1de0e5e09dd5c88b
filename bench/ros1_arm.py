"""Two arms and a camera on ROS 1, as a node of its own, for ``bench/ros2.py``.

``ros1_arm.py FOLDER`` publishes 14 joints at 100 Hz and a picture at 33 Hz, as
``tests/robots/ros2_peer.py`` does over ROS 2, until stdin ends. ``FOLDER/pictures`` has every
picture's number and when it left, ``FOLDER/commands`` when each command of the left arm arrived and
its first number.
"""

from __future__ import annotations

import struct
import sys
import threading
import time
from pathlib import Path

sys.path.append("/usr/lib/python3/dist-packages")

import numpy as np
import rospy
from sensor_msgs.msg import Image, JointState

HW = (48, 64)
JOINTS = [f"joint{index}" for index in range(7)]
PERIOD_S, PICTURE_EVERY = 0.01, 3


def stamp() -> rospy.Time:
    return rospy.Time(*divmod(time.time_ns(), 10**9))


def publish(folder: Path, targets: dict[str, list[float]]) -> None:
    arms = {
        side: rospy.Publisher(f"/puppet/joint_{side}", JointState, queue_size=1, tcp_nodelay=True)
        for side in targets
    }
    camera = rospy.Publisher("/camera_f/color/image_raw", Image, queue_size=1, tcp_nodelay=True)
    generator = np.random.default_rng(0)
    tick, due_s = 0, time.monotonic()
    with (folder / "pictures").open("wb", buffering=0) as pictures:
        while not rospy.is_shutdown():
            for side, publisher in arms.items():
                message = JointState(name=JOINTS, position=targets[side])
                message.header.stamp = stamp()
                publisher.publish(message)
            if tick % PICTURE_EVERY == 0:
                pixels = generator.integers(0, 256, (*HW, 3), np.uint8)
                number = tick // PICTURE_EVERY % 2**16
                pixels[0, 0] = (*divmod(number, 256)[::-1], 255)  # blue, green, red
                picture = Image(height=HW[0], width=HW[1], encoding="bgr8", step=3 * HW[1])
                picture.data = pixels.tobytes()
                pictures.write(struct.pack("<2q", number, time.monotonic_ns()))
                picture.header.stamp = stamp()
                camera.publish(picture)
            tick += 1
            due_s = max(due_s + PERIOD_S, time.monotonic())
            time.sleep(max(0.0, due_s - time.monotonic()))


def main() -> None:
    folder = Path(sys.argv[1])
    rospy.init_node("arms", disable_signals=True, disable_rosout=True, disable_rostime=True)
    targets = {side: [0.0] * len(JOINTS) for side in ("left", "right")}
    with (folder / "commands").open("wb", buffering=0) as commands:

        def obey(side: str, message: JointState) -> None:
            arrived_ns = time.monotonic_ns()
            targets[side] = list(message.position)
            if side == "left":
                commands.write(struct.pack("<qd", arrived_ns, message.position[0]))

        for side in targets:
            rospy.Subscriber(
                f"/master/joint_{side}",
                JointState,
                lambda message, side=side: obey(side, message),
                tcp_nodelay=True,
            )
        threading.Thread(target=publish, args=(folder, targets), daemon=True).start()
        sys.stdin.read()
    rospy.signal_shutdown("stdin has ended")


if __name__ == "__main__":
    main()
