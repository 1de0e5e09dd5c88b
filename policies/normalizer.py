"""Converts physical units to the network's units and back.

Every supported kind is an affine map per dimension with an optional clip, so one class suffices:
``normalize(x) = (x - shift) / scale`` and ``denormalize(y) = y * scale + shift``. It computes in
float64 and returns float32. Needs numpy only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.errors import CheckpointError

Array = NDArray[np.float64]

KINDS = ("zscore", "minmax", "percentile", "identity")
"""Valid kinds of a normalizer."""
MIN_SIGMA = 0.01
"""Smallest standard deviation of a z-score, so that the noise of a joint that never moved is not
amplified.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Normalizer:
    """An affine map per dimension.

    Attributes:
        kind: Kind of normalizer, for messages.
        shift, scale: (D,) float64; ``scale`` is positive.
        lower, upper: (D,) float64, physical units. Both directions clip to them; infinite where the
            kind does not clip.

    Raises:
        CheckpointError: An array of another shape, or a shift or scale that is not valid.
    """

    kind: str
    shift: Array
    scale: Array
    lower: Array
    upper: Array

    def __post_init__(self) -> None:
        for name in ("shift", "scale", "lower", "upper"):
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.shape != np.shape(self.shift) or array.ndim != 1:
                raise CheckpointError(f"normalizer {name}: got shape {array.shape}, expected (D,)")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if not np.isfinite(self.shift).all():
            raise CheckpointError(f"normalizer shift: got {self.shift}, expected finite numbers")
        bad = np.flatnonzero(~(np.isfinite(self.scale) & (self.scale > 0)))
        if bad.size:
            raise CheckpointError(
                f"{self.kind} normalizer: scale is {self.scale[bad]} in dimensions {bad.tolist()}, "
                "expected a positive number (a state that never moved needs a mask, where the "
                "layout has one)"
            )

    @property
    def dim(self) -> int:
        """Number of dimensions D."""
        return len(self.shift)

    def normalize(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """Map (..., D) in physical units to float32 in the network's units."""
        clipped = np.clip(x, self.lower, self.upper, dtype=np.float64)
        normalized: NDArray[np.float32] = ((clipped - self.shift) / self.scale).astype(np.float32)
        return normalized

    def denormalize(self, y: NDArray[Any]) -> NDArray[np.float32]:
        """Map (..., D) in the network's units to float32 in physical units."""
        x = np.asarray(y, dtype=np.float64) * self.scale + self.shift
        return np.clip(x, self.lower, self.upper).astype(np.float32)

    def digest(self) -> bytes:
        """Return 32 bytes that differ for different maps."""
        state = hashlib.sha256()
        for array in (self.shift, self.scale, self.lower, self.upper):
            state.update(array.tobytes())
        return state.digest()


def identity(dim: int) -> Normalizer:
    """Return the map that changes nothing."""
    return _affine("identity", np.zeros(dim), np.ones(dim))


def constant_where(
    constant: NDArray[np.bool_], kind: str, shift: Array, scale: Array
) -> Normalizer:
    """Return the map of ``shift`` and ``scale``; where ``constant``, every output is ``shift``.

    It is for a dimension of an action that never moved: its scale is zero, which has no inverse.
    """
    inf = np.full(len(shift), np.inf)
    return Normalizer(
        kind,
        shift,
        np.where(constant, 1.0, scale),
        np.where(constant, shift, -inf),
        np.where(constant, shift, inf),
    )


def zscore(
    mean: Sequence[float] | Array,
    std: Sequence[float] | Array,
    *,
    min_sigma: float = MIN_SIGMA,
    mask: Sequence[int] | Sequence[bool] | None = None,
    output: bool = False,
) -> Normalizer:
    """Normalize to zero mean and unit deviation; ``std`` below ``min_sigma`` becomes ``min_sigma``.

    ``output`` as for ``from_stats``.
    """
    shift = np.asarray(mean, dtype=np.float64)
    sigma = np.maximum(np.asarray(std, dtype=np.float64), min_sigma)
    constant = (sigma == 0) & output
    return _masked(constant_where(constant, "zscore", shift, sigma), mask)


def minmax(
    low: Sequence[float] | Array,
    high: Sequence[float] | Array,
    *,
    mask: Sequence[int] | Sequence[bool] | None = None,
    output: bool = False,
) -> Normalizer:
    """Map ``low`` to -1 and ``high`` to 1, without clipping; ``output`` as for ``from_stats``."""
    return _from_range("minmax", low, high, clip=False, mask=mask, output=output)


def percentile(
    low: Sequence[float] | Array,
    high: Sequence[float] | Array,
    *,
    mask: Sequence[int] | Sequence[bool] | None = None,
    output: bool = False,
) -> Normalizer:
    """Map the 1st and 99th percentile to -1 and 1; both directions clip to them."""
    return _from_range("percentile", low, high, clip=True, mask=mask, output=output)


def from_stats(
    kind: str,
    stats: Mapping[str, Any],
    *,
    mask: Sequence[int] | Sequence[bool] | None = None,
    min_sigma: float = MIN_SIGMA,
    source: str = "stats",
    output: bool = False,
) -> Normalizer:
    """Return a normalizer of ``kind`` from a table with ``mean, std, min, max, q01, q99``.

    Args:
        kind: One of ``KINDS`` except "identity", which needs no statistics.
        mask: Indices of dimensions that are left unchanged (negative ones count from the end), or
            one bool for each dimension, True where it is normalized.
        min_sigma: As for ``zscore``.
        source: Names the file in errors.
        output: True if only ``denormalize`` will be used. A dimension without spread then becomes a
            constant. For an input such a dimension has no normalized value and is refused.

    Raises:
        CheckpointError: An unknown kind, a missing or malformed statistic, a bad mask.
    """
    names = {"zscore": ("mean", "std"), "minmax": ("min", "max"), "percentile": ("q01", "q99")}
    if kind not in names:
        raise CheckpointError(f"{source}: got normalizer {kind!r}, expected one of {KINDS}")
    first, second = (_vector(stats, name, source) for name in names[kind])
    if first.shape != second.shape:
        raise CheckpointError(f"{source}: {names[kind]} differ in length")
    try:
        kept = _kept(mask, len(first))
        for name, vector in zip(names[kind], (first, second), strict=True):
            if not np.isfinite(vector[kept]).all():
                raise CheckpointError(f"{name}: got {vector.tolist()}, expected finite numbers")
        # Dimensions that are left unchanged may have any statistics.
        first, second = (np.where(kept, vector, 1.0) for vector in (first, second))
        if kind == "zscore":
            return zscore(first, second, min_sigma=min_sigma, mask=mask, output=output)
        return (minmax if kind == "minmax" else percentile)(first, second, mask=mask, output=output)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def normalizer_hash(state: Normalizer, action: Normalizer) -> str:
    """Return a hash of a pair of normalizers, to tell servers apart that use different ones."""
    return hashlib.sha256(state.digest() + action.digest()).hexdigest()[:16]


def _vector(stats: Mapping[str, Any], name: str, source: str) -> Array:
    if name not in stats:
        raise CheckpointError(
            f"{source}: statistic {name!r} is missing, got {sorted(map(str, stats))}"
        )
    try:
        vector = np.asarray(stats[name], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {name}: expected numbers ({error})") from error
    if vector.ndim != 1 or not vector.size:
        raise CheckpointError(f"{source}: {name}: got shape {vector.shape}, expected (D,)")
    return vector


def _affine(kind: str, shift: Array, scale: Array) -> Normalizer:
    unbounded = np.full(np.shape(shift), np.inf)
    return Normalizer(kind, shift, scale, -unbounded, unbounded)


def _from_range(
    kind: str,
    low: Sequence[float] | Array,
    high: Sequence[float] | Array,
    *,
    clip: bool,
    mask: Sequence[int] | Sequence[bool] | None,
    output: bool,
) -> Normalizer:
    lower, upper = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    kept = _kept(mask, len(lower))
    constant = kept & output & (lower == upper)
    clipped = (kept & clip) | constant
    # Masked dimensions may never have moved, so their range is not used.
    scale = np.where(kept & ~constant, (upper - lower) / 2, 1.0)
    shift = np.where(kept, (upper + lower) / 2, 0.0)
    inf = np.full(len(lower), np.inf)
    return Normalizer(
        kind, shift, scale, np.where(clipped, lower, -inf), np.where(clipped, upper, inf)
    )


def _masked(full: Normalizer, mask: Sequence[int] | Sequence[bool] | None) -> Normalizer:
    kept = _kept(mask, full.dim)
    return Normalizer(
        full.kind,
        np.where(kept, full.shift, 0.0),
        np.where(kept, full.scale, 1.0),
        np.where(kept, full.lower, -np.inf),
        np.where(kept, full.upper, np.inf),
    )


def _kept(mask: Sequence[int] | Sequence[bool] | None, dim: int) -> NDArray[np.bool_]:
    """Return (D,) bool, True where a dimension is normalized."""
    kept = np.ones(dim, dtype=np.bool_)
    if mask is None or len(mask) == 0:
        return kept
    if all(isinstance(item, bool) for item in mask):
        if len(mask) != dim:
            raise CheckpointError(f"mask: got {len(mask)} bools, expected {dim}")
        return np.asarray(mask, dtype=np.bool_)
    for index in mask:
        if isinstance(index, bool) or not isinstance(index, int) or not -dim <= index < dim:
            raise CheckpointError(
                f"mask: got {index!r}, expected an index from {-dim} to {dim - 1}, or {dim} bools"
            )
        kept[index] = False
    return kept
