"""When to spin before sleeping."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from transport.shm.adaptive_spin import MAX_SPIN_US, AdaptiveSpin


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Of a machine of two cores; every poll at it takes 50 µs."""
    now = [0]

    def tick() -> int:
        now[0] += 50_000
        return now[0]

    monkeypatch.setattr("time.perf_counter_ns", tick)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    yield now


def never(_rounds: int) -> bool:
    return False


def always(_rounds: int) -> bool:
    return True


def test_unsuccessful_spin_turns_spinning_off_until_waits_are_short_again(clock: list[int]) -> None:
    spin = AdaptiveSpin()
    assert spin.will_spin and spin.spin(always)
    assert not spin.spin(never)
    spin.record_wait(10**9)
    assert not spin.will_spin and not spin.spin(always)
    for _ in range(8):
        assert not spin.will_spin
        spin.record_wait(1000)
    assert spin.will_spin


def test_announced_message_is_spun_for_although_spinning_is_off(clock: list[int]) -> None:
    spin = AdaptiveSpin(0)
    assert not spin.spin(always)
    looks = iter([False] * 5 + [True])
    assert spin.spin_after_signal(lambda rounds: next(looks))
    before = clock[0]
    assert not spin.spin_after_signal(never)
    assert clock[0] - before < 1_200_000, "bounded"


def test_announcement_without_message_makes_the_next_ones_ignored(clock: list[int]) -> None:
    spin = AdaptiveSpin()
    assert not spin.spin_after_signal(never)
    assert [spin.spin_after_signal(always) for _ in range(9)] == [False] * 8 + [True]


def test_no_spin_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    spin = AdaptiveSpin()
    assert not spin.will_spin and not spin.spin(always)
    assert not spin.spin_after_signal(never)


@pytest.mark.parametrize("spin_us", [-1, MAX_SPIN_US + 1])
def test_limit_out_of_range_is_an_error(spin_us: float) -> None:
    with pytest.raises(ValueError, match=f"got {spin_us}, expected 0 to {MAX_SPIN_US}"):
        AdaptiveSpin(spin_us)
