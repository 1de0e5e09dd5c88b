"""The CUDA calls of the graph engine, behind an interface that tests implement without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UP_RUNS = 3
"""Runs before a capture, in which libraries choose kernels and allocate workspaces. A capture
cannot do either.
"""
HIGH_PRIORITY = -1


class CudaApi(Protocol):
    """One device and one stream; all operations run in the stream's order.

    Attributes:
        device: The device of the buffers.
    """

    device: torch.device

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return zeros on the device. Raises ``torch.OutOfMemoryError``."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return zeros in host memory that the device reads and writes directly."""
        ...

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Warm up ``step`` and capture it as a graph; calling the result enqueues the graph.

        Raises:
            RuntimeError: The device or an operation does not support graphs, or is out of memory.
        """
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy."""
        ...

    def wait(self) -> None:
        """Wait until all enqueued work is done."""
        ...


class TorchCuda:
    """``CudaApi`` through torch, with a high-priority stream and its own memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda: Any = torch.cuda  # hardly typed
        with torch.cuda.device(device):
            self._stream = cuda.Stream(device, priority=HIGH_PRIORITY)
            self._done = cuda.Event()
            self._pool = torch.cuda.graph_pool_handle()

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return ``torch.zeros`` on the device."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return ``torch.zeros`` in page-locked memory."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Capture ``step`` as a ``CUDAGraph`` and replay it once."""
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP_RUNS):
                    step()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread's allocation must not invalidate the capture. The graphs
            # can share the pool, because they run one after another and pass no data through it.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                step()

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        replay()
        self._stream.synchronize()
        return replay

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue the copy on the stream."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Record an event on the stream and wait for it."""
        self._done.record(self._stream)
        self._done.synchronize()
