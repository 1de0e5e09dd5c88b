"""The whole tick as one CUDA graph for each batch size, over buffers that never move.

A graph takes normalized states from pinned memory and pictures on the device, and leaves actions in
physical units in pinned memory. Per request that is: copies of the pictures, one launch, one wait.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from policies.act.cuda_api import CudaApi
from policies.act.engine import MAX_BATCH, EngineUnavailable, Frames
from policies.act.fused import FusedAct
from policies.act.hardware import DTYPES
from policies.act.views import nominally_writable
from policies.errors import InferenceError

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, MAX_BATCH)
"""A batch of 3 is computed as 4: padding costs less than a graph for every number."""


class CudaGraphEngine:
    """As ``Engine``; everything is allocated, warmed up and captured when this returns.

    Args:
        fused: Becomes this engine's own: it is moved and converted.
        precision: A key of ``DTYPES``.
        api: The device.
        sizes: Batch sizes to capture, ascending.

    Raises:
        EngineUnavailable: The device has no graphs, or not enough memory; the reason.
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
        self._registered: tuple[tuple[int, int], ...] = ()
        self._registering = threading.Lock()
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
            # The largest first: the smaller ones then fit into its pool.
            self._graphs = {
                size: api.capture(functools.partial(self._step, size)) for size in reversed(sizes)
            }
        except RuntimeError as error:  # torch's of any kind, out of memory among them
            raise EngineUnavailable(f"cuda graph on {self.device}: {error}") from error

    def staging(self, slot: int) -> Frames:
        return self._staging[slot]

    def run(self, batch: Sequence[Frames]) -> NDArray[np.float32]:
        """As ``Engine``.

        Raises:
            InferenceError: The device failed, or an action is NaN or infinite. Every value passes
                through a layer-norm behind it, which makes NaN of an infinity: none is hidden.
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

    def register_host(self, address: int, nbytes: int) -> bool:
        """As ``Engine``; for one thread at a time, beside the one that runs."""
        with self._registering:
            if not self._api.register(address, nbytes):
                logger.info("%s: memory not registered; pictures are copied once more", self.name)
                return False
            self._registered = (*self._registered, (address, address + nbytes))
            return True

    def unregister_host(self, address: int) -> None:
        """As ``Engine``; no ``run`` may be reading that memory."""
        with self._registering:
            kept = tuple(range_ for range_ in self._registered if range_[0] != address)
            if len(kept) != len(self._registered):
                self._registered = kept
                self._api.unregister(address)

    def close(self) -> None:
        for start, _ in self._registered:
            self.unregister_host(start)
        self._graphs = {}

    def _step(self, size: int) -> None:
        """What a graph does."""
        with torch.inference_mode():
            self._states[:size].copy_(self._host_states[:size], non_blocking=True)
            actions = self._fused(self._images[:size], self._states[:size])
            self._host_actions[:size].copy_(actions, non_blocking=True)

    def _upload(self, slot: int, frames: Frames) -> None:
        staging = self._staging[slot]
        if frames.state is not staging.state:
            np.copyto(staging.state, frames.state)
        direct = 0
        for camera, (image, pinned) in enumerate(zip(frames.images, staging.images, strict=True)):
            if image is pinned:
                continue
            if self._is_registered(image):
                source = torch.from_numpy(nominally_writable(image))
                self._api.copy(self._images[slot, camera], source)
                direct += 1
            else:
                np.copyto(pinned, image)
        if direct == 0:
            self._api.copy(self._images[slot], self._host_images[slot])
        elif direct < len(staging.images):
            for camera, (image, pinned) in enumerate(
                zip(frames.images, staging.images, strict=True)
            ):
                if image is pinned or not self._is_registered(image):
                    self._api.copy(self._images[slot, camera], self._host_images[slot, camera])

    def _is_registered(self, image: NDArray[np.uint8]) -> bool:
        if not self._registered or not image.flags.c_contiguous:
            return False
        start = image.ctypes.data
        end = start + image.nbytes
        return any(first <= start and end <= last for first, last in self._registered)
