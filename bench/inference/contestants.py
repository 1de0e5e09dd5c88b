"""Everything that answers an observation with a chunk, by name: ours, the peers, the limits.

Each takes the pictures as uint8 and gives float32 actions in physical units, so each does the same
work. A package that is not installed takes its own rows away and nothing else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # it imports torch, and a worker sets its cores before that
    from policies.act.weights import ActWeights

Run: TypeAlias = Callable[[NDArray[np.uint8], NDArray[np.float32]], NDArray[np.float32]]
"""(N, H, W, 3) uint8 pictures, (S,) normalized state -> (T, A) actions in physical units."""


class Absent(Exception):
    """A contestant that cannot run here; the reason."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Where it runs.

    Attributes:
        threads: CPU threads; the process may not use more cores either.
        cache: A folder of its own for what it compiles; empty at its first start.
        device: ``cpu`` or ``cuda``.
    """

    threads: int
    cache: Path
    device: str = "cpu"


Build: TypeAlias = "Callable[[ActWeights, Setting], Run]"
BuildLimit: TypeAlias = Callable[[Setting], Run]
"""What a limit runs takes no notice of its observation, and needs no weights."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row.

    Attributes:
        module: Where ``build`` is; imported in the contestant's own process only.
        side: ``limit`` says what the machine can do, and gives no actions.
        caches: Whether a second start has something to find.
        work: Floating-point operations, or bytes moved, of one call; for limits.
    """

    name: str
    module: str
    build: str
    side: Literal["reference", "ours", "peer", "limit"]
    precision: str
    caches: bool = False
    work: float = 0.0

    def load(self) -> Build:
        """The function that builds it.

        Raises:
            Absent: Its package is not installed.
        """
        return self._import()  # type: ignore[no-any-return]

    def load_limit(self) -> BuildLimit:
        """As ``load``, for a limit."""
        return self._import()  # type: ignore[no-any-return]

    def _import(self) -> Any:
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            raise Absent(f"not installed: {error}") from error
        return getattr(module, self.build)


PLAIN = "plain, torch fp32"
LEROBOT = "LeRobot, torch fp32"
GEMM, CONVOLUTION, COPY = "matrix product", "convolution", "copy"
GEMM_SIDE = 1024
CONVOLUTION_SHAPE = (128, 60, 80)
"""Channels in and out, height, width: the second stage of ResNet at 480x640."""
COPY_BYTES = 2**28
CUDA_GEMM, CUDA_COPY = "matrix product bf16, CUDA", "copy, CUDA"
CUDA_GEMM_SIDE, CUDA_COPY_BYTES = 8192, 2**32


_HERE = "bench.inference"
_ALL = (
    Contestant(PLAIN, f"{_HERE}.reference", "plain", "reference", "fp32"),
    Contestant(LEROBOT, f"{_HERE}.lerobot_peer", "lerobot", "peer", "fp32"),
    *(
        Contestant(
            f"OpenVINO of plain {precision}",
            f"{_HERE}.openvino_peer",
            precision,
            "peer",
            precision,
            caches=True,
        )
        for precision in ("fp32", "bf16")
    ),
    Contestant(
        "torch.compile of plain fp32", f"{_HERE}.reference", "compiled", "peer", "fp32", caches=True
    ),
    *(
        Contestant(
            f"ours, {engine} {precision}",
            f"{_HERE}.ours",
            f"{engine.replace('-', '_')}_{precision}",
            "ours",
            precision,
            caches=engine == "openvino",
        )
        for engine in ("torch", "openvino", "cuda-graph")
        for precision in ("fp32", "bf16", "fp16")
        if (engine, precision) not in {("torch", "fp16"), ("openvino", "fp16")}
    ),
    Contestant(GEMM, f"{_HERE}.limits", "matrix_product", "limit", "fp32", work=2.0 * GEMM_SIDE**3),
    Contestant(
        CONVOLUTION,
        f"{_HERE}.limits",
        "convolution",
        "limit",
        "fp32",
        work=2.0 * 9 * CONVOLUTION_SHAPE[0] ** 2 * CONVOLUTION_SHAPE[1] * CONVOLUTION_SHAPE[2],
    ),
    Contestant(COPY, f"{_HERE}.limits", "copy", "limit", "fp32", work=2.0 * COPY_BYTES),
    Contestant(
        CUDA_GEMM,
        f"{_HERE}.limits",
        "cuda_matrix_product",
        "limit",
        "bf16",
        work=2.0 * CUDA_GEMM_SIDE**3,
    ),
    Contestant(
        CUDA_COPY, f"{_HERE}.limits", "cuda_copy", "limit", "fp32", work=2.0 * CUDA_COPY_BYTES
    ),
)
CONTESTANTS: Mapping[str, Contestant] = {each.name: each for each in _ALL}
