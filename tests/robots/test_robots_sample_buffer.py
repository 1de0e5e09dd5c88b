"""Streams of stamped samples: what is fresh, what is a fault."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
from contracts.robot import until
from hypothesis import given
from hypothesis import strategies as st

from robots.base import JointSample
from robots.errors import ContractViolated, SensorLost, StampFault
from robots.sample_buffer import SampleBuffer

NEVER_S = 3600.0


def sample(stamp_ns: int, age_s: float = 0.0) -> JointSample:
    return JointSample(None, stamp_ns, time.monotonic_ns() - round(age_s * 1e9))


@given(st.sets(st.integers(0, 10**18), min_size=1, max_size=30), st.integers(0, 10**18))
def test_the_nearest_stamp_is_found(stamps: set[int], wanted: int) -> None:
    stream = SampleBuffer("/joints", timeout_s=NEVER_S)
    for stamp in sorted(stamps):
        stream.add(sample(stamp))
    assert stream.newest().stamp_ns == max(stamps)
    found = stream.nearest(wanted).stamp_ns
    assert abs(found - wanted) == min(abs(stamp - wanted) for stamp in stamps)


def test_only_the_newest_are_kept() -> None:
    stream = SampleBuffer("/joints", timeout_s=NEVER_S, keep=3)
    for stamp in range(5):
        stream.add(sample(stamp))
    assert stream.nearest(0).stamp_ns == 2


def test_a_stamp_that_goes_back_is_a_fault_that_names_the_numbers() -> None:
    stream = SampleBuffer("/joints", timeout_s=NEVER_S)
    stream.add(sample(5_000_000_000))
    stream.add(sample(3_000_000_000))
    for look in (stream.newest, lambda: stream.nearest(0)):
        with pytest.raises(StampFault, match=r"/joints: stamp went back by 2.0+ s, from 5000000"):
            look()


def test_after_a_while_without_another_it_goes_on_from_the_new_stamps() -> None:
    stream = SampleBuffer("/joints", timeout_s=0.02)
    stream.add(sample(5_000_000_000))
    stream.add(sample(3_000_000_000))

    stamps = itertools.count(3_000_000_001)

    def healed() -> bool:
        stream.add(sample(next(stamps)))
        try:
            return stream.newest().stamp_ns < 5_000_000_000
        except StampFault:
            return False

    assert not healed()
    until(healed)
    assert stream.nearest(5_000_000_000).stamp_ns < 5_000_000_000


def test_a_frozen_stamp_is_told_from_silence() -> None:
    stream = SampleBuffer("/camera", timeout_s=1.0)
    stream.add(sample(7, age_s=1.5))
    with pytest.raises(SensorLost, match=r"/camera: nothing received for 1.5. s, expected .* 1 s"):
        stream.newest()
    stream.add(sample(7))
    stream.add(sample(7))
    with pytest.raises(StampFault, match=r"/camera: stamp stands still at 7 ns for 1.5. s, 2 mess"):
        stream.newest()
    stream.add(sample(8))
    assert stream.newest().stamp_ns == 8


def test_an_invalid_sample_raises_its_own_error() -> None:
    stream = SampleBuffer("/camera", timeout_s=NEVER_S)
    with pytest.raises(SensorLost, match="/camera: nothing received yet"):
        stream.newest()
    stream.fail(ContractViolated, "got mono8")
    for look in (stream.newest, lambda: stream.wait(0.0)):
        with pytest.raises(ContractViolated, match="/camera: got mono8"):
            look()


def test_waiting_ends_when_the_sensor_runs_or_with_the_deadline() -> None:
    stream = SampleBuffer("/joints", timeout_s=NEVER_S)
    assert not stream.wait(time.monotonic())
    stream.add(sample(1))
    assert not stream.wait(time.monotonic())
    stream.add(sample(1))
    with pytest.raises(StampFault, match=r"stamp stands still at 1 ns, 2 messages carried it"):
        stream.wait(time.monotonic())
    speaker = threading.Thread(target=lambda: stream.add(sample(2)))
    speaker.start()
    assert stream.wait(time.monotonic() + NEVER_S)
    speaker.join()
