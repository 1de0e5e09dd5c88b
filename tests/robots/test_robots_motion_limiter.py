"""The laws of the motion limits, from every state that commands can reach."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robots.base import ActionKind, ActionSpec
from robots.errors import UnsafeCommand
from robots.joint_limits import JointLimits
from robots.motion_limiter import MotionLimiter

RELATIVE = 1e-9
"""Of a velocity or acceleration limit, for float64 rounding."""


def make_limits(
    lower: float = -1.0, upper: float = 1.0, velocity: float = 1.0, acceleration: float = 5.0
) -> JointLimits:
    return JointLimits.from_config(
        ("joint",),
        position_lower=(lower,),
        position_upper=(upper,),
        velocity=(velocity,),
        acceleration=(acceleration,),
        source="test",
    )


def check(limiter: MotionLimiter, before: np.ndarray, velocity_before: np.ndarray) -> None:
    """The command just let out keeps to the limits, and a stop from there would too."""
    limits, period_s = limiter.limits, limiter.period_s
    position, velocity = limiter.position, limiter.velocity
    tolerance = RELATIVE * limits.velocity
    assert (np.abs(velocity) <= limits.velocity + tolerance).all()
    change = np.abs(velocity - velocity_before)
    quantum = limits.acceleration * period_s
    assert (change <= quantum + tolerance + RELATIVE * quantum).all()
    np.testing.assert_allclose(position - before, velocity * period_s, rtol=1e-6, atol=1e-9)
    assert (position >= limits.position_lower).all()
    assert (position <= limits.position_upper).all()
    sent = limiter.command.astype(np.float64)
    assert (sent >= limits.position_lower).all()
    assert (sent <= limits.position_upper).all()
    # The stop, summed up as its definition says.
    for p, v, u, lower, upper in zip(
        position, velocity, quantum, limits.position_lower, limits.position_upper, strict=True
    ):
        steps = math.ceil(abs(v) / u) if math.isfinite(u) else 0
        distance = period_s * sum(max(0.0, abs(v) - i * u) for i in range(1, steps + 1))
        ends = p + math.copysign(distance, v)
        assert lower - 1e-9 * (upper - lower) <= ends <= upper + 1e-9 * (upper - lower)


def step(limiter: MotionLimiter, target: float | np.ndarray | None) -> np.ndarray:
    """One checked command towards ``target``, or of a stop."""
    before, velocity = limiter.position.copy(), limiter.velocity.copy()
    if target is None:
        sent = limiter.brake()
    else:
        sent = limiter.limit(np.broadcast_to(np.asarray(target, np.float64), before.shape))
    check(limiter, before, velocity)
    return sent.copy()


machines = st.builds(
    make_limits,
    lower=st.floats(-5, -0.01),
    upper=st.floats(0.01, 5),
    velocity=st.floats(0.01, 20),
    acceleration=st.floats(0.05, 500),
)
periods = st.sampled_from((0.001, 0.002, 1 / 150, 0.02, 0.1))
requested = st.lists(st.one_of(st.none(), st.floats(-8, 8)), min_size=1, max_size=60)


@given(limits=machines, period_s=periods, targets=requested, start=st.floats(0, 1))
def test_every_command_keeps_the_limits_and_can_stop_inside_them(
    limits: JointLimits, period_s: float, targets: list[float | None], start: float
) -> None:
    limiter = MotionLimiter(limits, period_s)
    low, high = limits.position_lower[0], limits.position_upper[0]
    limiter.reset([min(high, low + start * (high - low))])
    for target in targets:
        for _ in range(7):  # held for some ticks, so that speed builds up
            step(limiter, target)


@given(limits=machines, period_s=periods, targets=requested)
def test_a_stop_ends_after_the_ticks_that_were_computed(
    limits: JointLimits, period_s: float, targets: list[float | None]
) -> None:
    limiter = MotionLimiter(limits, period_s)
    limiter.reset([0.0])
    for target in targets:
        step(limiter, target)
    ticks = limiter.ticks_to_rest()
    assert ticks <= limiter.worst_ticks_to_rest()
    for _ in range(ticks):
        step(limiter, None)
    assert limiter.at_rest
    rest = limiter.command.copy()
    np.testing.assert_array_equal(limiter.brake(), rest)


@given(
    period_s=periods,
    crossing=st.floats(5, 150),
    speeding_up=st.floats(0.1, 50),
    start=st.floats(0, 1),
    end=st.floats(0, 1),
)
def test_a_step_is_met_without_overshoot_and_kept(
    period_s: float, crossing: float, speeding_up: float, start: float, end: float
) -> None:
    """Whatever it takes, in ticks, to cross the range and to reach full speed."""
    velocity = 4.5 / (crossing * period_s)
    limiter = MotionLimiter(
        make_limits(-1.5, 3.0, velocity, velocity / (speeding_up * period_s)), period_s
    )
    start, end = (min(3.0, -1.5 + x * 4.5) for x in (start, end))
    limiter.reset([start])
    lowest, highest = min(start, end), max(start, end)
    for _ in range(math.ceil(2 * crossing + 4 * speeding_up) + 5):
        step(limiter, end)
        assert lowest - 1e-9 <= limiter.position[0] <= highest + 1e-9
    assert limiter.at_rest
    assert limiter.position[0] == end
    assert limiter.command[0] == pytest.approx(end, abs=1e-6)


@given(
    period_s=periods,
    coefficients=st.lists(st.floats(-1, 1), min_size=4, max_size=4),
)
def test_a_motion_within_the_limits_passes_bit_for_bit(
    period_s: float, coefficients: list[float]
) -> None:
    limits = make_limits(-9, 9, 30, 300)
    limiter = MotionLimiter(limits, period_s)
    times = np.arange(300) * period_s
    wanted = sum(c * (1 - np.cos((i + 1) * times)) for i, c in enumerate(coefficients)).astype(
        np.float32
    )
    limiter.reset(wanted[:1])
    for value in wanted:
        assert limiter.limit(np.array([value])).tobytes() == value.tobytes()
    assert limiter.statistics().clamped_ticks == 0


@given(limits=machines, period_s=periods, outside=st.floats(1e-3, 1), targets=requested)
def test_a_joint_that_starts_outside_only_comes_inside(
    limits: JointLimits, period_s: float, outside: float, targets: list[float | None]
) -> None:
    limiter = MotionLimiter(limits, period_s)
    upper = limits.position_upper[0]
    limiter.reset([upper + outside])
    last = limiter.position[0]
    for target in targets:
        if target is None:
            limiter.brake()
        else:
            limiter.limit(np.array([target]))
        assert limiter.position[0] <= max(last, upper)
        last = limiter.position[0]


def test_what_was_clamped_is_counted_by_joint_and_limit() -> None:
    limits = JointLimits.from_config(
        ("a", "b", "c"),
        position_lower=(-1, -1, -1),
        position_upper=(1, 1, 1),
        velocity=(1, 1, 100),
        acceleration=(math.inf, 5, math.inf),
        source="test",
    )
    limiter = MotionLimiter(limits, 0.02)
    limiter.reset(np.zeros(3))
    limiter.limit(np.array([0.5, 0.02, 2.0]))
    said = limiter.statistics()
    assert (said.commands, said.clamped_ticks) == (1, 1)
    assert said.velocity == (1, 0, 0)
    assert said.acceleration == (0, 1, 0)
    assert said.position == (0, 0, 1)
    np.testing.assert_allclose(limiter.command, [0.02, 0.002, 1.0], rtol=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_is_refused_by_joint_and_changes_nothing(poison: float) -> None:
    limits = JointLimits.from_config(
        ("a", "b"),
        position_lower=(-1, -1),
        position_upper=(1, 1),
        velocity=(1, 1),
        acceleration=(5, 5),
        source="test",
    )
    limiter = MotionLimiter(limits, 0.02)
    limiter.reset(np.zeros(2))
    limiter.limit(np.array([0.5, 0.5]))
    before = limiter.position.copy()
    with pytest.raises(UnsafeCommand, match=f"joint 1: got {poison} for a command, expected a fin"):
        limiter.limit(np.array([0.6, poison]))
    np.testing.assert_array_equal(limiter.position, before)
    assert limiter.statistics().commands == 1
    limiter.brake()
    assert limiter.at_rest


def test_a_stop_takes_over_what_somebody_else_set_in_motion() -> None:
    limiter = MotionLimiter(make_limits(), 0.02)
    limiter.reset([-1.0])
    last = before = limiter.command.copy()
    for _ in range(40):
        before, last = last, limiter.limit(np.array([1.0])).copy()
    successor = MotionLimiter(limiter.limits, 0.02)
    successor.reset(last, before)
    ticks = successor.ticks_to_rest()
    assert ticks == pytest.approx(limiter.ticks_to_rest(), abs=1)  # from float32 commands
    for _ in range(ticks):
        assert not successor.at_rest
        pose = successor.brake().copy()
        assert -1 <= pose[0] <= 1
    assert successor.at_rest
    np.testing.assert_array_equal(successor.brake(), pose)
    for _ in range(ticks):
        limiter.brake()
    np.testing.assert_allclose(pose, limiter.command, atol=1e-4)


@given(last=st.floats(-1.2, 1.2), before=st.floats(-1.2, 1.2), limits=machines, period_s=periods)
def test_from_any_state_a_stop_ends_in_time_and_goes_no_further_out(
    last: float, before: float, limits: JointLimits, period_s: float
) -> None:
    limiter = MotionLimiter(limits, period_s)
    limiter.reset([last], [before])
    low = min(last, float(limits.position_lower[0]))
    high = max(last, float(limits.position_upper[0]))
    for _ in range(min(limiter.ticks_to_rest(), 10_000)):
        assert low - 1e-6 <= limiter.brake()[0] <= high + 1e-6
        if limiter.at_rest:
            break
    else:
        assert limiter.ticks_to_rest() > 0 or limiter.at_rest


BASE = (ActionSpec("x.vel", ActionKind.VELOCITY, "m/s"),)


@given(
    limits=machines,
    period_s=periods,
    requests=requested,
    start=st.floats(-20, 20),
)
def test_a_velocity_keeps_its_bounds_and_its_acceleration_and_rests_at_zero(
    limits: JointLimits, period_s: float, requests: list[float | None], start: float
) -> None:
    limiter = MotionLimiter(limits, period_s, BASE)
    quantum = float(limits.acceleration[0]) * period_s
    lower = max(float(limits.position_lower[0]), -float(limits.velocity[0]))
    upper = min(float(limits.position_upper[0]), float(limits.velocity[0]))
    start = min(max(start, lower), upper)
    limiter.reset([start])
    last = start
    for request in [*requests, None]:
        sent = limiter.brake() if request is None else limiter.limit(np.array([request]))
        now = float(limiter.position[0])
        assert np.float32(sent[0]) == pytest.approx(now, rel=1e-6, abs=1e-6)
        assert lower <= now <= upper
        assert abs(now - last) <= quantum * (1 + 1e-9) + 1e-12
        if request is not None and abs(request - last) <= quantum and lower <= request <= upper:
            assert now == request
        if request is None:
            assert abs(now) <= max(0.0, abs(last) - quantum) + 1e-9
        last = now
    for _ in range(min(limiter.ticks_to_rest(), 10_000)):
        limiter.brake()
    if limiter.ticks_to_rest() == 0:
        assert limiter.at_rest
        assert limiter.command[0] == 0.0
        assert limiter.brake()[0] == 0.0


def test_a_velocity_that_was_told_to_nobody_is_braked_from_where_it_is() -> None:
    limiter = MotionLimiter(make_limits(velocity=0.5, acceleration=1.0), 0.1, BASE)
    limiter.reset([0.25])  # the last command of a process that died
    assert not limiter.at_rest
    assert limiter.ticks_to_rest() == 3
    np.testing.assert_allclose([limiter.brake()[0] for _ in range(4)], [0.15, 0.05, 0, 0])


@pytest.mark.parametrize("kind", [ActionKind.EFFORT, ActionKind.DELTA])
def test_a_command_that_has_no_known_rest_is_refused(kind: ActionKind) -> None:
    with pytest.raises(
        ValueError, match=rf"joint 0 \(elbow\): got a command of kind {kind} \(Nm\)"
    ):
        MotionLimiter(make_limits(), 0.02, (ActionSpec("elbow", kind, "Nm"),))


def test_a_velocity_whose_limits_leave_out_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x.vel.*between 0.1 and 0.5 m/s, expected.*zero between"):
        MotionLimiter(make_limits(0.1, 0.5), 0.02, BASE)


def test_a_joint_without_limits_passes_everything() -> None:
    limits = make_limits(-math.inf, math.inf, math.inf, math.inf)
    limiter = MotionLimiter(limits, 0.02)
    limiter.reset([0.0])
    for target in (5.0, -1e6, 0.0, 3e7):
        assert limiter.limit(np.array([target]))[0] == target
    limiter.brake()
    assert limiter.at_rest
    assert limiter.statistics().clamped_ticks == 0


def test_a_command_allocates_nothing_that_stays() -> None:
    limiter = MotionLimiter(make_limits(), 0.002)
    targets = np.sin(np.arange(2000))[:, None]
    for target in targets[:1000]:
        limiter.limit(target)
        limiter.brake()
    blocks = sys.getallocatedblocks()
    for target in targets[1000:]:
        limiter.limit(target)
        limiter.brake()
    assert sys.getallocatedblocks() - blocks <= 2  # the loop's own variables


@pytest.mark.parametrize(
    ("period_s", "start", "message"),
    [
        (0.0, [0.0], "period_s: got 0.0, expected a positive"),
        (math.nan, [0.0], "period_s: got nan"),
        (0.02, [0.0, 0.0], "expected 1 finite numbers"),
        (0.02, [math.nan], "position: got"),
    ],
)
def test_nonsense_is_refused(period_s: float, start: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MotionLimiter(make_limits(), period_s).reset(start)
