"""Limits of a robot's commands, per actuator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robots.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class JointLimits:
    """Bounds per actuator, each (A,) float64 and read-only.

    Units are those of each command (``ActionSpec.unit``), per second and per second squared;
    ``inf`` is no limit. Velocity and acceleration are those of the *commands*. If an actuator is
    commanded by velocity, ``position_lower``, ``position_upper`` and ``velocity`` bound that
    velocity, and ``acceleration`` its change per second.
    """

    position_lower: NDArray[np.float64]
    position_upper: NDArray[np.float64]
    velocity: NDArray[np.float64]
    acceleration: NDArray[np.float64]

    @classmethod
    def from_config(
        cls,
        joint_names: Sequence[str],
        *,
        position_lower: Sequence[float],
        position_upper: Sequence[float],
        velocity: Sequence[float],
        acceleration: Sequence[float],
        source: str,
    ) -> JointLimits:
        """Check the numbers of a configuration, A of each.

        Args:
            joint_names: A names, for errors.
            source: Where the numbers come from, for errors.

        Raises:
            ConfigError: Not A numbers, lower not below upper, a velocity or acceleration that is
                not positive, NaN, or an acceleration limit without a velocity limit (the time to
                come to rest would have no bound). Names the joint.
        """
        given = {
            "position_lower": position_lower,
            "position_upper": position_upper,
            "velocity": velocity,
            "acceleration": acceleration,
        }
        for name, values in given.items():
            if len(values) != len(joint_names):
                raise ConfigError(
                    f"{source}: {name}: got {len(values)} numbers, expected {len(joint_names)}, "
                    f"one for each of {list(joint_names)}"
                )
        limits = cls(*(_frozen(values) for values in given.values()))
        for index, joint in enumerate(joint_names):
            lower, upper, velocity_, acceleration_ = (
                float(getattr(limits, field.name)[index]) for field in fields(cls)
            )
            if not lower < upper:
                raise ConfigError(
                    f"{source}: joint {index} ({joint}): got position limits {lower} to {upper}, "
                    "expected the lower one to be below the upper one"
                )
            for name, value in (("velocity", velocity_), ("acceleration", acceleration_)):
                if not value > 0:
                    raise ConfigError(
                        f"{source}: joint {index} ({joint}): got {name} limit {value}, expected "
                        "more than 0 (.inf for no limit)"
                    )
            if math.isinf(velocity_) and not math.isinf(acceleration_):
                raise ConfigError(
                    f"{source}: joint {index} ({joint}): got an acceleration limit of "
                    f"{acceleration_} and no velocity limit, expected both: without a velocity "
                    "limit, stopping could take any time"
                )
        return limits

    def __len__(self) -> int:
        return len(self.velocity)

    def violations(self, position: ArrayLike) -> tuple[int, ...]:
        """Indices of the actuators whose ``position``, (A,), is outside their position limits."""
        values = np.asarray(position, np.float64)
        inside = (values >= self.position_lower) & (values <= self.position_upper)
        return tuple(int(index) for index in np.flatnonzero(~inside))


def _frozen(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.array(values, np.float64)
    array.setflags(write=False)
    return array
