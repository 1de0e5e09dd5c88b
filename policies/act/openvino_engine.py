"""Runs the fused network compiled by OpenVINO for this CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from policies.act.config import ActConfig
from policies.act.engine import MAX_BATCH, EngineUnavailable, Frames, HostEngine
from policies.act.fused_model import FusedAct
from policies.act.openvino_import import ov
from policies.act.writable_views import nominally_writable
from policies.errors import InferenceError

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
"""OpenVINO's names of the precisions."""
CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}
"""OpenVINO's names of the matching CPU capabilities."""


class _Stream:
    """One stream of the compiled model: its threads, computing one observation at a time.

    Args:
        own: Arrays for images that OpenVINO cannot read directly from the caller's memory.
    """

    def __init__(
        self, compiled: ov.CompiledModel, config: ActConfig, own: Sequence[NDArray[np.uint8]]
    ) -> None:
        self._request = compiled.create_infer_request()
        self._state = np.zeros((1, config.state_dim), np.float32)
        self._request.set_tensor("state", ov.Tensor(self._state, shared_memory=True))
        self._names = [f"image_{i}" for i in range(config.n_cameras)]
        self._own_images = own
        self._own_tensors = [ov.Tensor(image[None], shared_memory=True) for image in own]
        self._borrowed = True
        self.release_images()

    def bind(self, frames: Frames, actions: ov.Tensor) -> None:
        """Set the next observation and the output tensor; contiguous images are not copied."""
        for name, own, own_tensor, image in zip(
            self._names, self._own_images, self._own_tensors, frames.images, strict=True
        ):
            if image is own or not image.flags.c_contiguous:
                if image is not own:
                    np.copyto(own, image)
                if self._borrowed:
                    self._request.set_tensor(name, own_tensor)
                continue
            view = nominally_writable(image)[None]
            self._request.set_tensor(name, ov.Tensor(view, shared_memory=True))
            self._borrowed = True
        np.copyto(self._state[0], frames.state)
        self._request.set_tensor("actions", actions)

    def infer(self) -> None:
        """Compute and wait."""
        self._request.infer(share_outputs=True)

    def start(self) -> None:
        """Start computing in the background."""
        self._request.start_async(share_inputs=True)

    def wait(self) -> None:
        """Wait for ``start``. Raises ``RuntimeError`` where the computation failed."""
        self._request.wait()

    def release_images(self) -> None:
        """Drop all references to the caller's images, whose memory may be unmapped after this."""
        if self._borrowed:
            for name, own_tensor in zip(self._names, self._own_tensors, strict=True):
                self._request.set_tensor(name, own_tensor)
            self._borrowed = False


class OpenVinoEngine(HostEngine):
    """``Engine`` that reads images from, and writes actions to, their final memory without copies.

    A batch is computed in parallel, one observation per stream of ``threads`` threads. Each
    observation runs the same instructions as one alone, so its actions have the same bits in every
    batch.

    Args:
        config: Sizes.
        compiled: The model that ``compile_fused`` or ``import_blob`` created.
        precision, threads, streams: Options it was compiled with.
    """

    def __init__(
        self,
        config: ActConfig,
        compiled: ov.CompiledModel,
        precision: str,
        threads: int,
        streams: int,
    ) -> None:
        super().__init__(config)
        self.name = f"openvino {ov.get_version().partition('-')[0]}"
        self.device, self.precision, self.threads = "cpu", precision, threads
        self.sizes = tuple(range(1, streams + 1))
        self._compiled = compiled
        self._streams = [
            _Stream(compiled, config, self.staging(slot).images) for slot in range(streams)
        ]
        self._actions = np.zeros((MAX_BATCH, config.chunk_size, config.action_dim), np.float32)
        self._outputs = [
            ov.Tensor(self._actions[i : i + 1], shared_memory=True) for i in range(MAX_BATCH)
        ]

    def run(self, batch: Sequence[Frames]) -> NDArray[np.float32]:
        """Compute as many observations at a time as there are streams."""
        size = len(self._streams)
        try:
            for first in range(0, len(batch), size):
                self._run_parallel(batch[first : first + size], self._outputs[first:])
        except RuntimeError as error:
            raise InferenceError(f"{self.name}: {error}") from error
        finally:
            for stream in self._streams:
                stream.release_images()
        return self._actions[: len(batch)]

    def _run_parallel(self, batch: Sequence[Frames], outputs: Sequence[ov.Tensor]) -> None:
        """Compute at most one observation per stream."""
        streams = self._streams[: len(batch)]
        for stream, frames, actions in zip(streams, batch, outputs, strict=False):
            stream.bind(frames, actions)
        if len(streams) == 1:
            streams[0].infer()
            return
        started: list[_Stream] = []
        try:
            for stream in streams:
                stream.start()
                started.append(stream)
        finally:
            # Wait for all of them even if one fails: no image may be read after this returns.
            failures = [failure for stream in started if (failure := _wait_for(stream))]
        if failures:
            raise failures[0]

    def export(self) -> bytes:
        """Return the bytes that ``import_blob`` takes."""
        blob = self._compiled.export_model()
        return blob if isinstance(blob, bytes) else bytes(blob.getvalue())


def _wait_for(stream: _Stream) -> RuntimeError | None:
    """Wait for ``stream`` and return its error, if any."""
    try:
        stream.wait()
    except RuntimeError as error:
        return error
    return None


def version() -> str:
    """Return OpenVINO's version and commit; another version compiles other code."""
    return str(ov.get_version())


def compile_fused(
    fused: FusedAct, precision: str, threads: int, streams: int = 1
) -> OpenVinoEngine:
    """Compile ``fused`` (float32, on the CPU) for this machine.

    Args:
        fused: The network.
        precision: A key of ``HINTS``.
        threads: CPU threads of one observation.
        streams: Observations computed in parallel, each on ``threads`` threads.

    Raises:
        EngineUnavailable: This CPU lacks ``precision``, or the compiler failed.
    """
    from policies.act.openvino_graph import build_graph

    core = ov.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if CAPABILITIES[precision] not in capabilities:
        raise EngineUnavailable(f"openvino: {precision} is not among this CPU's {capabilities}")
    try:
        compiled = core.compile_model(
            build_graph(fused), "CPU", _compile_options(precision, threads, streams)
        )
    except RuntimeError as error:
        raise EngineUnavailable(f"openvino: {error}") from error
    return OpenVinoEngine(fused.config, compiled, precision, threads, streams)


def import_blob(
    blob: bytes, config: ActConfig, precision: str, threads: int, streams: int = 1
) -> OpenVinoEngine:
    """Load the engine that ``OpenVinoEngine.export`` wrote on this machine with the same options.

    Raises:
        EngineUnavailable: OpenVINO refuses it.
    """
    try:
        options = _compile_options(precision, threads, streams)
        compiled = ov.Core().import_model(blob, "CPU", options)
        return OpenVinoEngine(config, compiled, precision, threads, streams)
    except RuntimeError as error:
        raise EngineUnavailable(f"openvino: {error}") from error


def _compile_options(precision: str, threads: int, streams: int) -> dict[str, str | int | bool]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads * streams,
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        # Pinned threads could not move to another core when the control loop needs theirs.
        "ENABLE_CPU_PINNING": False,
    }
