"""Runs the fused network in eager torch, on any device that torch supports."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from policies.act.engine import MAX_BATCH, EngineUnavailable, Frames, HostEngine
from policies.act.fused_model import FusedAct
from policies.act.hardware import DTYPES, is_lost, set_threads
from policies.errors import DeviceLost, InferenceError


class TorchEngine(HostEngine):
    """``Engine`` that computes one observation after another.

    So an observation's actions never depend on the rest of its batch.

    Args:
        fused: The engine takes it over: it moves and converts it.
        device: Where to run.
        precision: A key of ``DTYPES``.
        threads: CPU threads, of all of this process's torch.

    Raises:
        DeviceLost: The device failed for good.
        EngineUnavailable: The device fails, or lacks memory.
    """

    def __init__(self, fused: FusedAct, device: torch.device, precision: str, threads: int) -> None:
        super().__init__(fused.config)
        set_threads(threads)
        self.name = f"torch {torch.__version__}"
        self.device, self.precision = str(device), precision
        self.threads = threads
        self._device = device
        try:
            self._fused = fused.set_dtype(DTYPES[precision]).to(device)
        except RuntimeError as error:
            failure = DeviceLost if self._is_lost() else EngineUnavailable
            raise failure(f"{self.name} on {device}: {error}") from error
        config = fused.config
        self._images = torch.zeros((1, config.n_cameras, *config.image_hw, 3), dtype=torch.uint8)
        self._host_images = self._images.numpy()[0]
        self._actions = np.empty((MAX_BATCH, config.chunk_size, config.action_dim), np.float32)

    def run(self, batch: Sequence[Frames]) -> NDArray[np.float32]:
        """Compute the observations one after another."""
        for i, frames in enumerate(batch):
            for camera, image in enumerate(frames.images):
                np.copyto(self._host_images[camera], image)
            try:
                with torch.inference_mode():
                    images = self._images.to(self._device)
                    state = torch.tensor(frames.state)[None].to(self._device)
                    self._actions[i] = self._fused(images, state)[0].cpu().numpy()
            except RuntimeError as error:
                failure = DeviceLost if self._is_lost() else InferenceError
                raise failure(f"{self.name} on {self.device}: {error}") from error
        return self._actions[: len(batch)]

    def _is_lost(self) -> bool:
        if self._device.type != "cuda":
            return False
        return is_lost(torch.cuda.current_stream(self._device))
