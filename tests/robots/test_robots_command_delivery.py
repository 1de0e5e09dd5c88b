"""Between whoever commands and a device: nothing leaps, whoever was held up."""

from __future__ import annotations

import numpy as np
import pytest

from robots.base import ActionKind, ActionSpec
from robots.command_delivery import GAPS, HELD_UP_S, LONGEST_STEP_S, CommandDelivery
from robots.errors import RobotLost
from robots.joint_limits import JointLimits
from robots.motion_limiter import MotionLimiter

PERIOD_S = 1 / 30
LIMITS = JointLimits(
    np.array([-100.0, -0.3]), np.array([100.0, 0.3]), np.array([90.0, 0.3]), np.array([600.0, 0.8])
)
ACTIONS = (ActionSpec("j", unit="deg"), ActionSpec("x.vel", ActionKind.VELOCITY, "m/s"))


class Line:
    """Commands of one sender, and the clock of who passes them on."""

    def __init__(self) -> None:
        self.sender = MotionLimiter(LIMITS, PERIOD_S, ACTIONS)
        self.delivery = CommandDelivery(LIMITS, ACTIONS, np.zeros(2))
        self.sender.reset(np.zeros(2))
        self.now_ns = 10**12
        self.delivered = [np.zeros(2)]

    def command(self, target: tuple[float, float], *, arrives: bool = True) -> None:
        self.now_ns += round(1e9 * PERIOD_S)
        wanted = self.sender.limit(np.array(target)).copy()
        self.delivery.note(self.now_ns)
        if arrives:
            action = self.delivery.follow(wanted, self.now_ns)
            self.delivered.append(action.astype(np.float64))

    def settle(self) -> None:
        for _ in range(GAPS + 2):
            self.command((0.0, 0.0))


@pytest.fixture
def line() -> Line:
    made = Line()
    made.settle()
    return made


def test_what_keeps_the_limits_passes_bit_for_bit(line: Line) -> None:
    for tick in range(120):
        line.command((80 * np.sin(tick / 20), 0.3 if tick < 60 else -0.3))
        assert line.delivered[-1].astype(np.float32).tobytes() == line.sender.command.tobytes()


@pytest.mark.parametrize("missed", [1, 3, 6])
def test_after_missed_commands_nothing_leaps(line: Line, missed: int) -> None:
    for tick in range(90):
        arrives = not 20 <= tick < 20 + missed
        line.command((80.0 if tick < 60 else 0.0, 0.3), arrives=arrives)
    moved = np.abs(np.diff(np.stack(line.delivered), axis=0))
    assert moved[:, 0].max() <= 90 * LONGEST_STEP_S * 1.001
    assert moved[:, 1].max() <= 0.8 * LONGEST_STEP_S * 1.001
    np.testing.assert_allclose(line.delivered[-1], line.sender.command, atol=1e-4)


def test_a_single_command_is_gone_after_at_the_limits_speed(line: Line) -> None:
    wanted, steps = np.array([45.0, 0.0], np.float32), 0
    while not np.array_equal(line.delivered[-1], wanted):
        line.now_ns += 10_000_000
        action = line.delivery.follow(wanted, line.now_ns)
        line.delivered.append(action.astype(np.float64))
        steps += 1
    assert 45 <= steps <= 50  # 0.5 s at 90 degrees a second, a tenth more for jitter


def test_a_motion_that_is_over_is_not_caught_up_with(line: Line) -> None:
    for _ in range(20):
        line.command((80.0, 0.3))
    left = line.delivered[-1]
    for _ in range(1 + int(HELD_UP_S / PERIOD_S)):
        line.command((80.0, 0.3), arrives=False)
    for _ in range(3):
        with pytest.raises(RobotLost, match=r"held up for 0\.\d\d s while it was to move"):
            line.command((80.0, 0.3))
    assert line.delivery.refused
    # Who begins where the robot was left is followed again.
    line.delivery.reset(np.array([left[0], 0.0], np.float32), line.now_ns)
    line.sender.reset([left[0], 0.0])
    line.command((float(np.float32(left[0])), 0.0))
    assert not line.delivery.refused


def test_rest_may_be_held_up(line: Line) -> None:
    for _ in range(30):
        line.command((0.0, 0.0), arrives=False)
    line.command((0.0, 0.0))
    line.command((5.0, 0.1))
    assert not line.delivery.refused
