"""``TorchCuda`` over a stub of ``torch.cuda`` that keeps the rules of captures and allocators."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch

from policies.act import cuda_api
from policies.act.cuda_api import WARM_UP_RUNS, TorchCuda

DEVICE = torch.device("cuda", 0)


class Stream:
    def __init__(self, name, priority=0):
        self.name, self.priority = name, priority
        self.error = None

    def wait_stream(self, other):
        pass

    def synchronize(self):
        if self.error is not None:
            raise self.error


class StubCuda:
    """One thread's current stream, the pools that the allocator serves, the random generator, and
    the captures.

    A capture that met a forbidden operation is invalid: its ``capture_end`` ends it on the stream,
    raises, and leaves the allocator in the graph's pool, as torch does.
    """

    def __init__(self):
        self.default = Stream("default")
        self.current = self.default
        self.pools, self.handed_out = [], 0
        self.capturing, self.invalid = None, False
        self.dead_filters, self.pools_in_use = [], []
        self.generator_is_captured = False
        self.log = []
        self.emptied = 0
        self.priorities = []
        stub = self

        class CUDAGraph:
            def __init__(self):
                self.captured = False

            def capture_begin(self, pool, capture_error_mode):
                assert stub.capturing is None
                assert capture_error_mode == "thread_local"
                assert stub.current is not stub.default
                stub.pools.append(pool)
                stub.pools_in_use.append(pool)
                self.pool = pool
                stub.generator_is_captured = True
                # The allocators keep a function of the graph.
                stub.dead_filters.append((pool, weakref.ref(self)))
                stub.capturing, stub.invalid = self, False

            def capture_end(self):
                if stub.capturing is not self:
                    raise RuntimeError("capture_end() called before capture_begin()")
                stub.capturing = None
                if stub.invalid:
                    raise RuntimeError("capture was invalidated: the end's own error")
                self.captured = True
                stub.generator_is_captured = False
                stub.end_pool(0, stub.pools[-1])

            def reset(self):
                self.captured = False
                stub.release_pool(0, self.pool)

            def __del__(self):
                if self.captured:
                    self.reset()

            def replay(self):
                assert self.captured
                stub.log.append(("replay", stub.current.name))

        self.CUDAGraph = CUDAGraph

    def end_pool(self, device, pool):
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)
        self.dead_filters = [entry for entry in self.dead_filters if entry[0] != pool]

    def release_pool(self, device, pool):
        self.pools_in_use.remove(pool)

    def empty_cache(self):
        """torch's internal assertion: no capture is under way, and no filter's graph is gone."""
        if self.pools:
            raise RuntimeError("INTERNAL ASSERT FAILED captures_underway.empty()")
        for _, graph in self.dead_filters:
            assert graph() is not None, "a filter of a graph that is gone"
        self.emptied += 1

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def forbidden(self):
        """What synchronizes is refused in a capture, and makes it invalid."""
        if self.capturing:
            self.invalid = True
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture(params=["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"])
def cuda(monkeypatch, request):
    """With either name that torch has given the end of a pool."""
    stub = StubCuda()

    def make_stream(device, priority=0):
        stub.priorities.append(priority)
        return Stream("capture" if priority else "warm up", priority)

    def handle():
        stub.handed_out += 1
        return stub.handed_out

    for name, value in {
        "device": lambda device: contextlib.nullcontext(),
        "Stream": make_stream,
        "Event": lambda: None,
        "CUDAGraph": stub.CUDAGraph,
        "graph_pool_handle": handle,
        "stream": stub.stream,
        "current_stream": lambda device: stub.current,
        "empty_cache": stub.empty_cache,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool", raising=False)
    monkeypatch.setattr(torch._C, request.param, stub.end_pool, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", stub.release_pool, raising=False)
    monkeypatch.setattr(cuda_api, "_failed_graphs", [])
    return stub


def test_a_capture_is_warmed_up_at_normal_priority_and_captured_at_high(cuda):
    """A model that is loaded while another one serves must not delay it."""
    api = TorchCuda(DEVICE)
    ran_on = []
    replay = api.capture(lambda: ran_on.append((cuda.current.name, cuda.capturing is not None)))
    assert ran_on == [("warm up", False)] * WARM_UP_RUNS + [("capture", False), ("capture", True)]
    assert sorted(cuda.priorities) == [cuda_api.HIGH_PRIORITY, 0]
    with api.in_stream():
        replay()
    assert cuda.log == [("replay", "capture")] * 2
    assert cuda.current is cuda.default


@pytest.mark.parametrize("autotune", [True, False])
def test_algorithms_are_timed_in_the_warm_up_only(cuda, autotune):
    assert torch.backends.cudnn.benchmark is False
    seen = []
    TorchCuda(DEVICE, autotune=autotune).capture(
        lambda: seen.append(torch.backends.cudnn.benchmark)
    )
    assert seen == [autotune] * WARM_UP_RUNS + [False, False]
    assert torch.backends.cudnn.benchmark is False


@pytest.mark.parametrize(
    "failure",
    ["a forbidden operation", "an error of the step's own", "an interrupt"],
)
def test_after_a_failed_capture_the_process_is_as_before(cuda, failure):
    def step():
        if cuda.capturing is None:
            return
        if failure == "a forbidden operation":
            cuda.forbidden()
        raise KeyboardInterrupt if failure == "an interrupt" else ValueError("the step's own")

    api = TorchCuda(DEVICE)
    kind, words = {
        "a forbidden operation": (RuntimeError, "not permitted when stream is capturing"),
        "an error of the step's own": (ValueError, "the step's own"),
        "an interrupt": (KeyboardInterrupt, None),
    }[failure]
    with pytest.raises(kind, match=words) as caught:
        api.capture(step)
    assert "the end's own error" not in str(caught.value), "the first error is the one to tell"
    del caught
    gc.collect()
    assert cuda.current is cuda.default
    assert cuda.capturing is None
    assert cuda.pools == []
    assert cuda.pools_in_use == [], "memory that is never given back"
    assert not cuda.generator_is_captured, "random numbers"
    assert len(cuda_api._failed_graphs) == (failure == "a forbidden operation")
    emptied = cuda.emptied
    api.close()
    assert cuda.emptied == emptied + 1
    for again in (api, TorchCuda(DEVICE)):
        again.capture(lambda: None)
    assert cuda.log == [("replay", "capture")] * 2


def test_a_capture_that_cannot_begin_leaves_the_allocator_alone(cuda, monkeypatch):
    begin = cuda.CUDAGraph.capture_begin

    def fail(self, pool, capture_error_mode):
        begin(self, pool, capture_error_mode)
        cuda.capturing = None
        raise RuntimeError("cudaStreamBeginCapture failed")

    api = TorchCuda(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(cuda.CUDAGraph, "capture_begin", fail)
        with pytest.raises(RuntimeError, match="cudaStreamBeginCapture failed"):
            api.capture(lambda: None)
    assert cuda.pools == []
    assert cuda.pools_in_use == []
    api.capture(lambda: None)


def test_what_did_not_fit_is_given_back(cuda):
    """The next smaller size needs it."""

    def step():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        TorchCuda(DEVICE).capture(step)
    assert cuda.emptied == 1


@pytest.mark.parametrize("lost", [False, True])
def test_a_lost_device_repeats_its_error(cuda, lost):
    api = TorchCuda(DEVICE)
    if lost:
        api._stream.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert api.is_lost() is lost


def test_an_error_about_a_capture_is_no_lost_device(cuda):
    api = TorchCuda(DEVICE)
    api._stream.error = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    assert not api.is_lost()


def test_memory_is_free_before_a_capture(cuda):
    """A capture cannot take it from torch's cache."""
    emptied = []
    TorchCuda(DEVICE).capture(lambda: emptied.append(cuda.emptied))
    assert emptied == [0] * (WARM_UP_RUNS + 1) + [1]
