"""Between two ticks: laws of each curve, and rates that cannot be had."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.control.interpolation import Interpolation, Interpolator, control_ratio

fractions = st.floats(0, 1)
points = st.lists(st.floats(-10, 10), min_size=4, max_size=4)


def make(values: list[float] | np.ndarray, how: Interpolation) -> Interpolator:
    array = np.asarray(values, np.float64).reshape(4, -1)
    interpolator = Interpolator(array.shape[1], how)
    interpolator.points[:] = array
    return interpolator


@given(values=points, fraction=fractions)
def test_a_line_is_the_weighted_mean(values: list[float], fraction: float) -> None:
    got = make(values, Interpolation()).at(fraction)[0]
    assert got == pytest.approx((1 - fraction) * values[1] + fraction * values[2], abs=1e-12)


@given(values=points, fraction=fractions)
def test_pchip_stays_between_its_ticks_and_meets_them(values: list[float], fraction: float) -> None:
    interpolator = make(values, Interpolation("pchip"))
    low, high = sorted(values[1:3])
    assert low - 1e-9 <= interpolator.at(fraction)[0] <= high + 1e-9
    assert interpolator.at(0.0)[0] == values[1]
    assert interpolator.at(1.0)[0] == pytest.approx(values[2], abs=1e-9)


@given(values=st.lists(st.floats(-10, 10), min_size=5, max_size=5))
def test_pchip_has_one_slope_on_both_sides_of_a_tick(values: list[float]) -> None:
    left = make(values[:4], Interpolation("pchip"))
    right = make(values[1:], Interpolation("pchip"))
    step = 1e-6
    before = (left.at(1.0)[0] - left.at(1.0 - step)[0]) / step
    after = (right.at(step)[0] - right.at(0.0)[0]) / step
    assert before == pytest.approx(after, abs=2e-3)


@given(slope=st.floats(-3, 3), start=st.floats(-3, 3), fraction=fractions)
def test_pchip_follows_a_line(slope: float, start: float, fraction: float) -> None:
    got = make(start + slope * np.arange(4.0), Interpolation("pchip")).at(fraction)[0]
    assert got == pytest.approx(start + slope * (1 + fraction), abs=1e-9)


@given(values=points, fraction=st.floats(0, 1, exclude_max=True))
def test_a_gripper_steps(values: list[float], fraction: float) -> None:
    assert make(values, Interpolation(hold=(0,))).at(fraction)[0] == values[1]


def about(axis: list[float], angle: float) -> np.ndarray:
    unit = np.array(axis) / np.linalg.norm(axis)
    return np.array([math.cos(angle / 2), *(math.sin(angle / 2) * unit)])


axes = st.lists(st.floats(0.1, 1), min_size=3, max_size=3)


@given(
    axis=axes,
    start=st.floats(-3, 3),
    turn=st.floats(-3.1, 3.1),
    fraction=fractions,
    flip=st.booleans(),
    scale=st.floats(0.5, 2),
)
def test_a_rotation_turns_evenly_about_one_axis_the_shorter_way(  # noqa: PLR0917
    axis: list[float], start: float, turn: float, fraction: float, flip: bool, scale: float
) -> None:
    group = (1, 2, 3, 4)
    interpolator = Interpolator(6, Interpolation(quaternions=(group,)))
    interpolator.points[1, 1:5] = about(axis, start)
    interpolator.points[2, 1:5] = about(axis, start + turn) * (-scale if flip else scale)
    interpolator.points[1, [0, 5]], interpolator.points[2, [0, 5]] = 1.0, 2.0
    got = interpolator.at(fraction)
    expected = about(axis, start + fraction * turn)
    if fraction > 0:
        assert abs(got[1:5] @ expected) == pytest.approx(1, abs=1e-9)
        assert np.linalg.norm(got[1:5]) == pytest.approx(1)
    np.testing.assert_allclose(got[[0, 5]], 1 + fraction)


def test_no_rotation_at_all_is_held() -> None:
    interpolator = Interpolator(4, Interpolation(quaternions=((0, 1, 2, 3),)))
    interpolator.points[2] = [1, 0, 0, 0]
    np.testing.assert_array_equal(interpolator.at(0.5), np.zeros(4))


@pytest.mark.parametrize(("policy", "control", "ratio"), [(50, 50, 1), (50, 200, 4), (30, 90, 3)])
def test_a_whole_multiple_is_a_ratio(policy: float, control: float, ratio: int) -> None:
    assert control_ratio(policy, control) == ratio
    assert control_ratio(1 / (1 / policy), control) == ratio


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (130, "got 130 Hz, expected a whole multiple of the policy's 50 Hz: 100 or 150"),
        (25, "got 25 Hz, expected a whole multiple of the policy's 50 Hz: 50 or 100"),
        (100.01, "got 100.01 Hz, expected a whole multiple"),
        (0, "got 0 Hz, expected a positive number"),
        (math.inf, "got inf Hz, expected a positive number"),
    ],
)
def test_any_other_rate_is_refused(control: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"publish rate: {message}"):
        control_ratio(50, control)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Interpolation("cubic"), "got 'cubic', expected one of"),  # type: ignore[arg-type]
        (Interpolation(hold=(7,)), "got dimension 7, expected 0 to 6"),
        (Interpolation(hold=(2,), quaternions=((0, 1, 2, 3),)), "every dimension at most once"),
        (Interpolation(quaternions=((0, 1, 2, 4),)), "expected four neighbours"),
    ],
)
def test_nonsense_is_refused(how: Interpolation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Interpolator(7, how)
