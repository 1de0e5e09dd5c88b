"""What LeRobot uses of OpenCV's camera: noise, at the rate and of the size that were asked for."""

from __future__ import annotations

import time

import cv2
import numpy as np


class VideoCapture:
    def __init__(self, *_: object) -> None:
        self._open = True
        self._settings = {
            cv2.CAP_PROP_FPS: 30.0,
            cv2.CAP_PROP_FRAME_WIDTH: 640.0,
            cv2.CAP_PROP_FRAME_HEIGHT: 480.0,
        }
        self._rng = np.random.default_rng(0)

    def isOpened(self) -> bool:  # noqa: N802 (OpenCV's name)
        return self._open

    def set(self, key: int, value: float) -> bool:
        self._settings[key] = value
        return True

    def get(self, key: int) -> float:
        return self._settings.get(key, 0.0)

    def read(self) -> tuple[bool, np.ndarray]:
        time.sleep(1 / self._settings[cv2.CAP_PROP_FPS])
        height = int(self._settings[cv2.CAP_PROP_FRAME_HEIGHT])
        width = int(self._settings[cv2.CAP_PROP_FRAME_WIDTH])
        return True, self._rng.integers(0, 256, (height, width, 3), np.uint8)

    def release(self) -> None:
        self._open = False
