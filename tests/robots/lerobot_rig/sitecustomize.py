"""For the processes that open LeRobot's devices: cameras without hardware, longer timeouts.

``cv2.VideoCapture`` is replaced. The SDKs wait for an answer for 50 ms; here the servos are a
process, and a busy machine may keep it waiting for longer, which ends LeRobot's own host.
"""

from __future__ import annotations

import sys

TIMES_LONGER = 40

if any("lerobot_owner_process" in word or "lekiwi_host" in word for word in sys.orig_argv):
    import cv2
    import dynamixel_sdk
    import rig_camera
    import scservo_sdk

    cv2.VideoCapture = rig_camera.VideoCapture
    for sdk in (scservo_sdk, dynamixel_sdk):
        elapsed = sdk.PortHandler.getTimeSinceStart
        sdk.PortHandler.getTimeSinceStart = lambda self, ms=elapsed: ms(self) / TIMES_LONGER
