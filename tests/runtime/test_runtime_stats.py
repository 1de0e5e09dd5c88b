"""When to ask for the next chunk, and what is said where chunks are too short."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.stats import RequestLatency, reach_warning

MS = 1_000_000


def test_warm_up_does_not_count_once_there_is_anything_else() -> None:
    latency = RequestLatency(warmup=2)
    assert latency.ticks(0.02) == 1
    latency.add(900 * MS)
    assert latency.p99_s == 0.9
    latency.add(400 * MS)
    assert latency.p99_s == 0.9
    latency.add(30 * MS)
    assert latency.p99_s == 0.03
    assert latency.ticks(0.02) == 3  # two ticks, and the one at which it is seen


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=300))
def test_no_more_than_one_answer_in_a_hundred_was_slower(samples: list[int]) -> None:
    latency = RequestLatency(warmup=0, window=200)
    for sample in samples:
        latency.add(sample)
    newest = np.array(samples[-200:])
    bound = round(latency.p99_s * 1e9)
    assert bound in newest
    assert (newest > bound).sum() <= 0.01 * newest.size


def test_only_the_newest_count() -> None:
    latency = RequestLatency(warmup=0, window=100)
    latency.add(500 * MS)
    for _ in range(100):
        latency.add(10 * MS)
    assert latency.p99_s == 0.01


@pytest.mark.parametrize(
    ("stride", "latency_s", "lead", "says"),
    [
        (50, 0.1, 0, None),
        (95, 0.1, 0, None),
        (96, 0.1, 0, "shorter than 96 played + 5 of latency (100 ms): the next one is asked"),
        (90, 0.1, 6, "90 played + 5 of latency (100 ms) + 6 for a stop: the next one is asked for"),
        (100, 0.1, 0, "about 95 ticks of each are played"),
        (100, 2.0, 0, "too short: 100 played + 100 of latency (2000 ms); every chunk will starve"),
    ],
)
def test_chunks_too_short_are_named_before_anything_moves(
    stride: int, latency_s: float, lead: int, says: str | None
) -> None:
    warning = reach_warning(
        chunk_size=100, stride=stride, latency_s=latency_s, dt_s=0.02, lead_ticks=lead
    )
    assert warning is None if says is None else says in str(warning)
