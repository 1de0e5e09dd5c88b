"""The whole tick as one CUDA graph for each batch size, over buffers that never move.

A graph takes normalized states from pinned memory and pictures on the device, and leaves actions in
physical units in pinned memory. Per observation that is one copy of its pictures; per batch, one
launch and one wait.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from policies.act.cuda_api import CudaApi
from policies.act.engine import MAX_BATCH, EngineUnavailable, Frames
from policies.act.fused_model import FusedAct
from policies.act.hardware import DTYPES
from policies.errors import InferenceError

SIZES = (1, 2, 4, MAX_BATCH)
"""Captured batch sizes. A batch of 3 is computed as 4: padding costs less than more graphs."""


class CudaGraphEngine:
    """``Engine`` with captured graphs. The constructor allocates, warms up and captures everything.

    Args:
        fused: The engine takes it over: it moves and converts it.
        precision: A key of ``DTYPES``.
        api: The device.
        sizes: Batch sizes to capture, ascending.

    Raises:
        EngineUnavailable: The device does not support graphs or lacks memory; says which.
    """

    threads = 0
    exact = False

    def __init__(
        self, fused: FusedAct, precision: str, api: CudaApi, *, sizes: tuple[int, ...] = SIZES
    ) -> None:
        config = fused.config
        self.name = f"cuda-graph, torch {torch.__version__}"
        self.device, self.precision, self.sizes = str(api.device), precision, sizes
        self._api = api
        largest = sizes[-1]
        pictures = (largest, config.n_cameras, *config.image_hw, 3)
        states = (largest, config.state_dim)
        actions = (largest, config.chunk_size, config.action_dim)
        try:
            self._fused = fused.set_dtype(DTYPES[precision]).to(api.device)
            self._images = api.buffer(pictures, torch.uint8)
            self._states = api.buffer(states, torch.float32)
            self._host_images = api.pinned(pictures, torch.uint8)
            self._host_states = api.pinned(states, torch.float32)
            self._host_actions = api.pinned(actions, torch.float32)
            self._staging = [
                Frames(list(images), state)
                for images, state in zip(
                    self._host_images.numpy(), self._host_states.numpy(), strict=True
                )
            ]
            # Capture the largest first: the smaller ones then fit into its memory pool.
            self._graphs = {
                size: api.capture(functools.partial(self._step, size)) for size in reversed(sizes)
            }
        except RuntimeError as error:  # any error of torch, including out of memory
            raise EngineUnavailable(f"cuda graph on {self.device}: {error}") from error

    def staging(self, slot: int) -> Frames:
        """Return the pinned arrays of observation ``slot``."""
        return self._staging[slot]

    def run(self, batch: Sequence[Frames]) -> NDArray[np.float32]:
        """As ``Engine``.

        Raises:
            InferenceError: The device failed; or, at fp16, an action is NaN or infinite, because a
                value had no number in fp16. Every value passes through a layer-norm behind it,
                which makes NaN of an infinity: none is hidden. At other precisions NaN and
                infinity are the caller's to look for; ``ActPolicy`` does at any.
            ValueError: More observations than the largest size.
        """
        if not 0 < len(batch) <= self.sizes[-1]:
            raise ValueError(
                f"batch: got {len(batch)} observations, expected 1 to {self.sizes[-1]}"
            )
        size = next(size for size in self.sizes if size >= len(batch))
        try:
            for slot, frames in enumerate(batch):
                self._upload(slot, frames)
            self._graphs[size]()
            self._api.wait()
        except RuntimeError as error:
            raise InferenceError(f"{self.name} on {self.device}: {error}") from error
        actions: NDArray[np.float32] = self._host_actions.numpy()[: len(batch)]
        if self.precision == "fp16" and not np.isfinite(actions).all():
            raise InferenceError(
                f"{self.name} on {self.device}: fp16 overflowed (it ends at 65504); serve with "
                "--precision bf16 or fp32"
            )
        return actions

    def close(self) -> None:
        """Release the graphs with their memory. Idempotent."""
        self._graphs = {}

    def _step(self, size: int) -> None:
        """The computation that one graph captures."""
        with torch.inference_mode():
            self._states[:size].copy_(self._host_states[:size], non_blocking=True)
            actions = self._fused(self._images[:size], self._states[:size])
            self._host_actions[:size].copy_(actions, non_blocking=True)

    def _upload(self, slot: int, frames: Frames) -> None:
        staging = self._staging[slot]
        if frames.state is not staging.state:
            np.copyto(staging.state, frames.state)
        for image, pinned in zip(frames.images, staging.images, strict=True):
            if image is not pinned:
                np.copyto(pinned, image)
        self._api.copy(self._images[slot], self._host_images[slot])
