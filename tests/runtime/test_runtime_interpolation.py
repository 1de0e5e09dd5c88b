"""Between two ticks: on a line or held, and rates that cannot be had."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.control.interpolation import Interpolator, control_ratio

values = st.floats(-10, 10)
fractions = st.floats(0, 1)


@given(start=values, end=values, fraction=fractions)
def test_a_joint_moves_on_a_line_and_a_gripper_steps(
    start: float, end: float, fraction: float
) -> None:
    interpolator = Interpolator(3, hold=(1,))
    interpolator.start[:], interpolator.end[:] = start, end
    line = pytest.approx((1 - fraction) * start + fraction * end, abs=1e-12)
    assert interpolator.at(fraction).tolist() == [line, start, line]
    np.testing.assert_array_equal(interpolator.at(0.0), start)


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
