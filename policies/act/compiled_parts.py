"""The part behind the convolutions, compiled by torch's Inductor for an engine of CUDA graphs.

Inductor merges the many small operations between the matrix products into few kernels, and measures
which kernels are fastest (max-autotune). Its own graphs are off: ours captures what it compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from policies.act.fused_model import FusedAct

logger = logging.getLogger(__name__)


def compile_transform(fused: FusedAct, *, mode: str = "max-autotune-no-cudagraphs") -> None:
    """Have ``fused`` compile ``transform`` on the first call for each batch size.

    The results are kept by Inductor's own cache from one start to the next.
    """
    # Each batch size is compiled by itself, with constant shapes.
    compiled = torch.compile(fused.transform, mode=mode, dynamic=False, fullgraph=True)
    vars(fused)["transform"] = compiled


def is_compiled(fused: FusedAct) -> bool:
    """Return whether ``compile_transform`` is in effect."""
    return "transform" in vars(fused)


def run_or_fall_back(fused: FusedAct, step: Callable[[], Tensor]) -> Tensor:
    """Return ``step()``, which calls ``fused``; where that cannot be compiled, in eager torch.

    There may be no compiler on this machine.

    Raises:
        RuntimeError: ``step`` fails in eager torch, or the device lacks memory.
    """
    if not is_compiled(fused):
        return step()
    try:
        return step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        logger.warning("not compiled, eager torch instead: %s", str(error).partition("\n")[0])
        vars(fused).pop("transform", None)
        return step()
