"""The CUDA calls of the graph engine, behind an interface that tests implement without a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from policies.act.hardware import is_lost

WARM_UP_RUNS = 3
"""Runs before a capture, in which libraries choose kernels and allocate workspaces. A capture
cannot do either.
"""
HIGH_PRIORITY = -1

_failed_graphs: list[Any] = []
"""Graphs whose capture could not be ended. torch's allocators keep the allocation filter of such a
graph, so it must stay alive.
"""


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
            torch.OutOfMemoryError: The device lacks memory for it; smaller steps may fit.
            RuntimeError: The device or an operation does not support graphs.
        """
        ...

    def in_stream(self) -> AbstractContextManager[object]:
        """Return a context in which graphs and copies are enqueued."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy; ``source`` must not change before ``wait`` returned."""
        ...

    def wait(self) -> None:
        """Wait until all enqueued work is done."""
        ...

    def is_lost(self) -> bool:
        """Wait for all enqueued work, and return whether the device failed for good."""
        ...

    def close(self) -> None:
        """Give unused memory back to the device."""
        ...


class TorchCuda:
    """``CudaApi`` through torch, with a high-priority stream and its own memory pool.

    Args:
        device: A CUDA device.
        autotune: Let cuDNN time its algorithms for each convolution before a capture, and choose
            the fastest. Another process may then choose another one.
    """

    def __init__(self, device: torch.device, *, autotune: bool = True) -> None:
        self.device, self._autotune = device, autotune
        cuda: Any = torch.cuda  # hardly typed
        with torch.cuda.device(device):
            # Warming up takes seconds; another engine may serve meanwhile and goes first.
            self._warm_up_stream = cuda.Stream(device)
            self._stream = cuda.Stream(device, priority=HIGH_PRIORITY)
            self._done = cuda.Event()
            self._pool = cuda.graph_pool_handle()

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return ``torch.zeros`` on the device."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return ``torch.zeros`` in page-locked memory."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Capture ``step`` as a ``CUDAGraph`` and replay it once."""
        cuda: Any = torch.cuda
        with torch.cuda.device(self.device):
            try:
                self._warm_up(step)
                # A capture cannot take back what the warm-up left in torch's cache.
                _empty_cache()
                graph = cuda.CUDAGraph()
                with torch.cuda.stream(self._stream):
                    self._capture(graph, step)
            except RuntimeError:
                _empty_cache()
                raise
            with self.in_stream():
                graph.replay()
            self._stream.synchronize()
        replay: Callable[[], None] = graph.replay
        return replay

    def in_stream(self) -> AbstractContextManager[object]:
        """Make the high-priority stream the current one."""
        return torch.cuda.stream(self._stream)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue the copy on the current stream."""
        target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Record an event on the stream and wait for it."""
        self._done.record(self._stream)
        self._done.synchronize()

    def is_lost(self) -> bool:
        """As ``hardware.is_lost`` of the stream."""
        return is_lost(self._stream)

    def close(self) -> None:
        """Empty torch's cache of device memory, in which the graphs' pool is."""
        _empty_cache()

    def _warm_up(self, step: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self.device)
        self._warm_up_stream.wait_stream(current)
        with torch.cuda.stream(self._warm_up_stream), _autotuning(enabled=self._autotune):
            for _ in range(WARM_UP_RUNS):
                step()
        # Once on the stream of the capture: cuBLAS has a workspace for each stream.
        self._stream.wait_stream(self._warm_up_stream)
        with torch.cuda.stream(self._stream):
            step()
        self._stream.synchronize()

    def _capture(self, graph: Any, step: Callable[[], None]) -> None:
        """Capture ``step`` on the current stream. After a failure other captures still work.

        ``torch.cuda.graph`` is not used: where its end fails, it leaves the thread on the stream
        of the capture, and the allocator in the graph's pool.
        """
        try:
            # thread_local: another thread's allocation must not invalidate the capture. The graphs
            # can share the pool, because they run one after another and pass no data through it.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            step()
            graph.capture_end()
        except BaseException:
            self._end_failed_capture(graph)
            raise

    def _end_failed_capture(self, graph: Any) -> None:
        """End the capture for the stream, the allocators and the random generator."""
        cuda: Any = torch.cuda
        self._end_or_abandon(graph)
        # The generator still believes that it is captured, in some versions of torch, until another
        # capture ends.
        empty = cuda.CUDAGraph()
        with suppress(RuntimeError):
            empty.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an empty graph
            self._end_or_abandon(empty)

    def _end_or_abandon(self, graph: Any) -> None:
        cuda: Any = torch.cuda
        try:
            graph.capture_end()
        except RuntimeError:  # it is invalid, or never began; the stream's capture has ended
            _failed_graphs.append(graph)
            _end_allocations(self.device.index or 0, self._pool)
        else:
            graph.reset()
        self._pool = cuda.graph_pool_handle()


def _end_allocations(index: int, pool: Any) -> None:
    """Make the allocator of device ``index`` leave a failed graph's pool, and give it up."""
    api: Any = torch._C
    # The name changed with torch 2.8.
    end = getattr(api, "_cuda_endAllocateToPool", None) or getattr(
        api, "_cuda_endAllocateCurrentStreamToPool", None
    )
    for call in (end, getattr(api, "_cuda_releasePool", None)):
        if call is not None:
            with suppress(RuntimeError):
                call(index, pool)


def _empty_cache() -> None:
    """Give unused memory back, unless another thread captures or the device is lost."""
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


@contextmanager
def _autotuning(*, enabled: bool) -> Iterator[None]:
    """Let cuDNN time its algorithms meanwhile; it uses later what it has found."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
