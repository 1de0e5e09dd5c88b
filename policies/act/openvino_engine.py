"""The fused network compiled by OpenVINO for this CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from policies.act.config import ActConfig
from policies.act.engine import MAX_BATCH, EngineUnavailable, Frames, HostEngine
from policies.act.fused_model import FusedAct
from policies.act.quiet_openvino import ov
from policies.act.writable_views import nominally_writable
from policies.errors import InferenceError

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}


class _Stream:
    """One of the compiled model's streams: its threads, and one observation at a time.

    Args:
        own: Arrays for pictures that cannot be read where they lie.
    """

    def __init__(
        self, compiled: ov.CompiledModel, config: ActConfig, own: Sequence[NDArray[np.uint8]]
    ) -> None:
        self._request = compiled.create_infer_request()
        self._state = np.zeros((1, config.state_dim), np.float32)
        self._request.set_tensor("state", ov.Tensor(self._state, shared_memory=True))
        self._names = [f"image_{i}" for i in range(config.n_cameras)]
        self._own_images = own
        self._own = [ov.Tensor(image[None], shared_memory=True) for image in own]
        self._borrowed = True
        self.let_go()

    def bind(self, frames: Frames, actions: ov.Tensor) -> None:
        """The next observation and where its actions go; its pictures are read where they lie."""
        for name, mine, own, image in zip(
            self._names, self._own_images, self._own, frames.images, strict=True
        ):
            if image is mine or not image.flags.c_contiguous:
                if image is not mine:
                    np.copyto(mine, image)
                if self._borrowed:
                    self._request.set_tensor(name, own)
                continue
            view = nominally_writable(image)[None]
            self._request.set_tensor(name, ov.Tensor(view, shared_memory=True))
            self._borrowed = True
        np.copyto(self._state[0], frames.state)
        self._request.set_tensor("actions", actions)

    def infer(self) -> None:
        self._request.infer(share_outputs=True)

    def start(self) -> None:
        self._request.start_async(share_inputs=True)

    def wait(self) -> None:
        self._request.wait()

    def let_go(self) -> None:
        """Of the pictures: the caller's memory may be gone after this."""
        if self._borrowed:
            for name, own in zip(self._names, self._own, strict=True):
                self._request.set_tensor(name, own)
            self._borrowed = False


class OpenVinoEngine(HostEngine):
    """Pictures are read where they lie, actions are written where they are handed out.

    A batch is computed side by side, an observation per stream of ``threads`` threads: the same
    instructions as one alone, so that an action never depends on who else asked, not in one bit.

    Args:
        config: Sizes.
        compiled: What ``compile_fused`` or ``import_blob`` made of ``build_graph``.
        precision, threads, streams: As it was compiled.
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
        together = len(self._streams)
        try:
            for first in range(0, len(batch), together):
                self._run_some(batch[first : first + together], self._outputs[first:])
        except RuntimeError as error:
            raise InferenceError(f"{self.name}: {error}") from error
        finally:
            for stream in self._streams:
                stream.let_go()
        return self._actions[: len(batch)]

    def _run_some(self, batch: Sequence[Frames], outputs: Sequence[ov.Tensor]) -> None:
        """At most one per stream."""
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
            # All of them, whatever one says: nothing may be read any more when this returns.
            failures = [failure for stream in started if (failure := _failure_of(stream))]
        if failures:
            raise failures[0]

    def export(self) -> bytes:
        """What ``import_blob`` takes."""
        blob = self._compiled.export_model()
        return blob if isinstance(blob, bytes) else bytes(blob.getvalue())


def _failure_of(stream: _Stream) -> RuntimeError | None:
    try:
        stream.wait()
    except RuntimeError as error:
        return error
    return None


def version() -> str:
    """OpenVINO's, with its commit: another one compiles something else."""
    return str(ov.get_version())


def compile_fused(
    fused: FusedAct, precision: str, threads: int, streams: int = 1
) -> OpenVinoEngine:
    """Compile ``fused`` (float32, on the CPU) for this machine.

    Args:
        streams: Observations side by side, each on ``threads`` threads.

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
            build_graph(fused), "CPU", _settings(precision, threads, streams)
        )
    except RuntimeError as error:
        raise EngineUnavailable(f"openvino: {error}") from error
    return OpenVinoEngine(fused.config, compiled, precision, threads, streams)


def import_blob(
    blob: bytes, config: ActConfig, precision: str, threads: int, streams: int = 1
) -> OpenVinoEngine:
    """The engine that ``OpenVinoEngine.export`` wrote, on the same machine with the same settings.

    Raises:
        EngineUnavailable: OpenVINO does not take it.
    """
    try:
        compiled = ov.Core().import_model(blob, "CPU", _settings(precision, threads, streams))
        return OpenVinoEngine(config, compiled, precision, threads, streams)
    except RuntimeError as error:
        raise EngineUnavailable(f"openvino: {error}") from error


def _settings(precision: str, threads: int, streams: int) -> dict[str, str | int | bool]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads * streams,
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        # Pinned threads could not make way for the control loop's.
        "ENABLE_CPU_PINNING": False,
    }
