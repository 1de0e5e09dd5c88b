"""The few calls of CUDA that the graph engine makes: a machine without a GPU tests it by others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UP_RUNS = 3
"""Before a capture: libraries choose kernels and allocate workspaces, which no graph may."""
HIGH_PRIORITY = -1


class CudaApi(Protocol):
    """One device and one stream on it, in whose order everything here happens.

    Attributes:
        device: Where buffers are.
    """

    device: torch.device

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros on the device. Raises ``torch.OutOfMemoryError``."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros in host memory that the device reads and writes by itself."""
        ...

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """``step``, warmed up, as one graph; calling the result queues it.

        Raises:
            RuntimeError: The device or an operation has no graphs, or its memory is exhausted.
        """
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy."""
        ...

    def wait(self) -> None:
        """Until all that was queued is done."""
        ...


class TorchCuda:
    """``CudaApi`` by torch: a stream of high priority, a memory pool of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda: Any = torch.cuda  # hardly typed
        with torch.cuda.device(device):
            self._stream = cuda.Stream(device, priority=HIGH_PRIORITY)
            self._done = cuda.Event()
            self._pool = torch.cuda.graph_pool_handle()

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP_RUNS):
                    step()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread's allocation must not spoil the capture. Graphs share the
            # pool because they run one after another and hand nothing over through it.
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
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        self._done.record(self._stream)
        self._done.synchronize()
