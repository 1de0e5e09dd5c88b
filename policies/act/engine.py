"""The interface of inference engines, and what CPU engines share.

An engine takes uint8 images of the model's size and normalized states, and returns actions in
physical units. ``policies.act.engine_selection`` chooses one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from policies.act.config import ActConfig
from policies.errors import ContractMismatch, PolicyError

if TYPE_CHECKING:
    from policies.act.registered_memory import RegisteredMemory

ENGINES = ("auto", "torch", "openvino", "cuda-graph")
"""Valid engine names."""
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
"""Valid precision names."""
GRAPH_OPTIONS = (
    "autotune",
    "pinned_attention",
    "direct_upload",
    "fused_convolutions",
    "compiled",
    "space_to_depth",
)
"""Optional steps of the engine of CUDA graphs; ``docs/inference.md`` describes them."""
DEFAULT_GRAPH_OPTIONS = GRAPH_OPTIONS[:3]
"""Those that are on by default. No GPU has shown yet that the others help."""
MAX_BATCH = 8
"""Largest number of observations in one ``Engine.run``."""


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """One observation as the network's input.

    Attributes:
        images: (H, W, 3) uint8 for each camera.
        state: (S,) float32, normalized.
    """

    images: Sequence[NDArray[np.uint8]]
    state: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The user's choice of device and engine.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        engine: One of ``ENGINES``.
        precision: One of ``PRECISIONS``.
        threads: CPU threads of one inference; ``hardware.default_threads()`` where None.
        graph_options: The steps of ``GRAPH_OPTIONS`` that the engine of CUDA graphs takes;
            ``DEFAULT_GRAPH_OPTIONS`` where None. Other engines ignore them.

    Raises:
        ContractMismatch: An unknown name or an invalid number.
    """

    device: str = "auto"
    engine: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    graph_options: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, choices in (("engine", ENGINES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ContractMismatch(name, repr(getattr(self, name)), f"one of {choices}")
        if self.threads is not None and self.threads < 1:
            raise ContractMismatch("threads", str(self.threads), "at least 1")
        for name in self.graph_options or ():
            if name not in GRAPH_OPTIONS:
                raise ContractMismatch("graph_options", repr(name), f"any of {GRAPH_OPTIONS}")

    @property
    def chosen_graph_options(self) -> frozenset[str]:
        """The steps of the engine of CUDA graphs."""
        chosen = DEFAULT_GRAPH_OPTIONS if self.graph_options is None else self.graph_options
        return frozenset(chosen)


class EngineUnavailable(PolicyError):
    """This machine cannot run the engine; the message says why."""


class Engine(Protocol):
    """Runs one network, in one thread at a time.

    Attributes:
        name: e.g. ``"openvino 2026.4.1"``.
        device: e.g. ``"cpu"`` or ``"cuda:0"``.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        threads: CPU threads of one inference, 0 where that does not apply.
        sizes: Prepared batch sizes, ascending. A batch is padded to the next larger one; (1,)
            means that observations are computed one after another.
        exact: Whether an observation's actions have the same bits in every batch.
        registered_memory: Where to register memory that holds images, so that the engine reads them
            directly; None where it reads any memory.
    """

    name: str
    device: str
    precision: str
    threads: int
    sizes: tuple[int, ...]
    exact: bool
    registered_memory: RegisteredMemory | None

    def staging(self, slot: int) -> Frames:
        """Return the engine's own input arrays for observation ``slot`` < ``MAX_BATCH``.

        The caller writes into them; ``run`` does not copy data that is already there.
        """
        ...

    def run(self, batch: Sequence[Frames]) -> NDArray[np.float32]:
        """Return (B, T, A) float32 in physical units for B <= ``MAX_BATCH`` observations.

        The engine reads the images until this returns, and does not keep them. The next call
        overwrites the result.

        Raises:
            InferenceError: The network failed.
        """
        ...

    def close(self) -> None:
        """Release all resources. Idempotent."""
        ...


class HostEngine:
    """What engines on a CPU share: arrays to write into."""

    sizes: tuple[int, ...] = (1,)
    exact = True
    registered_memory: RegisteredMemory | None = None

    def __init__(self, config: ActConfig) -> None:
        self._config = config
        self._staging: dict[int, Frames] = {}

    def staging(self, slot: int) -> Frames:
        """As ``Engine``; allocated on first use."""
        if not 0 <= slot < MAX_BATCH:
            raise ValueError(f"slot: got {slot}, expected 0 to {MAX_BATCH - 1}")
        if slot not in self._staging:
            images = np.zeros((self._config.n_cameras, *self._config.image_hw, 3), np.uint8)
            state = np.zeros(self._config.state_dim, np.float32)
            self._staging[slot] = Frames(list(images), state)
        return self._staging[slot]

    def close(self) -> None:
        """Does nothing: no resource outlives the object."""
