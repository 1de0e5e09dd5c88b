"""The optional steps of the graph engine: exact, of few kernels, and nothing on another device."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from replay_tape import Tape, TapeCuda, cudnn_on_cpu, tensors_in
from test_policies_fused_model import EXACT, REFERENCES, SIZES, inputs, plain_actions
from tiny_act import TINY
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from policies.act import compiled_parts
from policies.act.compiled_parts import compile_transform, run_or_fall_back
from policies.act.config import ActConfig
from policies.act.cuda_graph import CudaGraphEngine
from policies.act.cudnn_blocks import use_cudnn_blocks
from policies.act.engine import (
    DEFAULT_GRAPH_OPTIONS,
    GRAPH_OPTIONS,
    EngineOptions,
    Frames,
)
from policies.act.engine_check import MAX_RELATIVE_ERROR, reference_actions, relative_error
from policies.act.fused_model import BLOCK_CHANNELS, space_to_depth
from policies.act.weight_fusion import fuse
from policies.checkpoint.load import load_weights
from policies.checkpoint.untrained import random_weights
from policies.errors import ContractMismatch

logger = logging.getLogger(__name__)

SWITCHES = ("fused_convolutions", "space_to_depth")
CHOICES = ((), *((name,) for name in SWITCHES), SWITCHES)


@pytest.fixture(autouse=True)
def _cudnn():
    with cudnn_on_cpu():
        yield


def network(weights, options, **arguments):
    fused = fuse(weights, space_to_depth="space_to_depth" in options, **arguments)
    if "fused_convolutions" in options:
        use_cudnn_blocks(fused)
    return fused


@pytest.mark.parametrize("case", SIZES)
def test_the_steps_together_are_the_plain_network(case):
    weights = random_weights(dataclasses.replace(TINY, **SIZES[case]))
    images, state = inputs(weights.config, 2)
    with torch.inference_mode():
        got = network(weights, SWITCHES)(images, state).numpy()
    want = plain_actions(weights, images, state)
    assert np.abs(got - want).max() / np.abs(want).max() <= EXACT


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_step_on_the_tape_is_the_plain_network(options, precision):
    """Memory is NaN wherever nothing was written, and Python decides nothing for a tick."""
    weights = random_weights(TINY)
    fused = fuse(weights, space_to_depth="space_to_depth" in options)
    reference = reference_actions(fuse(weights))
    chosen = frozenset(options)
    engine = CudaGraphEngine(fused, precision, TapeCuda(), options=chosen, sizes=(1, 2))
    error = relative_error(engine, TINY, reference)
    assert error <= MAX_RELATIVE_ERROR[precision]


@pytest.mark.needs_reference
@pytest.mark.usefixtures("full_width")
@pytest.mark.parametrize(("folder", "arguments"), REFERENCES)
def test_each_step_is_the_plain_network_on_reference_checkpoints(reference, folder, arguments):
    """In float32; and near it in bfloat16, which a CPU without units for it emulates."""
    weights = load_weights(str(reference / folder / "checkpoint"), **arguments)
    images, state = inputs(weights.config, 2)
    want = plain_actions(weights, images, state)
    scale = weights.action_normalizer.scale
    largest = np.abs((want - weights.action_normalizer.shift) / scale).max()
    for options in CHOICES:
        for dtype, limit in ((torch.float32, EXACT), (torch.bfloat16, 2e-2)):
            with torch.inference_mode():
                got = network(weights, options).set_dtype(dtype)(images, state).numpy()
            error = np.abs((got - want) / scale).max() / largest
            logger.info("%s, %s, %s: %.1e", folder, options, dtype, error)
            assert error <= limit


def test_a_block_of_pixels_is_where_the_convolution_looks_for_it():
    x = torch.arange(4 * 6 * 3.0).reshape(1, 4, 6, 3)
    blocks = space_to_depth(x, torch.float32)
    assert blocks.shape == (1, 2 + 3, 3 + 3, BLOCK_CHANNELS)
    assert blocks[0, 2, 2, :12].tolist() == x[0, 0:2, 0:2].flatten().tolist()
    assert blocks[0, 3, 4, :12].tolist() == x[0, 2:4, 4:6].flatten().tolist()
    assert blocks.sum() == x.sum(), "all else is zero"


def test_the_bias_of_a_skip_connection_moves_once():
    fused = fuse(random_weights(TINY))
    moved = [b for b in fused.backbones[0].blocks if b.downsample is not None]
    use_cudnn_blocks(fused)
    assert len(moved) == 3
    assert all(block.downsample.bias is None for block in moved)


FULL = ActConfig(state_dim=14, action_dim=14, chunk_size=100, n_cameras=1, image_hw=(480, 640))
"""ACT of 51.6 M parameters."""


def kernels(options, config=FULL):
    weights = random_weights(config)
    fused = network(weights, options).set_dtype(torch.bfloat16)
    images, state = inputs(config)
    with torch.inference_mode(), Tape() as tape:
        fused(images, state)
    return tape.kernels


def test_a_tick_is_few_kernels():
    """The steps that are compiled are not counted: on a CPU they are other ones."""
    without, together = kernels(()), kernels(SWITCHES)
    logger.info("kernels a tick: %d, with %s: %d", without, SWITCHES, together)
    assert without <= 130
    assert together <= 90


def test_the_tape_sees_what_a_graph_does_not_do():
    """What it is there for: a decision for each tick, memory that is read before it is written,
    and a wait for a number."""
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), Tape():
        float(x.sum())
    given, out = torch.ones(3), torch.zeros(3)
    calls = []

    def step():
        calls.append(1)
        unwritten = torch.empty(3)
        if len(calls) == 1:
            unwritten.copy_(given)
        out.copy_(unwritten * 2)

    with Tape() as tape:
        step()
    tape.replay()
    assert out.tolist() == [2.0] * 3, "written within the step: right"
    with Tape() as tape:
        step()
    tape.replay()
    assert out.isnan().all(), "a second call would not have written it"
    assert len(calls) == 2, "no Python of the step runs again"


class OneDevice(TorchDispatchMode):
    """Refuses tensors of another device, also those of no dimensions, which torch lets pass."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {tensor.device.type for tensor in tensors_in((args, kwargs))}
        assert devices <= {"cuda"}, f"{func} of tensors on {devices}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_a_tick_is_on_the_host(options, precision):
    config = dataclasses.replace(TINY, n_decoder_layers=2, n_cameras=2)
    fused = network(random_weights(config), options).set_dtype(precision)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.inference_mode():
        for module in fused.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        made = torch.empty_strided(
                            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
                        )
                        tensors[name] = (
                            torch.nn.Parameter(made, requires_grad=False)
                            if tensors is module._parameters
                            else made
                        )
        images = torch.empty((2, 2, *config.image_hw, 3), dtype=torch.uint8, device="cuda")
        state = torch.empty((2, config.state_dim), device="cuda")
        with OneDevice():
            actions = fused(images, state)
    assert actions.shape == (2, config.chunk_size, config.action_dim)
    assert (actions.device.type, actions.dtype) == ("cuda", torch.float32)


