"""The dial of ``eval-sim`` for latency, loss and old pictures, and what it draws for an episode."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from policies.flag_builder import Flag
from policies.number_ranges import LATENCY_MS, Range, check_ranges

LOSS = Range(0, 0.99)
_STREAM = 0x1A7E
"""Separates these draws from others with the same seed."""


@dataclass(frozen=True, slots=True)
class LatencyDial:
    """How late answers are, how many observations are lost, and how old pictures are.

    Attributes:
        latency_ms: From an observation to the moment its answer is available.
        latency_jitter_ms: Half the width of the uniform distribution around ``latency_ms``.
        drop: Probability that an observation is lost before it is sent.
        camera_latency_ms: Age of an observation's pictures, where its joints are of now. Rounded up
            to ticks; before tick 0 the pictures are those of tick 0.

    Raises:
        ValueError: A number is out of range, or the jitter is above the latency.
    """

    latency_ms: Annotated[
        float, LATENCY_MS, Flag("ms from an observation until its answer is available")
    ] = 0.0
    latency_jitter_ms: Annotated[
        float, LATENCY_MS, Flag("that latency is uniform within +/- so many ms of --latency_ms")
    ] = 0.0
    drop: Annotated[float, LOSS, Flag("probability that an observation is lost")] = 0.0
    camera_latency_ms: Annotated[
        float, LATENCY_MS, Flag("ms by which pictures are older than the joints beside them")
    ] = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.latency_jitter_ms > self.latency_ms:
            raise ValueError(
                f"--latency_jitter_ms: got {self.latency_jitter_ms:g}, expected at most "
                f"--latency_ms, {self.latency_ms:g}: no answer comes before its observation"
            )

    @property
    def delays_answers(self) -> bool:
        """Whether an answer can come later than its observation, or never."""
        return self.latency_ms > 0 or self.drop > 0

    @property
    def largest_ms(self) -> float:
        """The largest latency that can be drawn."""
        return self.latency_ms + self.latency_jitter_ms

    def camera_ticks(self, dt_s: float) -> int:
        """Return how many ticks of ``dt_s`` seconds old the pictures are."""
        return math.ceil(self.camera_latency_ms / (1e3 * dt_s) - 1e-9)

    def __str__(self) -> str:
        """The settings that are not 0, in words; empty if all are."""
        jitter = f" +/- {self.latency_jitter_ms:g}" if self.latency_jitter_ms else ""
        said = {
            f"answers after {self.latency_ms:g}{jitter} ms": self.latency_ms,
            f"{100 * self.drop:g} % of the observations lost": self.drop,
            f"pictures {self.camera_latency_ms:g} ms old": self.camera_latency_ms,
        }
        return ", ".join(text for text, value in said.items() if value)


NO_DELAY = LatencyDial()
"""The dial at 0: answers come when they come, and nothing is lost."""


class LatencyDraws:
    """Draws the latencies and losses of one episode: the i-th request's depend on the seed alone.

    Args:
        dial: The distribution.
        seed: The episode's seed.

    Attributes:
        dial, seed: As given.
        lost: How many observations were lost so far.
    """

    def __init__(self, dial: LatencyDial, seed: int) -> None:
        self.dial, self.seed = dial, seed
        self.lost = 0
        self._generator = np.random.default_rng((seed, _STREAM))
        self._latency_ns: list[int] = []

    def draw_ns(self) -> int | None:
        """Return the latency of the next request in ns; None if its observation is lost."""
        loss, jitter = self._generator.random(2)
        if loss < self.dial.drop:
            self.lost += 1
            return None
        latency_ms = self.dial.latency_ms + (2 * jitter - 1) * self.dial.latency_jitter_ms
        self._latency_ns.append(round(1e6 * latency_ms))
        return self._latency_ns[-1]

    def latency_s(self) -> NDArray[np.float64]:
        """Return the latencies drawn so far, (n,), one for each observation that was not lost."""
        return np.array(self._latency_ns, np.float64) / 1e9
