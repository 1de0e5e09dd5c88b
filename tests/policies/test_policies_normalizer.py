"""Laws of the normalizers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from policies import normalizer
from policies.errors import CheckpointError

DIM = 4
VALUES = arrays(np.float64, (3, DIM), elements=st.floats(-5, 5))
SPANS = arrays(np.float64, DIM, elements=st.floats(0.05, 4))
CENTRES = arrays(np.float64, DIM, elements=st.floats(-3, 3))
MASKS = (
    st.none()
    | st.lists(st.integers(-DIM, DIM - 1), max_size=DIM)
    | st.lists(st.booleans(), min_size=DIM, max_size=DIM)
)


def kept(mask) -> np.ndarray:
    if not mask:
        return np.ones(DIM, bool)
    if isinstance(mask[0], bool):
        return np.array(mask)
    return np.array([i not in mask and i - DIM not in mask for i in range(DIM)])


def stats(centre, span):
    return {
        "mean": centre,
        "std": span,
        "min": centre - span,
        "max": centre + span,
        "q01": centre - span,
        "q99": centre + span,
    }


def test_identity_changes_nothing():
    x = np.float32([1.5, -2.0])
    np.testing.assert_array_equal(normalizer.identity(2).normalize(x), x)
    np.testing.assert_array_equal(normalizer.identity(2).denormalize(x), x)


@pytest.mark.parametrize("kind", ["zscore", "minmax"])
@given(x=VALUES, centre=CENTRES, span=SPANS, mask=MASKS)
def test_denormalize_undoes_normalize(kind, x, centre, span, mask):
    n = normalizer.from_stats(kind, stats(centre, span), mask=mask)
    assert n.normalize(x).dtype == np.float32
    np.testing.assert_allclose(n.denormalize(n.normalize(x)), x, atol=2e-5)


@given(x=VALUES, centre=CENTRES, span=SPANS, mask=MASKS)
def test_percentile_clips_both_ways(x, centre, span, mask):
    n = normalizer.from_stats("percentile", stats(centre, span), mask=mask)
    on = kept(mask)
    there = n.normalize(x)[:, on]
    assert np.abs(there).max(initial=0) <= 1 + 1e-6
    back = n.denormalize(x)[:, on]
    low, high = (centre - span)[on], (centre + span)[on]
    assert (back >= low.astype(np.float32)).all()
    assert (back <= high.astype(np.float32)).all()
    np.testing.assert_allclose(
        n.denormalize(n.normalize(x))[:, on], np.clip(x[:, on], low, high), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["zscore", "minmax", "percentile"])
@given(x=VALUES, centre=CENTRES, span=SPANS, mask=MASKS)
def test_masked_dimensions_are_left_alone(kind, x, centre, span, mask):
    n = normalizer.from_stats(kind, stats(centre, span), mask=mask)
    off = ~kept(mask)
    np.testing.assert_array_equal(n.normalize(x)[:, off], x[:, off].astype(np.float32))
    np.testing.assert_array_equal(n.denormalize(x)[:, off], x[:, off].astype(np.float32))


def test_known_values():
    assert normalizer.zscore([1.0], [2.0]).normalize(np.array([5.0]))[0] == 2
    assert normalizer.minmax([0.0], [10.0]).normalize(np.array([10.0]))[0] == 1
    assert normalizer.minmax([0.0], [10.0]).normalize(np.array([20.0]))[0] == 3
    assert normalizer.percentile([0.0], [10.0]).normalize(np.array([20.0]))[0] == 1
    assert normalizer.percentile([0.0], [10.0]).denormalize(np.array([-3.0]))[0] == 0


def test_sigma_is_at_least_a_hundredth():
    n = normalizer.from_stats("zscore", {"mean": [0.0, 0.0], "std": [0.0, 1.0]})
    np.testing.assert_array_equal(n.scale, [0.01, 1.0])


def test_a_masked_dimension_may_have_no_range():
    table = {"min": [0.0, 1.0], "max": [1.0, 1.0]}
    n = normalizer.from_stats("minmax", table, mask=[-1])
    np.testing.assert_array_equal(n.normalize(np.array([1.0, 7.0])), [1.0, 7.0])
    with pytest.raises(CheckpointError, match=r"dimensions \[1\].*needs a mask"):
        normalizer.from_stats("minmax", table)


@pytest.mark.parametrize("kind", ["zscore", "minmax", "percentile"])
def test_an_action_that_never_moved_is_a_constant(kind):
    """As in the layouts' own libraries: what the network says, times zero, and the mean."""
    table = stats(np.array([1.0, -2.0]), np.array([0.0, 2.0]))
    n = normalizer.from_stats(kind, table, min_sigma=0.0, output=True)
    y = np.array([[0.0, 0.5], [7.0, -0.5], [-1e6, 0.0]])
    np.testing.assert_array_equal(n.denormalize(y), [[1, -1], [1, -3], [1, -2]])
    with pytest.raises(CheckpointError, match=r"dimensions \[0\]"):
        normalizer.from_stats(kind, table, min_sigma=0.0)


@pytest.mark.parametrize("kind", ["zscore", "minmax", "percentile"])
def test_a_masked_dimension_may_have_any_statistics(kind):
    table = stats(np.array([1.0, np.nan]), np.array([1.0, np.inf]))
    n = normalizer.from_stats(kind, table, mask=[1])
    np.testing.assert_array_equal(n.normalize(np.array([1.0, 7.0])), [0.0, 7.0])
    with pytest.raises(CheckpointError, match="expected finite numbers"):
        normalizer.from_stats(kind, table, mask=[0])


@pytest.mark.parametrize(
    ("kind", "table", "mask", "message"),
    [
        ("fancy", {}, None, r"f: got normalizer 'fancy', expected one of"),
        ("zscore", {"mean": [0.0]}, None, r"f: statistic 'std' is missing, got \['mean'\]"),
        ("zscore", {"mean": [0.0], "std": [np.nan]}, None, "f: std: .*finite"),
        ("zscore", {"mean": [0.0], "std": ["a"]}, None, "f: std: expected numbers"),
        ("zscore", {"mean": [[0.0]], "std": [1.0]}, None, r"f: mean: .*expected \(D,\)"),
        ("zscore", {"mean": [0.0], "std": [1.0, 1.0]}, None, "differ in length"),
        ("zscore", {"mean": [0.0], "std": [1.0]}, [3], "mask: got 3, expected an index from -1"),
        ("minmax", {"min": [0.0], "max": [1.0]}, [True, False], "mask: got 2 bools, expected 1"),
    ],
)
def test_bad_statistics_are_refused(kind, table, mask, message):
    with pytest.raises(CheckpointError, match=message):
        normalizer.from_stats(kind, table, mask=mask, source="f")


def test_the_hash_tells_statistics_apart():
    a, b = normalizer.zscore([0.0], [1.0]), normalizer.zscore([0.0], [1.5])
    assert normalizer.normalizer_hash(a, b) == normalizer.normalizer_hash(a, b)
    assert normalizer.normalizer_hash(a, b) != normalizer.normalizer_hash(b, a)
