"""This project's engines, made as the server makes them."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bench.inference.contestants import Absent, Run, Setting
from policies.act.engine import EngineOptions, Frames
from policies.act.engine_selection import make_engine
from policies.act.weights import ActWeights
from policies.errors import ContractMismatch


def _engine(weights: ActWeights, setting: Setting, *, engine: str, precision: str) -> Run:
    """Raises:
    Absent: This machine does not have what the engine or the precision needs.
    """
    os.environ["METRONOME_CACHE"] = str(setting.cache)
    options = EngineOptions(
        device=setting.device, engine=engine, precision=precision, threads=setting.threads
    )
    try:
        made = make_engine(weights, options)
    except ContractMismatch as error:
        raise Absent(str(error)) from error

    def run(images: NDArray[np.uint8], state: NDArray[np.float32]) -> NDArray[np.float32]:
        actions: NDArray[np.float32] = made.run([Frames(list(images), state)])[0]
        return actions

    return run


torch_fp32 = partial(_engine, engine="torch", precision="fp32")
torch_bf16 = partial(_engine, engine="torch", precision="bf16")
openvino_fp32 = partial(_engine, engine="openvino", precision="fp32")
openvino_bf16 = partial(_engine, engine="openvino", precision="bf16")
cuda_graph_fp32 = partial(_engine, engine="cuda-graph", precision="fp32")
cuda_graph_bf16 = partial(_engine, engine="cuda-graph", precision="bf16")
cuda_graph_fp16 = partial(_engine, engine="cuda-graph", precision="fp16")
