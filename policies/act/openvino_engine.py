"""The fused network compiled by OpenVINO for this CPU."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from policies.act.config import ActConfig
from policies.act.engine import MAX_BATCH, EngineUnavailable, Frames, HostEngine
from policies.act.fused import FusedAct
from policies.act.quiet_openvino import ov
from policies.act.views import nominally_writable
from policies.errors import InferenceError

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}


class OpenVinoEngine(HostEngine):
    """Pictures are read where they lie, actions are written where they are handed out.

    One observation after another, so that an action never depends on who else asked.

    Args:
        config: Sizes.
        compiled: What ``compile_fused`` or ``import_blob`` made of ``build_graph``.
        precision, threads: As it was compiled.
    """

    def __init__(
        self, config: ActConfig, compiled: ov.CompiledModel, precision: str, threads: int
    ) -> None:
        super().__init__(config)
        self.name = f"openvino {ov.get_version().partition('-')[0]}"
        self.device, self.precision, self.threads = "cpu", precision, threads
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._actions = np.zeros((MAX_BATCH, config.chunk_size, config.action_dim), np.float32)
        self._outputs = [
            ov.Tensor(self._actions[i : i + 1], shared_memory=True) for i in range(MAX_BATCH)
        ]
        self._state = np.zeros((1, config.state_dim), np.float32)
        self._request.set_tensor("state", ov.Tensor(self._state, shared_memory=True))
        self._inputs = [f"image_{i}" for i in range(config.n_cameras)]
        self._own = [ov.Tensor(image[None], shared_memory=True) for image in self.staging(0).images]
        self._bind_own()

    def run(self, batch: Sequence[Frames]) -> NDArray[np.float32]:
        staging = self.staging(0).images
        borrowed = False
        try:
            for i, frames in enumerate(batch):
                for name, mine, own, image in zip(
                    self._inputs, staging, self._own, frames.images, strict=True
                ):
                    if image is mine or not image.flags.c_contiguous:
                        if image is not mine:
                            np.copyto(mine, image)
                        if borrowed:
                            self._request.set_tensor(name, own)
                        continue
                    view = nominally_writable(image)[None]
                    self._request.set_tensor(name, ov.Tensor(view, shared_memory=True))
                    borrowed = True
                np.copyto(self._state[0], frames.state)
                self._request.set_tensor("actions", self._outputs[i])
                self._request.infer(share_outputs=True)
        except RuntimeError as error:
            raise InferenceError(f"{self.name}: {error}") from error
        finally:
            if borrowed:  # the caller's memory may be gone after this
                self._bind_own()
        return self._actions[: len(batch)]

    def export(self) -> bytes:
        """What ``import_blob`` takes."""
        blob = self._compiled.export_model()
        return blob if isinstance(blob, bytes) else bytes(blob.getvalue())

    def _bind_own(self) -> None:
        for name, own in zip(self._inputs, self._own, strict=True):
            self._request.set_tensor(name, own)


def version() -> str:
    """OpenVINO's, with its commit: another one compiles something else."""
    return str(ov.get_version())


def compile_fused(fused: FusedAct, precision: str, threads: int) -> OpenVinoEngine:
    """Compile ``fused`` (float32, on the CPU) for this machine.

    Raises:
        EngineUnavailable: This CPU lacks ``precision``, or the compiler failed.
    """
    from policies.act.openvino_graph import build_graph

    core = ov.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if CAPABILITIES[precision] not in capabilities:
        raise EngineUnavailable(f"openvino: {precision} is not among this CPU's {capabilities}")
    try:
        compiled = core.compile_model(build_graph(fused), "CPU", _settings(precision, threads))
    except RuntimeError as error:
        raise EngineUnavailable(f"openvino: {error}") from error
    return OpenVinoEngine(fused.config, compiled, precision, threads)


def import_blob(blob: bytes, config: ActConfig, precision: str, threads: int) -> OpenVinoEngine:
    """The engine that ``OpenVinoEngine.export`` wrote, on the same machine with the same settings.

    Raises:
        EngineUnavailable: OpenVINO does not take it.
    """
    try:
        compiled = ov.Core().import_model(io.BytesIO(blob), "CPU", _settings(precision, threads))
        return OpenVinoEngine(config, compiled, precision, threads)
    except RuntimeError as error:
        raise EngineUnavailable(f"openvino: {error}") from error


def _settings(precision: str, threads: int) -> dict[str, str | int | bool]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        # Pinned threads could not make way for the control loop's.
        "ENABLE_CPU_PINNING": False,
    }
