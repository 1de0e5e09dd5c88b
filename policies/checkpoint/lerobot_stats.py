"""Converts LeRobot's normalization modes and statistics to affine maps.

LeRobot has had two rules for a dimension whose statistics have no spread: one for processor files
(0.4 to 0.6.1), one for the buffers among the weights (up to 0.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from policies.act.weights import RgbTriples
from policies.checkpoint.lerobot_config import ACTION, STATISTICS
from policies.errors import CheckpointError
from policies.normalizer import Array, Normalizer, constant_where, identity

EPS = 1e-8
"""LeRobot's default of ``eps``."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """One normalizer's statistics and how to use them.

    Attributes:
        tensors: By feature and name of the statistic; unused ones may hold anything.
        source: The file of the tensors.
        modes: Type of feature to mode; IDENTITY where none is given.
        modes_source: The file of the modes.
        types: Feature to type. LeRobot does not normalize a feature that is not listed.
        observations: The observations to normalize; all where None.
        eps: Added to deviations of inputs, and used in place of a spread of zero.
        buffers: Prefix of the buffers among the weights, whose rule then applies; "" for the rule
            of processor files.
    """

    tensors: Mapping[str, Tensor]
    source: Path
    modes: Mapping[str, str]
    modes_source: Path
    types: Mapping[str, str]
    observations: frozenset[str] | None = None
    eps: float = EPS
    buffers: str = ""

    def normalizer(self, feature: str, dim: int) -> Normalizer:
        """Return the map of a vector: for the action to physical units, for others to the
        network's.

        Raises:
            CheckpointError: A statistic is missing, of another shape, or not finite.
        """
        mode = self._mode(feature)
        if mode == "IDENTITY":
            return identity(dim)
        first, second = (self._statistic(feature, name, mode, dim, 0) for name in STATISTICS[mode])
        output = feature == ACTION
        shift, scale = self._affine(mode, first, second, inverse=output)
        try:
            return constant_where((scale == 0) & output, mode.lower(), shift, scale)
        except CheckpointError as error:
            raise CheckpointError(f"{self.source}: {feature}: {error}") from error

    def image_norm(self, features: tuple[str, ...]) -> tuple[RgbTriples, RgbTriples]:
        """Return the (mean, std) that normalize each feature's image of values in [0, 1].

        Raises:
            CheckpointError: As ``normalizer``.
        """
        means, stds = [], []
        for feature in features:
            mode, mean, std = self._mode(feature), np.zeros(3), np.ones(3)
            if mode != "IDENTITY":
                first, second = (self._statistic(feature, n, mode, 3, 2) for n in STATISTICS[mode])
                mean, std = self._affine(mode, first, second, inverse=False)
            if not (std > 0).all():
                raise CheckpointError(
                    f"{self.source}: {feature}: got a scale of {std.tolist()}, expected positive"
                )
            means.append((float(mean[0]), float(mean[1]), float(mean[2])))
            stds.append((float(std[0]), float(std[1]), float(std[2])))
        return tuple(means), tuple(stds)

    def _mode(self, feature: str) -> str:
        if feature == ACTION:
            return self.modes.get("ACTION", "IDENTITY")
        if feature not in self.types:
            raise CheckpointError(
                f"{self.modes_source}: features: {feature!r} is missing, got {sorted(self.types)}: "
                f"LeRobot would not normalize it; {self._advice()}"
            )
        if self.observations is not None and feature not in self.observations:
            return "IDENTITY"
        return self.modes.get(self.types[feature], "IDENTITY")

    def _affine(
        self, mode: str, first: Array, second: Array, *, inverse: bool
    ) -> tuple[Array, Array]:
        """Return (shift, scale): (x - shift) / scale to the network, y * scale + shift back."""
        if mode == "MEAN_STD":
            return first, second if inverse else second + self.eps
        span = second - first
        if not self.buffers:
            span = np.where(span == 0, self.eps, span)
        elif not inverse:
            span = span + self.eps
        return first + span / 2, span / 2

    def _statistic(
        self, feature: str, name: str, mode: str, length: int, trailing: int
    ) -> NDArray[np.float64]:
        """Return ``length`` numbers.

        In the file their shape must broadcast to (``length``, 1, ...) with ``trailing`` ones.
        """
        key = f"{feature}.{name}"
        if self.buffers:
            key = f"{self.buffers}.buffer_{feature.replace('.', '_')}.{name}"
        if key not in self.tensors:
            group = "ACTION" if feature == ACTION else self.types[feature]
            raise CheckpointError(
                f"{self.source}: key {key!r} is missing, which {group} {mode} "
                f"({self.modes_source}) needs; {self._advice()}"
            )
        values = self.tensors[key].double().numpy()
        shape = list(values.shape)
        for _ in range(trailing):
            if len(shape) > 1 and shape[-1] == 1:
                shape.pop()
        while len(shape) > 1 and shape[0] == 1:
            shape.pop(0)
        if len(shape) > 1 or values.size not in (1, length):
            expected = (length, *(1,) * trailing)
            raise CheckpointError(
                f"{self.source}: {key}: got shape {values.shape}, expected {expected}"
            )
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.source}: {key}: got {values.tolist()}, expected finite numbers"
            )
        return np.broadcast_to(values.reshape(-1), (length,)).copy()

    def _advice(self) -> str:
        if self.buffers:
            return "it has no substitute"
        return (
            "if that is intended, list the features that are normalized in "
            "normalize_observation_keys, or set their type to IDENTITY in norm_map"
        )
