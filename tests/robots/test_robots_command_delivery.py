"""Commands that were delayed or missed on the way to a device cause no jump."""

from __future__ import annotations

import numpy as np
import pytest

from robots.base import ActionKind, ActionSpec
from robots.command_delivery import GAPS, LONGEST_STEP_S, MAX_DELAY_S, CommandDelivery
from robots.errors import RobotLost
from robots.joint_limits import JointLimits
from robots.motion_limiter import MotionLimiter

PERIOD_S = 1 / 30
LIMITS = JointLimits(
    np.array([-100.0, -0.3]), np.array([100.0, 0.3]), np.array([90.0, 0.3]), np.array([600.0, 0.8])
)
ACTIONS = (ActionSpec("j", unit="deg"), ActionSpec("x.vel", ActionKind.VELOCITY, "m/s"))


class ForwardedCommands:
    """Commands of one sender, and the clock of the process that forwards them."""

    def __init__(self) -> None:
        self.sender = MotionLimiter(LIMITS, PERIOD_S, ACTIONS)
        self.delivery = CommandDelivery(LIMITS, ACTIONS, np.zeros(2))
        self.sender.reset(np.zeros(2))
        self.now_ns = 10**12
        self.delivered = [np.zeros(2)]

    def command(self, target: tuple[float, float], *, arrives: bool = True) -> None:
        self.now_ns += round(1e9 * PERIOD_S)
        wanted = self.sender.limit(np.array(target)).copy()
        self.delivery.record_arrival(self.now_ns)
        if arrives:
            action = self.delivery.follow(wanted, self.now_ns)
            self.delivered.append(action.astype(np.float64))

    def settle(self) -> None:
        for _ in range(GAPS + 2):
            self.command((0.0, 0.0))


@pytest.fixture
def commands() -> ForwardedCommands:
    commands = ForwardedCommands()
    commands.settle()
    return commands


def test_commands_within_the_limits_pass_bit_for_bit(commands: ForwardedCommands) -> None:
    for tick in range(120):
        commands.command((80 * np.sin(tick / 20), 0.3 if tick < 60 else -0.3))
        assert (
            commands.delivered[-1].astype(np.float32).tobytes() == commands.sender.command.tobytes()
        )


@pytest.mark.parametrize("missed", [1, 3, 6])
def test_steps_after_missed_commands_keep_the_limits(
    commands: ForwardedCommands, missed: int
) -> None:
    for tick in range(90):
        arrives = not 20 <= tick < 20 + missed
        commands.command((80.0 if tick < 60 else 0.0, 0.3), arrives=arrives)
    moved = np.abs(np.diff(np.stack(commands.delivered), axis=0))
    assert moved[:, 0].max() <= 90 * LONGEST_STEP_S * 1.001
    assert moved[:, 1].max() <= 0.8 * LONGEST_STEP_S * 1.001
    np.testing.assert_allclose(commands.delivered[-1], commands.sender.command, atol=1e-4)


def test_a_single_command_is_approached_at_the_velocity_limit(commands: ForwardedCommands) -> None:
    wanted, steps = np.array([45.0, 0.0], np.float32), 0
    while not np.array_equal(commands.delivered[-1], wanted):
        commands.now_ns += 10_000_000
        action = commands.delivery.follow(wanted, commands.now_ns)
        commands.delivered.append(action.astype(np.float64))
        steps += 1
    assert 45 <= steps <= 50  # 0.5 s at 90 degrees a second, a tenth more for jitter


def test_commands_after_a_long_delay_are_refused(commands: ForwardedCommands) -> None:
    for _ in range(20):
        commands.command((80.0, 0.3))
    left = commands.delivered[-1]
    for _ in range(1 + int(MAX_DELAY_S / PERIOD_S)):
        commands.command((80.0, 0.3), arrives=False)
    for _ in range(3):
        with pytest.raises(RobotLost, match=r"delayed for 0\.\d\d s while the robot was"):
            commands.command((80.0, 0.3))
    assert commands.delivery.refused
    # A sender that begins at the last command sent is followed again.
    commands.delivery.reset(np.array([left[0], 0.0], np.float32), commands.now_ns)
    commands.sender.reset([left[0], 0.0])
    commands.command((float(np.float32(left[0])), 0.0))
    assert not commands.delivery.refused


def test_a_delay_at_rest_refuses_nothing(commands: ForwardedCommands) -> None:
    for _ in range(30):
        commands.command((0.0, 0.0), arrives=False)
    commands.command((0.0, 0.0))
    commands.command((5.0, 0.1))
    assert not commands.delivery.refused
