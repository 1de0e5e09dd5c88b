"""A frozen camera is distinguished from one in front of a still scene."""

from __future__ import annotations

import time

import numpy as np
import pytest

from robots.base import CameraSample
from robots.errors import SensorLost
from robots.frozen_image_check import FrozenImageCheck

TIMEOUT_NS = 500_000_000
STILL = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


class Camera:
    """Passes samples to the check, on a simulated clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, repeats: bool = False) -> None:
        self.now_ns = 10**12
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.now_ns)
        self.watch = FrozenImageCheck(TIMEOUT_NS, repeats=repeats)

    def show(self, image: np.ndarray, *, sent: bool = True) -> None:
        """One look, 33 ms after the last; ``sent``: the camera gave a picture since."""
        self.now_ns += 33_000_000
        if sent:
            self.stamp_ns = self.now_ns
        self.watch.check("arm", {"top": CameraSample(image, self.stamp_ns, self.stamp_ns)})


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> Camera:
    return Camera(monkeypatch)


def test_a_repeated_image_is_a_frozen_camera(camera: Camera) -> None:
    for _ in range(16):
        camera.show(STILL.copy())
    with pytest.raises(SensorLost, match=r"arm: camera top: the same picture for 0.53 s, expected"):
        for _ in range(3):
            camera.show(STILL.copy())


def test_a_camera_that_sends_nothing_is_lost(camera: Camera) -> None:
    camera.show(STILL)
    with pytest.raises(SensorLost, match=r"camera top: no new picture for 0.5\d s"):
        for _ in range(20):
            camera.show(STILL, sent=False)


def test_a_change_in_one_pixel_is_a_new_image(camera: Camera) -> None:
    for look in range(60):
        image = STILL.copy()
        image[17, 23, 1] ^= look % 2  # not among those that are compared first
        camera.show(image)


def test_a_camera_recovers(camera: Camera) -> None:
    with pytest.raises(SensorLost):
        for _ in range(20):
            camera.show(STILL.copy())
    camera.show(STILL ^ np.uint8(1))
    camera.show(STILL)


def test_dark_images_may_repeat_but_not_stop(camera: Camera) -> None:
    dark = np.zeros((48, 64, 3), np.uint8)
    for _ in range(60):
        camera.show(dark.copy())
    with pytest.raises(SensorLost, match="no new picture"):
        for _ in range(20):
            camera.show(dark, sent=False)


def test_a_simulators_images_may_repeat_but_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    camera = Camera(monkeypatch, repeats=True)
    for _ in range(60):
        camera.show(STILL.copy())
    with pytest.raises(SensorLost, match="no new picture"):
        for _ in range(20):
            camera.show(STILL, sent=False)
