"""The graph engine: recorded and run again on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref

import numpy as np
import pytest
import torch
from replay_tape import TapeCuda
from test_policies_fused_model import inputs, plain_actions
from tiny_act import TINY, needs_gpu

from policies.act import cuda_api, engine_factory, hardware
from policies.act.compiled_parts import is_compiled
from policies.act.cuda_graph import SIZES, CudaGraphEngine
from policies.act.engine import EngineOptions, EngineUnavailable, Frames
from policies.act.engine_check import MAX_RELATIVE_ERROR
from policies.act.engine_selection import make_engine
from policies.act.fused_model import FusedAct
from policies.act.policy import ActPolicy
from policies.act.torch_engine import TorchEngine
from policies.act.weight_fusion import fuse
from policies.checkpoint.untrained import random_weights
from policies.errors import ContractMismatch, DeviceLost, InferenceError

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def weights():
    """Not to be changed."""
    return random_weights(TINY)


@pytest.fixture
def api():
    return TapeCuda()


@pytest.fixture
def engine(weights, api):
    return CudaGraphEngine(fuse(weights), "fp32", api)


def test_with_a_backbone_for_each_camera_a_graph_computes_the_plain_network():
    weights = random_weights(dataclasses.replace(TINY, backbone_per_camera=True))
    engine = CudaGraphEngine(fuse(weights), "fp32", TapeCuda())
    got, want = engine.run([frames(seed) for seed in range(3)]), expected(weights, 0, 1, 2)
    assert np.abs(got - want).max() / np.abs(want).max() <= MAX_RELATIVE_ERROR["fp32"]


def frames(seed: int = 0) -> Frames:
    images, state = inputs(TINY, seed=seed)
    return Frames(list(images[0].numpy()), state[0].numpy())


def expected(weights, *seeds):
    return np.stack([plain_actions(weights, *inputs(TINY, seed=seed))[0] for seed in seeds])


def test_all_sizes_are_captured_before_anybody_is_served(engine, api):
    assert sorted(api.tapes) == list(engine.sizes) == list(SIZES) == [1, 2, 4, 8]
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


@pytest.mark.parametrize(
    "full",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
)
def test_a_size_that_does_not_fit_costs_that_size_only(weights, caplog, full):
    """A batch of 8 is then two graphs of 4. cuDNN has other words for a lack of memory."""
    api = TapeCuda(capture_errors={8: full})
    engine = CudaGraphEngine(fuse(weights), "fp32", api)
    assert engine.sizes == (1, 2, 4)
    assert f"no graph for batches of 8: {full}" in caplog.text
    seeds = range(7)
    staged = []
    for seed in seeds:
        own, given = engine.staging(seed), frames(seed)
        for mine, image in zip(own.images, given.images, strict=True):
            mine[:] = image
        staged.append(Frames(own.images, given.state))
    for batch in (staged, [frames(seed) for seed in seeds]):
        api.replayed.clear()
        got = engine.run(batch)
        assert api.replayed == [4, 4]
        np.testing.assert_allclose(got, expected(weights, *seeds), rtol=1e-5, atol=1e-6)


def test_registered_pictures_are_copied_from_where_they_are(weights, api):
    """Not by way of pinned memory; and others as before."""

    class Registry:
        def __init__(self):
            self.covered = []

        def covers(self, image):
            return any(image is given for given in self.covered)

    registry = Registry()
    engine = CudaGraphEngine(fuse(weights), "fp32", api, registered_memory=registry)
    given = frames(seed=4)
    for image in given.images:
        image.flags.writeable = False  # as a client's segment is
    registry.covered = [given.images[1]]
    got = engine.run([given])
    (first, _), second = api.copied
    assert first == engine.staging(0).images[0].ctypes.data
    assert second == (given.images[1].ctypes.data, given.images[1].size)
    np.testing.assert_allclose(got, expected(weights, 4), rtol=1e-5, atol=1e-6)


def test_a_batch_enters_the_stream_once(engine, api):
    api.entered = 0
    engine.run([frames(seed) for seed in range(5)])
    assert api.entered == 1


def test_a_closed_engine_keeps_no_memory(weights, api):
    engine = CudaGraphEngine(fuse(weights), "fp32", api)
    parts = [weakref.ref(engine._fused), *map(weakref.ref, api.tapes.values())]
    held = [weakref.ref(engine._images), weakref.ref(engine._host_images)]
    api.tapes.clear()
    engine.close()
    engine.close()
    gc.collect()
    assert api.closed
    assert not [ref() for ref in (*parts, *held) if ref() is not None]
    with pytest.raises(InferenceError, match="it is closed"):
        engine.run([frames()])


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
        CudaGraphEngine(fuse(weights), "fp32", TapeCuda(capture_errors={None: error}))


def test_a_device_that_fails_while_running_is_an_inference_error(engine, api, monkeypatch):
    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(api, "wait", fail)
    with pytest.raises(
        InferenceError, match=r"cuda-graph, torch .* on cpu: an illegal memory"
    ) as e:
        engine.run([frames()])
    assert not isinstance(e.value, DeviceLost)
    assert not api.queue, "copies that were not waited for still read the caller's images"
    api.lost = True
    with pytest.raises(DeviceLost, match="an illegal memory"):
        engine.run([frames()])


def overflowing(weights):
    """The same, with a feature that fp16 has no number for."""
    tensors = dict(weights.tensors)
    name = "backbone.layer4.1.bn2.bias"
    tensors[name] = torch.full_like(tensors[name], 1e5)
    return dataclasses.replace(weights, tensors=tensors)


def test_fp16_that_overflows_is_an_error_and_never_an_action(weights):
    engine = CudaGraphEngine(fuse(overflowing(weights)), "fp16", TapeCuda())
    with pytest.raises(InferenceError, match=r"fp16 overflowed .* --precision bf16 or fp32"):
        engine.run([frames()])
    fine = CudaGraphEngine(fuse(overflowing(weights)), "bf16", TapeCuda())
    assert np.isfinite(fine.run([frames()])).all()


def test_fp16_is_near_where_pictures_are_made_small(weights):
    fused = fuse(weights, pixel_unit=2**-6)
    got = CudaGraphEngine(fused, "fp16", TapeCuda()).run([frames()])
    want = expected(weights, 0)
    assert np.abs(got - want).max() / np.abs(want).max() <= MAX_RELATIVE_ERROR["fp16"]


# --- the choice, on a machine that seems to have a GPU -------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """torch says that there is one; our device is the fake."""

    def has(fake):
        monkeypatch.setattr(hardware, "choose_device", lambda name: CUDA)
        monkeypatch.setattr(hardware, "precisions", lambda device: ("fp32", "bf16", "fp16"))
        monkeypatch.setattr(hardware, "configure_cuda", lambda *_, **__: None)
        monkeypatch.setattr(cuda_api, "TorchCuda", lambda device, **_: fake)
        # Eager torch is on the CPU as well.
        make_torch = engine_factory.make_torch
        monkeypatch.setitem(
            engine_factory.ENGINE_FACTORIES,
            "torch",
            lambda w, d, p, t, o: make_torch(w, torch.device("cpu"), p, t),
        )
        return fake

    return has


def test_a_gpu_runs_graphs_in_bf16_and_says_the_error(gpu, weights, caplog):
    caplog.set_level(logging.INFO)
    gpu(TapeCuda())
    engine = make_engine(weights, EngineOptions(device="cuda", threads=1))
    assert (engine.name.split(",")[0], engine.precision) == ("cuda-graph", "bf16")
    assert "inference by cuda-graph" in caplog.text
    assert "bf16, error against float32 torch" in caplog.text


def test_without_graphs_it_is_eager_and_says_why(gpu, weights, caplog):
    gpu(TapeCuda(capture_errors={None: torch.OutOfMemoryError("CUDA out of memory")}))
    engine = make_engine(weights, EngineOptions(device="cuda", threads=1))
    assert engine.name.startswith("torch")
    assert (
        "engine skipped: cuda-graph in bf16: cuda graph on cpu: CUDA out of memory" in caplog.text
    )
    options = EngineOptions(device="cuda", engine="cuda-graph", threads=1)
    with pytest.raises(ContractMismatch, match=r"engine: got 'cuda-graph', .*out of memory"):
        make_engine(weights, options)


def test_a_gpu_without_memory_leaves_the_cpu_to_auto(gpu, weights, caplog, monkeypatch):
    """Nothing fits the GPU; a device that was asked for by name is not replaced."""
    full = torch.OutOfMemoryError("CUDA out of memory")
    gpu(TapeCuda(capture_errors={None: full}))
    to = FusedAct.to
    monkeypatch.setitem(engine_factory.ENGINE_FACTORIES, "torch", engine_factory.make_torch)

    def no_room(self, *arguments, **keywords):
        if CUDA in arguments:
            raise full
        return to(self, *arguments, **keywords)

    monkeypatch.setattr(FusedAct, "to", no_room)
    monkeypatch.setattr(TorchEngine, "_is_lost", lambda self: False)
    options = EngineOptions(precision="fp32", threads=1)
    engine = make_engine(weights, options)
    assert engine.device == "cpu"
    assert "engine skipped: torch in fp32: torch" in caplog.text
    with pytest.raises(ContractMismatch, match=r"out of memory.* on cuda:0: CUDA out of memory"):
        make_engine(weights, dataclasses.replace(options, device="cuda"))


def test_eager_torch_tells_a_lost_device_from_a_failed_request(weights, monkeypatch):
    engine = TorchEngine(fuse(weights), torch.device("cpu"), "fp32", 1)

    def fail(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(engine, "_fused", fail)
    for lost, kind in ((False, InferenceError), (True, DeviceLost)):
        monkeypatch.setattr(engine, "_is_lost", lambda lost=lost: lost)
        with pytest.raises(InferenceError, match="an illegal memory access") as caught:
            engine.run([frames()])
        assert type(caught.value) is kind


@pytest.mark.parametrize("when", ["captured", "probed"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_device_that_is_lost_while_an_engine_is_made_is_told(gpu, weights, when, precision):
    """And no other engine is tried: the process has to end. Closing one could hang."""
    error = RuntimeError("an illegal memory access")
    api = gpu(TapeCuda(capture_errors={8: error} if when == "captured" else {}))
    api.lost = True

    def fail():
        raise error

    if when == "probed":
        api.wait = fail
    with pytest.raises(DeviceLost, match="an illegal memory access"):
        make_engine(weights, EngineOptions("auto", "auto", precision, 1))
    assert not api.closed


def test_an_engine_whose_probe_fails_is_closed(gpu, weights, monkeypatch):
    """Else its memory is missing for the next one that is tried."""
    api = gpu(TapeCuda())

    def fail():
        raise RuntimeError("an illegal instruction")

    monkeypatch.setattr(api, "wait", fail)
    with pytest.raises(ContractMismatch, match="an illegal instruction"):
        make_engine(weights, EngineOptions("cuda", "cuda-graph", "bf16", 1))
    assert api.closed


@pytest.mark.parametrize(
    ("graph_options", "expected_steps"),
    [
        (None, {"autotune", "direct_upload", "pinned_attention"}),
        ((), set()),
        (("direct_upload",), {"direct_upload"}),
    ],
)
def test_each_step_of_the_engine_can_be_left_out(
    gpu, weights, monkeypatch, graph_options, expected_steps
):
    asked = {}
    gpu(TapeCuda())
    monkeypatch.setattr(
        cuda_api, "TorchCuda", lambda device, **given: asked.update(given) or TapeCuda()
    )
    monkeypatch.setattr(hardware, "configure_cuda", lambda *_, **given: asked.update(given))
    options = EngineOptions("cuda", "cuda-graph", "bf16", 1, graph_options)
    engine = make_engine(weights, options)
    asked["direct_upload"] = engine.registered_memory is not None
    assert asked == {
        name: name in expected_steps for name in ("autotune", "direct_upload", "pinned_attention")
    }


def test_openvino_is_no_engine_of_a_gpu(gpu, weights):
    gpu(TapeCuda())
    with pytest.raises(ContractMismatch, match=r"engine: got 'openvino', .*'cuda-graph', 'torch'"):
        make_engine(weights, EngineOptions(device="cuda", engine="openvino"))


def test_fp16_that_overflows_on_the_probe_is_refused_at_the_start(gpu, weights):
    gpu(TapeCuda())
    options = EngineOptions(device="cuda", engine="cuda-graph", precision="fp16", threads=1)
    assert make_engine(weights, options).precision == "fp16"
    with pytest.raises(ContractMismatch, match=r"engine: got 'cuda-graph', .*fp16: NaN or infin"):
        make_engine(overflowing(weights), options)


def test_a_policy_batches_through_it(gpu, weights):
    api = gpu(TapeCuda())
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


@needs_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["fused_convolutions", "space_to_depth", "compiled"])
def test_real_graphs_with_each_step_compute_the_plain_network(weights, name):
    """Memory is NaN before: an operation that reads its own output times zero gives NaN."""
    poison = torch.full((2**28,), float("nan"), device="cuda")
    del poison
    options = EngineOptions(
        device="cuda", engine="cuda-graph", precision="bf16", graph_options=(name,)
    )
    engine = make_engine(weights, options)
    assert is_compiled(engine._fused) is (name == "compiled")
    first = engine.run([frames()]).copy()
    for count in (1, 3, 8):
        got = engine.run([frames(seed) for seed in range(count)])
        want = expected(weights, *range(count))
        assert np.abs(got - want).max() / np.abs(want).max() <= MAX_RELATIVE_ERROR["bf16"]
    assert engine.run([frames()]).tobytes() == first.tobytes()
    engine.close()


@needs_gpu
def test_after_a_real_failed_capture_others_work():
    api = cuda_api.TorchCuda(CUDA)
    x = api.buffer((8,), torch.float32)

    def step():
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()
        x.add_(1)

    with pytest.raises(RuntimeError, match="captur"):
        api.capture(step)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    assert torch.rand(1, device="cuda").item() < 1
    for again in (api, cuda_api.TorchCuda(CUDA)):
        replay = again.capture(lambda: x.add_(1) and None)
        with again.in_stream():
            replay()
        again.wait()
