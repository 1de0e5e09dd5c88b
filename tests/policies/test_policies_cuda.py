"""The graph engine: its logic on a fake device, and on a real one where there is one."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from test_policies_fused_model import inputs, plain_actions
from tiny_act import TINY

from policies.act import cuda_api, hardware
from policies.act.cuda_graph import SIZES, CudaGraphEngine
from policies.act.engine import EngineOptions, EngineUnavailable, Frames
from policies.act.engine_check import MAX_RELATIVE_ERROR
from policies.act.engine_selection import make_engine
from policies.act.policy import ActPolicy
from policies.act.weight_fusion import fuse
from policies.checkpoint.untrained import random_weights
from policies.errors import ContractMismatch, InferenceError

CUDA = torch.device("cuda", 0)


class FakeCuda:
    """``CudaApi`` on the CPU. Queues like a stream: nothing happens before ``wait``.

    What it does not show: anything of a real capture (an allocation in a graph, an operation that
    has none), and that copies and graphs keep their order on a stream.
    """

    device = torch.device("cpu")

    def __init__(self, *, capture_error=None):
        self.capture_error = capture_error
        self.queue, self.copied, self.replayed = [], [], []
        self.captured = []
        self.allocated_after_capture = 0

    def buffer(self, shape, dtype):
        self.allocated_after_capture += bool(self.captured)
        return torch.zeros(shape, dtype=dtype)

    pinned = buffer

    def capture(self, step):
        if self.capture_error is not None:
            raise self.capture_error
        step()
        size = step.args[0]
        self.captured.append(size)

        def replay():
            self.queue.append(step)
            self.replayed.append(size)

        return replay

    def copy(self, target, source):
        self.copied.append((source.data_ptr(), source.numel()))
        self.queue.append(lambda: target.copy_(source))

    def wait(self):
        for work in self.queue:
            work()
        self.queue.clear()


@pytest.fixture(scope="module")
def weights():
    """Not to be changed."""
    return random_weights(TINY)


@pytest.fixture
def api():
    return FakeCuda()


@pytest.fixture
def engine(weights, api):
    return CudaGraphEngine(fuse(weights), "fp32", api)


def test_with_a_backbone_for_each_camera_a_graph_computes_the_plain_network():
    weights = random_weights(dataclasses.replace(TINY, backbone_per_camera=True))
    engine = CudaGraphEngine(fuse(weights), "fp32", FakeCuda())
    got, want = engine.run([frames(seed) for seed in range(3)]), expected(weights, 0, 1, 2)
    assert np.abs(got - want).max() / np.abs(want).max() <= MAX_RELATIVE_ERROR["fp32"]


def frames(seed: int = 0) -> Frames:
    images, state = inputs(TINY, seed=seed)
    return Frames(list(images[0].numpy()), state[0].numpy())


def expected(weights, *seeds):
    return np.stack([plain_actions(weights, *inputs(TINY, seed=seed))[0] for seed in seeds])


def test_all_sizes_are_captured_before_anybody_is_served(engine, api):
    assert sorted(api.captured) == list(engine.sizes) == list(SIZES) == [1, 2, 4, 8]
    api.copied.clear()
    engine.run([frames()])
    assert api.allocated_after_capture == 0


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_a_batch_runs_as_the_next_larger_graph(engine, api, weights, count, size):
    seeds = range(count)
    got = engine.run([frames(seed) for seed in seeds])
    assert api.replayed == [size]
    assert got.shape == (count, TINY.chunk_size, TINY.action_dim)
    np.testing.assert_allclose(got, expected(weights, *seeds), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 9])
def test_other_batches_are_refused(engine, count):
    with pytest.raises(ValueError, match=f"batch: got {count} observations, expected 1 to 8"):
        engine.run([frames()] * count)


def test_what_was_staged_is_copied_once_and_as_one(engine, api, weights):
    given, own = frames(seed=3), engine.staging(0)
    for mine, image in zip(own.images, given.images, strict=True):
        mine[:] = image
    own.state[:] = given.state
    got = engine.run([own])
    assert api.copied == [(own.images[0].ctypes.data, sum(image.size for image in own.images))]
    np.testing.assert_allclose(got, expected(weights, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("operation not permitted when stream is capturing"),
    ],
)
def test_a_capture_that_fails_is_told_with_its_reason(weights, error):
    with pytest.raises(EngineUnavailable, match=f"cuda graph on cpu: {error}"):
        CudaGraphEngine(fuse(weights), "fp32", FakeCuda(capture_error=error))


def test_a_device_that_fails_while_running_is_an_inference_error(engine, api, monkeypatch):
    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(api, "wait", fail)
    with pytest.raises(InferenceError, match=r"cuda-graph, torch .* on cpu: an illegal memory"):
        engine.run([frames()])


def overflowing(weights):
    """The same, with a feature that fp16 has no number for."""
    tensors = dict(weights.tensors)
    name = "backbone.layer4.1.bn2.bias"
    tensors[name] = torch.full_like(tensors[name], 1e5)
    return dataclasses.replace(weights, tensors=tensors)


def test_fp16_that_overflows_is_an_error_and_never_an_action(weights):
    engine = CudaGraphEngine(fuse(overflowing(weights)), "fp16", FakeCuda())
    with pytest.raises(InferenceError, match=r"fp16 overflowed .* --precision bf16 or fp32"):
        engine.run([frames()])
    fine = CudaGraphEngine(fuse(overflowing(weights)), "bf16", FakeCuda())
    assert np.isfinite(fine.run([frames()])).all()


def test_fp16_is_near_where_pictures_are_made_small(weights):
    fused = fuse(weights, pixel_unit=2**-6)
    got = CudaGraphEngine(fused, "fp16", FakeCuda()).run([frames()])
    want = expected(weights, 0)
    assert np.abs(got - want).max() / np.abs(want).max() <= MAX_RELATIVE_ERROR["fp16"]


# --- the choice, on a machine that seems to have a GPU -------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """torch says that there is one; our device is the fake."""

    def has(fake):
        monkeypatch.setattr(hardware, "choose_device", lambda name: CUDA)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        monkeypatch.setattr(hardware, "set_deterministic", lambda *_: None)
        monkeypatch.setattr(cuda_api, "TorchCuda", lambda device: fake)
        # Eager torch is on the CPU as well.
        from policies.act import engine_factory

        make_torch = engine_factory.make_torch
        monkeypatch.setitem(
            engine_factory.ENGINE_FACTORIES,
            "torch",
            lambda w, d, p, t: make_torch(w, torch.device("cpu"), p, t),
        )
        return fake

    return has


def test_a_gpu_runs_graphs_in_bf16_and_says_the_error(gpu, weights, caplog):
    caplog.set_level(logging.INFO)
    gpu(FakeCuda())
    engine = make_engine(weights, EngineOptions(device="cuda", threads=1))
    assert (engine.name.split(",")[0], engine.precision) == ("cuda-graph", "bf16")
    assert "inference by cuda-graph" in caplog.text
    assert "bf16, error against float32 torch" in caplog.text


def test_without_graphs_it_is_eager_and_says_why(gpu, weights, caplog):
    gpu(FakeCuda(capture_error=torch.OutOfMemoryError("CUDA out of memory")))
    engine = make_engine(weights, EngineOptions(device="cuda", threads=1))
    assert engine.name.startswith("torch")
    assert (
        "engine skipped: cuda-graph in bf16: cuda graph on cpu: CUDA out of memory" in caplog.text
    )
    options = EngineOptions(device="cuda", engine="cuda-graph", threads=1)
    with pytest.raises(ContractMismatch, match=r"engine: got 'cuda-graph', .*out of memory"):
        make_engine(weights, options)


def test_openvino_is_no_engine_of_a_gpu(gpu, weights):
    gpu(FakeCuda())
    with pytest.raises(ContractMismatch, match=r"engine: got 'openvino', .*'cuda-graph', 'torch'"):
        make_engine(weights, EngineOptions(device="cuda", engine="openvino"))


def test_fp16_that_overflows_on_the_probe_is_refused_at_the_start(gpu, weights):
    gpu(FakeCuda())
    options = EngineOptions(device="cuda", engine="cuda-graph", precision="fp16", threads=1)
    assert make_engine(weights, options).precision == "fp16"
    with pytest.raises(ContractMismatch, match=r"engine: got 'cuda-graph', .*fp16: NaN or infin"):
        make_engine(overflowing(weights), options)


def test_a_policy_batches_through_it(gpu, weights):
    api = gpu(FakeCuda())
    policy = ActPolicy(weights, device="cuda", precision="fp32")
    assert policy.batch_sizes == SIZES
    assert policy.info.engine.startswith("cuda-graph")
    from policies.types import MetaObs

    observations = [
        MetaObs(
            dict(zip(policy.contract.camera_names, frames(seed).images, strict=True)),
            frames(seed).state,
        )
        for seed in range(11)
    ]
    api.replayed.clear()
    together = policy.infer_batch(observations)
    assert api.replayed == [8, 4]
    for obs, answer in zip(observations, together, strict=True):
        np.testing.assert_allclose(answer.actions, policy.infer(obs).actions, rtol=1e-4, atol=1e-5)
    policy.close()


# --- on a real one -----------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_real_graphs_compute_the_plain_network(weights, precision):
    options = EngineOptions(device="cuda", engine="cuda-graph", precision=precision)
    engine = make_engine(weights, options)
    try:
        for count in (1, 3, 8):
            got = engine.run([frames(seed) for seed in range(count)])
            want = expected(weights, *range(count))
            assert np.abs(got - want).max() / np.abs(want).max() <= MAX_RELATIVE_ERROR[precision]
    finally:
        engine.close()


@needs_gpu
def test_real_graphs_repeat_their_bits(weights):
    options = EngineOptions(device="cuda", engine="cuda-graph", precision="bf16")
    engine = make_engine(weights, options)
    given = frames(seed=5)
    first = engine.run([given]).copy()
    assert engine.run([given]).tobytes() == first.tobytes()
    engine.close()


@needs_gpu
def test_a_real_overflow_is_refused(weights):
    options = EngineOptions(device="cuda", engine="cuda-graph", precision="fp16")
    with pytest.raises(ContractMismatch, match="NaN or infinity"):
        make_engine(overflowing(weights), options)
