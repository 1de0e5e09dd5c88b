"""Statistics of a dataset's columns: of one episode, and of several put together.

``Statistics`` is ``min``, ``max``, ``mean``, ``std``, ``count`` and five quantiles. A quantile of
one episode is the least value that so many rows do not exceed. Put together they are means weighted
by the counts, as LeRobot does it, and only near the true ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
Statistics = dict[str, NDArray[np.float64]]
NAMES = ("min", "max", "mean", "std", "count", *QUANTILES)
PIXEL_STRIDE = 4
"""Every fourth row and column of a picture counts."""


def column_statistics(column: NDArray[np.generic]) -> Statistics:
    """Return the statistics of a column (n, D) or (n,), each (D,) or (1,) float64."""
    wide = np.asarray(column, np.float64).reshape(len(column), -1)
    return {
        "min": wide.min(0),
        "max": wide.max(0),
        "mean": wide.mean(0),
        "std": wide.std(0),
        "count": np.array([len(wide)], np.float64),
        **{
            name: np.quantile(wide, at, axis=0, method="inverted_cdf")
            for name, at in QUANTILES.items()
        },
    }


class PictureStatistics:
    """Statistics of pictures, collected one by one; pixels count from 0 to 1."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), np.int64)
        self._pictures = 0

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Count the pixels of ``picture``, (H, W, 3)."""
        sampled = picture[::PIXEL_STRIDE, ::PIXEL_STRIDE]
        for channel in range(3):
            self._counts[channel] += np.bincount(sampled[..., channel].ravel(), minlength=256)
        self._pictures += 1

    def result(self) -> Statistics:
        """Return the statistics, each (3, 1, 1) float64, and ``count`` (1,), of pictures."""
        levels = np.arange(256) / 255
        share = self._counts / self._counts.sum(1, keepdims=True)
        mean = share @ levels
        reached = np.cumsum(share, axis=1)
        seen = self._counts > 0
        values = {
            "min": levels[seen.argmax(1)],
            "max": levels[255 - seen[:, ::-1].argmax(1)],
            "mean": mean,
            "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0)),
            **{name: levels[(reached >= at).argmax(1)] for name, at in QUANTILES.items()},
        }
        shaped = {name: value.reshape(3, 1, 1) for name, value in values.items()}
        return {**shaped, "count": np.array([self._pictures], np.float64)}


def combine(parts: Iterable[Statistics]) -> Statistics:
    """Return the statistics of several sets of rows together, from those of each."""
    some = [part for part in parts if part["count"][0]]
    counts = np.array([part["count"][0] for part in some])
    weights = counts / counts.sum()

    def mean(values: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.tensordot(weights, np.stack(list(values)), axes=1)

    centre = mean(part["mean"] for part in some)
    variance = mean(part["std"] ** 2 + (part["mean"] - centre) ** 2 for part in some)
    return {
        "min": np.min([part["min"] for part in some], axis=0),
        "max": np.max([part["max"] for part in some], axis=0),
        "mean": centre,
        "std": np.sqrt(variance),
        "count": np.array([counts.sum()]),
        **{name: mean(part[name] for part in some) for name in QUANTILES},
    }


def combine_all(parts: Iterable[Mapping[str, Statistics]]) -> dict[str, Statistics]:
    """As ``combine``, for every column."""
    some = list(parts)
    return {key: combine(part[key] for part in some) for key in (some[0] if some else ())}
