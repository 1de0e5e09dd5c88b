"""The drift of a pace is a slope over all ticks."""

from __future__ import annotations

import numpy as np
import pytest

from bench.pacing.block import drift_ticks

HZ, TICKS = 200, 160
PERIOD_NS = 10**9 // HZ


def on_time() -> np.ndarray:
    return 10**12 + np.arange(TICKS, dtype=np.int64) * PERIOD_NS


def test_a_late_last_tick_is_no_drift() -> None:
    began_ns = on_time()
    began_ns[-1] += PERIOD_NS
    assert abs(drift_ticks(began_ns, HZ)) < 0.05


def test_a_pace_that_is_slow_drifts() -> None:
    began_ns = on_time() + np.arange(TICKS) * PERIOD_NS // 100
    assert drift_ticks(began_ns, HZ) == pytest.approx(0.01 * TICKS, rel=1e-6)


def test_a_skipped_tick_is_no_drift() -> None:
    began_ns = on_time()
    began_ns[50] = 0
    assert drift_ticks(began_ns, HZ) == pytest.approx(0, abs=1e-9)
