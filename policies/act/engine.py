"""What runs the network: the seam behind which a faster engine may be put.

An engine takes pictures of the model's size as they came, uint8, and normalized states, and gives
actions in physical units. ``policies.act.engine_selection`` picks one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from policies.act.config import ActConfig
from policies.errors import ContractMismatch, PolicyError

ENGINES = ("auto", "torch", "openvino", "cuda-graph")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MAX_BATCH = 8
"""Observations that an engine takes at a time, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """One observation as the network takes it.

    Attributes:
        images: (H, W, 3) uint8 for each camera.
        state: (S,) float32, normalized.
    """

    images: Sequence[NDArray[np.uint8]]
    state: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What may be asked for.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        engine: One of ``ENGINES``.
        precision: One of ``PRECISIONS``.
        threads: CPU threads of one inference; measured default where None.

    Raises:
        ContractMismatch: A name or number that cannot be.
    """

    device: str = "auto"
    engine: str = "auto"
    precision: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("engine", ENGINES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ContractMismatch(name, repr(getattr(self, name)), f"one of {choices}")
        if self.threads is not None and self.threads < 1:
            raise ContractMismatch("threads", str(self.threads), "at least 1")


class EngineUnavailable(PolicyError):
    """This machine cannot run that engine; the message says why."""


class Engine(Protocol):
    """One network, one thread at a time.

    Attributes:
        name: e.g. ``"openvino 2026.4.1"``.
        device: e.g. ``"cpu"`` or ``"cuda:0"``.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        threads: CPU threads of one inference, 0 where that does not apply.
        sizes: Batch sizes that were prepared, ascending. A batch is computed as the next larger
            one; (1,) means one observation after another.
        exact: Whether an observation's actions have the same bits whatever is in its batch.
    """

    name: str
    device: str
    precision: str
    threads: int
    sizes: tuple[int, ...]
    exact: bool

    def staging(self, slot: int) -> Frames:
        """The engine's own arrays for observation ``slot`` < ``MAX_BATCH``, to be written into.

        What lies in them needs no further copy in ``run``.
        """
        ...

    def run(self, batch: Sequence[Frames]) -> NDArray[np.float32]:
        """(B, T, A) float32 in physical units for B <= ``MAX_BATCH`` observations.

        The pictures are read until this returns, and not kept. The result is overwritten by the
        next call.

        Raises:
            InferenceError: The network failed.
        """
        ...

    def close(self) -> None:
        """Release what it holds. Idempotent."""
        ...


class HostEngine:
    """What engines on a CPU share: arrays to write into."""

    sizes: tuple[int, ...] = (1,)
    exact = True

    def __init__(self, config: ActConfig) -> None:
        self._config = config
        self._staging: dict[int, Frames] = {}

    def staging(self, slot: int) -> Frames:
        """As ``Engine``; made when first asked for."""
        if not 0 <= slot < MAX_BATCH:
            raise ValueError(f"slot: got {slot}, expected 0 to {MAX_BATCH - 1}")
        if slot not in self._staging:
            images = np.zeros((self._config.n_cameras, *self._config.image_hw, 3), np.uint8)
            state = np.zeros(self._config.state_dim, np.float32)
            self._staging[slot] = Frames(list(images), state)
        return self._staging[slot]

    def close(self) -> None:
        """Nothing is held that outlives the object."""
