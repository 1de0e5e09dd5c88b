"""What the files of a run keep: every published figure, in few bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench.record_files import as_text
from bench.sample_files import (
    COARSE,
    FINE,
    PUBLISHED,
    TICKS_PER_US,
    kept_ranks,
    read_samples,
    write_samples,
)

COUNTS = (1, 2, 3, 16, 200, 1001, 1500, 22_048)


def series(count: int) -> np.ndarray:
    """Long-tailed, in whole ticks, some below zero."""
    drawn = np.random.default_rng(count).lognormal(2.0, 2.0, count) - 5.0
    return (np.round(drawn * TICKS_PER_US) / TICKS_PER_US).astype(np.float32)


@pytest.mark.parametrize("growth", [COARSE, FINE])
def test_published_percentiles_are_those_of_all_samples(growth: float, tmp_path) -> None:
    given = {f"group/{count}": series(count) for count in COUNTS}
    write_samples(tmp_path / "run.npz", given, growth=growth)
    kept = read_samples(tmp_path / "run.npz")
    assert list(kept) == list(given)
    for name, samples in given.items():
        assert kept[name].size == samples.size
        figures = np.percentile(kept[name], (0.0, *PUBLISHED))
        np.testing.assert_array_equal(figures, np.percentile(samples, (0.0, *PUBLISHED)))
    write_samples(tmp_path / "again.npz", kept, growth=growth)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "run.npz").read_bytes()


@pytest.mark.parametrize("growth", [COARSE, FINE])
@pytest.mark.parametrize("count", COUNTS)
def test_what_is_kept_is_as_near_as_is_said(count: int, growth: float) -> None:
    distance = (count - 1 - kept_ranks(count, growth))[::-1]
    assert (distance[0], distance[-1]) == (0, count - 1)
    nearer, further = distance[:-1], distance[1:]
    assert ((further <= nearer * growth) | (further == nearer + 1)).all()


def test_no_samples_and_empty_ones_are_written(tmp_path) -> None:
    for given in ({}, {"a": np.empty(0)}, {"a": np.empty(0), "b": np.array([1.5])}):
        write_samples(tmp_path / "run.npz", given)
        assert {k: v.tolist() for k, v in read_samples(tmp_path / "run.npz").items()} == {
            name: each.tolist() for name, each in given.items()
        }


def test_a_record_has_a_line_for_each_entry() -> None:
    record = {"unit": "µs", "none": {}, "figures": {"a": {"p50": 1.5}, "b": {}}, "rows": [{"n": 1}]}
    text = as_text(record)
    assert json.loads(text) == record
    assert text == (
        '{\n"unit":"µs",\n"none":{},\n"figures":{\n "a":{"p50":1.5},\n "b":{}\n},\n'
        '"rows":[\n {"n":1}\n]\n}\n'
    )
