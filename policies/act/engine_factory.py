"""Builds each kind of engine from a checkpoint's weights and measures its error."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from policies.act import hardware
from policies.act.engine import DEFAULT_GRAPH_OPTIONS, MAX_BATCH, Engine, EngineUnavailable
from policies.act.engine_cache import BlobCache, Stored
from policies.act.engine_check import MAX_RELATIVE_ERROR, reference_actions, relative_error
from policies.act.fused_model import FusedAct
from policies.act.torch_engine import TorchEngine
from policies.act.weight_fusion import fuse
from policies.act.weights import ActWeights
from policies.errors import DeviceLost, InferenceError

logger = logging.getLogger(__name__)

EngineFactory = Callable[[ActWeights, torch.device, str, int, frozenset[str]], tuple[Engine, float]]
"""(weights, device, precision, threads, graph options) to an engine and its relative error on the
probes.
"""

FP16_PIXEL_UNIT = 2.0**-6
"""``pixel_unit`` for fp16. Images of 0 to 255 would need weights near 6e-5, the smallest normal
fp16 number. A power of two is exact.
"""
COMPILED_SOURCES = (
    "weight_fusion.py",
    "fused_model.py",
    "openvino_graph.py",
    "openvino_engine.py",
    "backbone.py",
)
"""Modules that determine a compiled engine; the cache key contains their text."""


def make_torch(
    weights: ActWeights,
    device: torch.device,
    precision: str,
    threads: int,
    graph_options: frozenset[str] = frozenset(),
) -> tuple[Engine, float]:
    """Build the engine that runs the fused network in eager torch.

    Raises:
        DeviceLost: The device failed for good.
        EngineUnavailable: The device fails, or lacks memory.
    """
    del graph_options
    hardware.configure_cuda(device, hardware.DTYPES[precision])
    hardware.set_threads(threads)
    fused, reference = _fused_and_reference(weights, precision)
    engine = TorchEngine(fused, device, precision, threads)
    return engine, relative_error(engine, weights.config, reference)


def make_cuda_graph(
    weights: ActWeights,
    device: torch.device,
    precision: str,
    threads: int,
    graph_options: frozenset[str] = frozenset(DEFAULT_GRAPH_OPTIONS),
) -> tuple[Engine, float]:
    """Build the engine of captured CUDA graphs.

    Raises:
        DeviceLost: The device failed for good.
        EngineUnavailable: The device does not support graphs, or lacks memory.
    """
    from policies.act.cuda_api import TorchCuda
    from policies.act.cuda_graph import CudaGraphEngine
    from policies.act.registered_memory import process_registry

    pinned_attention = "pinned_attention" in graph_options
    hardware.configure_cuda(device, hardware.DTYPES[precision], pinned_attention=pinned_attention)
    hardware.set_threads(threads)
    fused, reference = _fused_and_reference(
        weights, precision, space_to_depth="space_to_depth" in graph_options
    )
    try:
        api = TorchCuda(device, autotune="autotune" in graph_options)
    except RuntimeError as error:
        raise EngineUnavailable(f"{device}: {error}") from error
    memory = process_registry(device) if "direct_upload" in graph_options else None
    engine = CudaGraphEngine(fused, precision, api, options=graph_options, registered_memory=memory)
    try:
        return engine, relative_error(engine, weights.config, reference)
    except DeviceLost:
        raise  # closing the engine could hang
    except InferenceError:
        if precision == "fp16":
            return engine, float("inf")
        engine.close()
        raise


def make_openvino(
    weights: ActWeights,
    device: torch.device,
    precision: str,
    threads: int,
    graph_options: frozenset[str] = frozenset(),
) -> tuple[Engine, float]:
    """Compile the network with OpenVINO, or load it from the cache with the error measured then.

    Raises:
        EngineUnavailable: OpenVINO is not installed, or cannot compile or run the network.
    """
    del device, graph_options
    try:
        from policies.act import openvino_engine
    except ImportError as missing:
        raise EngineUnavailable(f"{missing} (pip install '.[server]')") from missing
    hardware.set_threads(threads)
    streams = min(MAX_BATCH, hardware.streams(threads))
    cache = BlobCache()
    compiler = f"{openvino_engine.version()} {streams}"
    key = engine_key(weights, precision, threads, compiler)
    stored = cache.read(key)
    if stored is not None:
        try:
            engine = openvino_engine.import_blob(
                stored.blob, weights.config, precision, threads, streams
            )
        except EngineUnavailable as refusal:
            logger.warning("engine cache: %s; compiling again", refusal)
            cache.remove(key)
        else:
            return engine, stored.error
    fused, reference = _fused_and_reference(weights, precision)
    engine = openvino_engine.compile_fused(fused, precision, threads, streams)
    error = relative_error(engine, weights.config, reference)
    if error <= MAX_RELATIVE_ERROR[precision]:
        cache.write(key, Stored(engine.export(), error))
    return engine, error


ENGINE_FACTORIES: dict[str, EngineFactory] = {
    "torch": make_torch,
    "openvino": make_openvino,
    "cuda-graph": make_cuda_graph,
}


def engine_key(weights: ActWeights, precision: str, threads: int, compiler: str) -> str:
    """Return the cache key of a compiled engine. It differs whenever one of the inputs differs."""
    state = hashlib.sha256(weights.digest)
    state.update(f"{precision} {threads} {compiler} {sorted(hardware.cpu_flags())}".encode())
    for name in COMPILED_SOURCES:
        state.update(Path(__file__).with_name(name).read_bytes())
    return state.hexdigest()[:32]


def _fused_and_reference(
    weights: ActWeights, precision: str, *, space_to_depth: bool = False
) -> tuple[FusedAct, NDArray[np.float32]]:
    """Return the network, still float32 and ready to convert, and its actions for the probes."""
    fused = fuse(weights)
    reference = reference_actions(fused)
    if precision == "fp16" or space_to_depth:
        pixel_unit = FP16_PIXEL_UNIT if precision == "fp16" else 1.0
        fused = fuse(weights, pixel_unit=pixel_unit, space_to_depth=space_to_depth)
    return fused, reference
