"""The whole tick as one CUDA graph for each batch size, over buffers that never move.

A graph takes normalized states from pinned memory and pictures on the device, and leaves actions in
physical units in pinned memory. Per batch that is a copy of each picture, one launch and one wait.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.act.compiled_parts import compile_transform, run_or_fall_back
from policies.act.cuda_api import CudaApi
from policies.act.cudnn_blocks import use_cudnn_blocks
from policies.act.engine import MAX_BATCH, EngineUnavailable, Frames
from policies.act.fused_model import FusedAct
from policies.act.hardware import DTYPES
from policies.act.registered_memory import RegisteredMemory
from policies.act.writable_views import nominally_writable
from policies.errors import DeviceLost, InferenceError

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, MAX_BATCH)
"""Captured batch sizes. A batch of 3 is computed as 4: padding costs less than more graphs."""


class CudaGraphEngine:
    """``Engine`` with captured graphs. The constructor allocates, warms up and captures everything.

    A size whose capture fails, as for lack of memory, is left out, but not the smallest. A larger
    batch is then computed in parts.

    Args:
        fused: The engine takes it over: it moves and converts it.
        precision: A key of ``DTYPES``.
        api: The device.
        options: Of ``GRAPH_OPTIONS``, those that concern the network: "fused_convolutions" (in
            bf16 only: cuDNN's activation may hide a NaN, which is how fp16's overflow is found) and
            "compiled".
        registered_memory: Host memory that the device reads directly; None for none.
        sizes: Batch sizes to capture, ascending.

    Raises:
        DeviceLost: The device failed for good.
        EngineUnavailable: The device does not support graphs or lacks memory; says which.
    """

    threads = 0
    exact = False

    def __init__(
        self,
        fused: FusedAct,
        precision: str,
        api: CudaApi,
        *,
        options: frozenset[str] = frozenset(),
        registered_memory: RegisteredMemory | None = None,
        sizes: tuple[int, ...] = SIZES,
    ) -> None:
        config = fused.config
        self.name = f"cuda-graph, torch {torch.__version__}"
        self.device, self.precision = str(api.device), precision
        self.registered_memory = registered_memory
        self._api = api
        self._fused: FusedAct | None = fused
        pictures = (MAX_BATCH, config.n_cameras, *config.image_hw, 3)
        states = (MAX_BATCH, config.state_dim)
        actions = (MAX_BATCH, config.chunk_size, config.action_dim)
        if "fused_convolutions" in options and precision == "bf16":
            use_cudnn_blocks(fused)
        try:
            fused.set_dtype(DTYPES[precision]).to(api.device)
            if "compiled" in options:
                compile_transform(fused)
            self._images = api.buffer((sizes[-1], *pictures[1:]), torch.uint8)
            self._states = api.buffer((sizes[-1], *states[1:]), torch.float32)
            self._host_images = api.pinned(pictures, torch.uint8)
            self._host_states = api.pinned(states, torch.float32)
            self._host_actions = api.pinned(actions, torch.float32)
            self._staging = [
                Frames(list(images), state)
                for images, state in zip(
                    self._host_images.numpy(), self._host_states.numpy(), strict=True
                )
            ]
            self._graphs = self._capture_all(sizes)
        except RuntimeError as error:  # any error of torch, including out of memory
            if api.is_lost():
                raise DeviceLost(f"cuda graph on {self.device}: {error}") from error
            self.close()
            raise EngineUnavailable(f"cuda graph on {self.device}: {error}") from error
        self.sizes = tuple(sorted(self._graphs))
        self._actions = np.empty(actions, np.float32)

    def staging(self, slot: int) -> Frames:
        """Return the pinned arrays of observation ``slot``."""
        return self._staging[slot]

    def run(self, batch: Sequence[Frames]) -> NDArray[np.float32]:
        """As ``Engine``.

        Raises:
            DeviceLost: The device failed, and fails from now on.
            InferenceError: The device failed; or, at fp16, an action is NaN or infinite, because a
                value had no number in fp16. Every value passes through a layer-norm behind it,
                which makes NaN of an infinity: none is hidden. At other precisions NaN and
                infinity are the caller's to look for; ``ActPolicy`` does at any.
            ValueError: More than ``MAX_BATCH`` observations, or none.
        """
        if not 0 < len(batch) <= MAX_BATCH:
            raise ValueError(f"batch: got {len(batch)} observations, expected 1 to {MAX_BATCH}")
        if not self._graphs:
            raise InferenceError(f"{self.name} on {self.device}: it is closed")
        largest = self.sizes[-1]
        try:
            if len(batch) <= largest:
                actions = self._run_graph(batch, 0)
            else:
                for first in range(0, len(batch), largest):
                    part = batch[first : first + largest]
                    self._actions[first : first + len(part)] = self._run_graph(part, first)
                actions = self._actions[: len(batch)]
        except RuntimeError as error:
            # Whatever was enqueued has to end before the caller may reuse its images.
            failure = DeviceLost if self._api.is_lost() else InferenceError
            raise failure(f"{self.name} on {self.device}: {error}") from error
        if self.precision == "fp16" and not np.isfinite(actions).all():
            raise InferenceError(
                f"{self.name} on {self.device}: fp16 overflowed (it ends at 65504); serve with "
                "--precision bf16 or fp32"
            )
        return actions

    def close(self) -> None:
        """Release the graphs, the weights and the memory to torch. Idempotent."""
        if self._fused is not None:
            # A compiled function and its module refer to each other.
            vars(self._fused).pop("transform", None)
        self._graphs, self._fused, self._staging = {}, None, []
        empty = torch.empty(0)
        self._images = self._states = empty
        self._host_images = self._host_states = self._host_actions = empty
        self._api.close()

    def _capture_all(self, sizes: tuple[int, ...]) -> dict[int, Callable[[], None]]:
        """Return the graphs by size. Raises ``RuntimeError`` where the smallest fails."""
        graphs: dict[int, Callable[[], None]] = {}
        # Capture the largest first: the smaller ones then fit into its memory pool.
        for size in reversed(sizes):
            try:
                graphs[size] = self._api.capture(functools.partial(self._step, size))
            except RuntimeError as error:  # cuDNN and cuBLAS tell a lack of memory in other words
                if size == sizes[0] or self._api.is_lost():
                    raise
                logger.warning(
                    "%s: no graph for batches of %d: %s", self.device, size, _first_line(error)
                )
        return graphs

    def _step(self, size: int) -> None:
        """The computation that one graph captures."""
        fused = self._fused
        if fused is None:
            raise InferenceError("closed")
        with torch.inference_mode():
            self._states[:size].copy_(self._host_states[:size], non_blocking=True)
            images, states = self._images[:size], self._states[:size]
            actions = run_or_fall_back(fused, lambda: fused(images, states))
            self._host_actions[:size].copy_(actions, non_blocking=True)

    def _run_graph(self, batch: Sequence[Frames], first: int) -> NDArray[np.float32]:
        """Compute ``batch``, which begins at observation ``first``, with the next larger graph."""
        size = next(size for size in self.sizes if size >= len(batch))
        with self._api.in_stream():
            for slot, frames in enumerate(batch):
                self._upload(slot, first + slot, frames)
            self._graphs[size]()
            self._api.wait()
        actions: NDArray[np.float32] = self._host_actions.numpy()[: len(batch)]
        return actions

    def _upload(self, slot: int, index: int, frames: Frames) -> None:
        """Enqueue the copies of observation ``index`` to place ``slot`` of the device's buffers."""
        staging, state = self._staging[index], self._staging[slot].state
        if frames.state is not state:
            np.copyto(state, frames.state)
        sources: list[Tensor | None] = []
        for camera, image in enumerate(frames.images):
            if image is staging.images[camera]:
                sources.append(None)
            elif self._is_registered(image):
                sources.append(torch.from_numpy(nominally_writable(image)))
            else:
                np.copyto(staging.images[camera], image)
                sources.append(None)
        if not any(source is not None for source in sources):
            self._api.copy(self._images[slot], self._host_images[index])
            return
        for camera, source in enumerate(sources):
            own = self._host_images[index, camera]
            self._api.copy(self._images[slot, camera], own if source is None else source)

    def _is_registered(self, image: NDArray[np.uint8]) -> bool:
        return self.registered_memory is not None and self.registered_memory.covers(image)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