def test_the_network_is_one_graph():
    """No graph break, and no shape that depends on data."""
    fused = network(random_weights(TINY), ("space_to_depth",))
    images, state = inputs(TINY)
    exported = torch.export.export(fused, (images, state), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(exported.module()(images, state), fused(images, state))


# --- compiled ----------------------------------------------------------------------------------


def test_where_there_is_no_compiler_it_is_eager_and_says_so(monkeypatch, caplog):
    def compile_nothing(function, **options):
        assert options == {
            "mode": "max-autotune-no-cudagraphs",
            "dynamic": False,
            "fullgraph": True,
        }

        def fail(*_):
            raise RuntimeError(
                "InductorError: InvalidCxxCompiler: No working C++ compiler found\n."
            )

        return fail

    monkeypatch.setattr(compiled_parts.torch, "compile", compile_nothing)
    weights = random_weights(TINY)
    engine = CudaGraphEngine(fuse(weights), "fp32", TapeCuda(), options=frozenset({"compiled"}))
    said = [r.message for r in caplog.records if "not compiled, eager torch instead" in r.message]
    assert said == [
        "not compiled, eager torch instead: InductorError: InvalidCxxCompiler: No working C++ "
        "compiler found"
    ], "once, and not for every size"
    assert relative_error(engine, TINY, reference_actions(fuse(weights))) <= EXACT


def test_a_lack_of_memory_is_no_lack_of_a_compiler(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compiled_parts.torch, "compile", lambda *_, **__: no_memory)
    fused = fuse(random_weights(TINY))
    compile_transform(fused)
    images, state = inputs(TINY)
    with pytest.raises(torch.OutOfMemoryError):
        run_or_fall_back(fused, lambda: fused(images, state))
    assert compiled_parts.is_compiled(fused)


COMPILED = """
import numpy as np, torch
from test_policies_fused_model import inputs, plain_actions
from tiny_act import TINY
from policies.act.compiled_parts import compile_transform, is_compiled, run_or_fall_back
from policies.act.weight_fusion import fuse
from policies.checkpoint.load import load_weights
from policies.checkpoint.untrained import random_weights

weights = random_weights(TINY)
fused = fuse(weights)
compile_transform(fused)
for batch in (1, 2):
    images, state = inputs(weights.config, batch)
    with torch.inference_mode():
        got = run_or_fall_back(fused, lambda: fused(images, state)).numpy()
    assert is_compiled(fused)
    want = plain_actions(weights, images, state)
    print(np.abs(got - want).max() / np.abs(want).max())
"""


@pytest.mark.long
def test_compiled_it_is_the_plain_network(tmp_path):
    """In a process of its own, which the compiler leaves threads in."""
    paths = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[2])))
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED],
        env={**os.environ, **cache, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 2
    assert max(errors) <= EXACT


# --- the choice ----------------------------------------------------------------------------------


def test_what_no_gpu_has_shown_to_help_is_off():
    assert EngineOptions().chosen_graph_options == frozenset(DEFAULT_GRAPH_OPTIONS)
    assert not {"fused_convolutions", "compiled", "space_to_depth"} & set(DEFAULT_GRAPH_OPTIONS)
    assert EngineOptions(graph_options=()).chosen_graph_options == frozenset()


def test_an_unknown_step_is_refused_with_the_valid_ones():
    with pytest.raises(ContractMismatch, match=r"graph_options: got 'winograd', .*space_to_depth"):
        EngineOptions(graph_options=("autotune", "winograd"))
    assert len(set(GRAPH_OPTIONS)) == len(GRAPH_OPTIONS)


def test_places_of_a_batch_are_not_mistaken_for_each_other_unseen():
    weights = random_weights(TINY)
    reference = reference_actions(fuse(weights))
    assert np.abs(reference[0] - reference[1]).max() > 100 * EXACT * np.abs(reference).max()

    class Shuffled(CudaGraphEngine):
        def run(self, batch: list[Frames]):
            return super().run(batch)[::-1]

    engine = Shuffled(fuse(weights), "fp32", TapeCuda())
    assert relative_error(engine, TINY, reference) > 100 * EXACT
