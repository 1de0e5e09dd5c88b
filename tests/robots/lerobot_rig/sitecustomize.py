"""Cameras without hardware for the processes that open LeRobot's: ``cv2.VideoCapture`` alone."""

from __future__ import annotations

import sys

if any("lerobot_owner" in word or "lekiwi_host" in word for word in sys.orig_argv):
    import cv2
    import rig_camera

    cv2.VideoCapture = rig_camera.VideoCapture
