"""``RequestLatency``: the p99 that decides when to send the next request."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.latency_stats import RequestLatency

MS = 1_000_000


def test_warm_up_replies_count_only_until_there_are_others() -> None:
    latency = RequestLatency(warmup=2)
    assert latency.ticks(0.02) == 1
    latency.add(900 * MS)
    assert latency.p99_s == 0.9
    latency.add(400 * MS)
    assert latency.p99_s == 0.9
    latency.add(30 * MS)
    assert latency.p99_s == 0.03
    assert latency.ticks(0.02) == 3  # two ticks, and the one at which it is read


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=300))
def test_at_most_one_reply_in_a_hundred_was_slower(samples: list[int]) -> None:
    latency = RequestLatency(warmup=0, window=200)
    for sample in samples:
        latency.add(sample)
    newest = np.array(samples[-200:])
    bound = round(latency.p99_s * 1e9)
    assert bound in newest
    assert (newest > bound).sum() <= 0.01 * newest.size


def test_only_the_newest_samples_count() -> None:
    latency = RequestLatency(warmup=0, window=100)
    latency.add(500 * MS)
    for _ in range(100):
        latency.add(10 * MS)
    assert latency.p99_s == 0.01
