"""The compiled engine is the network, from the compiler or from the cache; every way back works."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_policies_fused_model import EXACT, inputs, plain_actions
from tiny_act import TINY, needs_openvino, observation

from policies.act import engine_cache, engine_factory, hardware
from policies.act.config import ActConfig
from policies.act.engine import MAX_BATCH, EngineOptions, EngineUnavailable, Frames
from policies.act.engine_cache import BlobCache, Stored
from policies.act.engine_check import MAX_RELATIVE_ERROR, probe
from policies.act.engine_selection import make_engine
from policies.act.policy import ActPolicy
from policies.checkpoint.load import load_policy, load_weights
from policies.checkpoint.untrained import random_weights
from policies.errors import CheckpointError, ContractMismatch, InferenceError, ObservationError
from policies.types import ActionChunk

OPENVINO = EngineOptions(device="cpu", engine="openvino", precision="fp32", threads=1)
TORCH = dataclasses.replace(OPENVINO, engine="torch")


EVERYTHING = dataclasses.replace(
    TINY,
    n_cameras=3,
    image_hw=(70, 45),
    width=48,
    n_heads=4,
    n_encoder_layers=2,
    n_decoder_layers=3,
    activation="gelu",
)
"""Whatever the small one has not."""
PER_CAMERA = dataclasses.replace(TINY, n_cameras=3, backbone_per_camera=True)


@pytest.fixture(scope="module")
def weights():
    """Of the small network; not to be changed."""
    return random_weights(TINY)


@pytest.fixture(scope="module")
def kept(weights, tmp_path_factory):
    """A cache with one engine, OPENVINO's for ``weights``."""
    folder = tmp_path_factory.mktemp("kept") / "engines"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METRONOME_CACHE", str(folder))
        make_engine(weights, OPENVINO)
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of the test's own, empty."""
    monkeypatch.setenv("METRONOME_CACHE", str(tmp_path / "engines"))
    return tmp_path / "engines"


@pytest.fixture
def started(kept, folder):
    """As after a first start with OPENVINO and ``weights``."""
    shutil.copytree(kept, folder)
    return folder


@pytest.fixture
def openvino_engine(weights, started):
    return make_engine(weights, OPENVINO)


def frames(config: ActConfig, seed: int = 0) -> Frames:
    images, state = inputs(config, seed=seed)
    return Frames(list(images[0].numpy()), state[0].numpy())


def error_of(engine, weights) -> float:
    """In the network's units, against the plain module."""
    images, state = inputs(weights.config)
    normalizer = weights.action_normalizer
    plain = plain_actions(weights, images, state)[0]
    got = engine.run([Frames(list(images[0].numpy()), state[0].numpy())])[0]
    norm = np.abs((plain - normalizer.shift) / normalizer.scale).max()
    return float(np.abs((got - plain) / normalizer.scale).max() / norm)


# --- OpenVINO ----------------------------------------------------------------------------------


@needs_openvino
@pytest.mark.parametrize(
    "config", [TINY, EVERYTHING, PER_CAMERA], ids=["small", "everything", "a backbone per camera"]
)
def test_openvino_computes_the_plain_network(config):
    weights = random_weights(config)
    engine = make_engine(weights, OPENVINO)
    assert engine.name.startswith("openvino 20")
    assert (engine.device, engine.precision, engine.threads) == ("cpu", "fp32", 1)
    assert error_of(engine, weights) <= EXACT


@needs_openvino
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("image_hw", [(64, 96), (64, 128)])
def test_openvino_with_as_many_tokens_as_heads(precision: str, image_hw: tuple[int, int]) -> None:
    """Eight tokens, and ten for comparison: OpenVINO once took heads for tokens."""
    if precision not in hardware.precisions(torch.device("cpu")):
        pytest.skip(f"this processor has no units for {precision}")
    config = dataclasses.replace(TINY, n_cameras=1, image_hw=image_hw, width=64, n_heads=8)
    weights = random_weights(config)
    for name in ("in_proj_weight", "out_proj.weight"):  # what is attended to must matter
        weights.tensors[f"encoder.0.self_attn.{name}"] *= 10
    engine = make_engine(weights, dataclasses.replace(OPENVINO, precision=precision))
    assert error_of(engine, weights) <= MAX_RELATIVE_ERROR[precision]


@needs_openvino
@pytest.mark.parametrize("backbone_per_camera", [False, True])
def test_openvino_normalizes_each_camera_and_clips_actions(backbone_per_camera):
    from policies.normalizer import percentile

    weights = dataclasses.replace(
        random_weights(dataclasses.replace(TINY, backbone_per_camera=backbone_per_camera)),
        image_mean=((0.4, 0.5, 0.6), (0.0, 0.0, 0.0)),
        image_std=((0.2, 0.3, 0.1), (1.0, 1.0, 1.0)),
        action_normalizer=percentile([-0.01, -3.0], [0.01, 3.0]),
    )
    weights.tensors["action_head.bias"][:] = 2.0
    images, state = inputs(TINY)
    got = make_engine(weights, OPENVINO).run([frames(TINY)])[0]
    np.testing.assert_allclose(got, plain_actions(weights, images, state)[0], atol=1e-6)
    assert np.abs(got[:, 0]).max() == np.float32(0.01)


@needs_openvino
@pytest.mark.needs_reference
@pytest.mark.usefixtures("full_width")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("lerobot_act", {}),
        ("original_act",
         {"camera_names": ["top", "angle"], "n_heads": 8, "image_hw": (96, 128)}),
        ("ilstudio_act", {"image_hw": (96, 128)}),
        ("ilstudio_act", {"image_hw": (96, 128), "dataset_id": "other_robot"}),
    ],
)  # fmt: skip
def test_openvino_computes_the_reference_checkpoints(reference, name, arguments):
    weights = load_weights(str(reference / name / "checkpoint"), **arguments)
    assert error_of(make_engine(weights, OPENVINO), weights) <= EXACT


@needs_openvino
def test_the_compiled_graph_has_what_was_written_and_no_more(weights):
    from policies.act.openvino_graph import build_graph
    from policies.act.weight_fusion import fuse

    kinds = [node.get_type_name() for node in build_graph(fuse(weights)).get_ops()]
    layers = TINY.n_encoder_layers
    assert kinds.count("Convolution") == 20
    assert kinds.count("ScaledDotProductAttention") == layers + 1
    # image, state, head; four of an encoder layer, four of the decoder's.
    assert kinds.count("MatMul") == 3 + 4 * layers + 4
    assert kinds.count("Convert") == 1
    assert "ShapeOf" not in kinds


@needs_openvino
def test_pictures_are_read_where_they_lie_even_read_only_and_not_kept(openvino_engine):
    engine = openvino_engine
    given, own = frames(TINY, seed=1), engine.staging(0)
    for mine, image in zip(own.images, given.images, strict=True):
        mine[:] = image
        image.flags.writeable = False
    strided = Frames([np.asfortranarray(image) for image in given.images], given.state)
    expected = engine.run([Frames(own.images, given.state)]).copy()
    for mine in own.images:
        mine[:] = 0
    np.testing.assert_array_equal(engine.run([given]), expected)
    assert all(not mine.any() for mine in own.images)
    # What lies in the engine's own arrays counts again, and a given picture no more.
    assert not np.array_equal(engine.run([Frames(own.images, given.state)]), expected)
    np.testing.assert_array_equal(engine.run([strided]), expected)
    mixed = Frames([own.images[0], given.images[1]], given.state)
    np.testing.assert_array_equal(engine.run([mixed]), expected)


@needs_openvino
@pytest.mark.parametrize(
    ("threads", "cores", "sizes"), [(1, 4, (1, 2, 3, 4)), (2, 5, (1, 2)), (3, 2, (1,))]
)
def test_a_batch_is_as_large_as_there_are_cores(  # noqa: PLR0917
    weights, monkeypatch, threads, cores, sizes, tmp_path
):
    monkeypatch.setenv("METRONOME_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "_cores", lambda: set(map(str, range(cores))))
    options = EngineOptions("cpu", "openvino", "fp32", threads)
    engine = make_engine(weights, options)
    assert (engine.sizes, engine.threads) == (sizes, threads)
    batch = [frames(TINY, seed) for seed in range(len(sizes) + 1)]
    alone = np.stack([engine.run([one])[0].copy() for one in batch])
    np.testing.assert_array_equal(engine.run(batch), alone)
    # The cache knows one from the other.
    assert make_engine(weights, options).sizes == sizes
    engine.close()


@pytest.mark.parametrize("options", [TORCH, pytest.param(OPENVINO, marks=needs_openvino)])
def test_a_batch_is_its_observations_one_by_one(options, weights):
    engine = make_engine(weights, options)
    batch = [frames(TINY, seed) for seed in range(MAX_BATCH)]
    alone = np.stack([engine.run([one])[0].copy() for one in batch])
    np.testing.assert_array_equal(engine.run(batch), alone)
    for some in ([3], [5, 0], [1, 7, 2]):  # wherever it lies, whatever lies beside it
        np.testing.assert_array_equal(engine.run([batch[i] for i in some]), alone[some])
    assert engine.exact
    with pytest.raises(ValueError, match="slot: got 8, expected 0 to 7"):
        engine.staging(MAX_BATCH)
    engine.close()
    engine.close()


@needs_openvino
def test_what_openvino_says_while_running_is_an_inference_error(openvino_engine):
    engine = openvino_engine
    with pytest.raises(InferenceError, match=r"(?s)openvino 20.*: .*\(shape=\(1.3.3.3\)\) are inc"):
        engine.run([Frames([np.zeros((3, 3, 3), np.uint8)] * 2, np.zeros(3, np.float32))])
    assert np.isfinite(engine.run([frames(TINY)])).all()


@needs_openvino
def test_telemetry_is_not_imported():
    """openvino reports its import over the network, and leaves a thread that does it."""
    code = (
        "import sys, threading; from policies.act.openvino_import import ov; "
        "print('openvino_telemetry' in sys.modules, threading.active_count())"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert output.stdout.split() == ["False", "1"]


def test_loading_does_not_load_torchs_compiler(whole):
    """It is two seconds of a start, and easily loaded by accident."""
    code = (
        "import sys; from policies.checkpoint.load import load_policy; "
        f"load_policy({str(whole)!r}, threads=1); print('torch._dynamo' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert output.stdout.split() == ["False"]


# --- kept between starts -----------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch):
    """How often the compiler was asked."""
    from policies.act import openvino_engine

    calls = []
    compile_fused = openvino_engine.compile_fused

    def counted(*arguments):
        calls.append(arguments)
        return compile_fused(*arguments)

    monkeypatch.setattr(openvino_engine, "compile_fused", counted)
    return calls


@needs_openvino
def test_the_second_start_compiles_nothing_and_says_the_same_bits(compilations, folder, weights):
    first = make_engine(weights, OPENVINO).run([frames(TINY)]).copy()
    second = make_engine(weights, OPENVINO).run([frames(TINY)])
    assert len(compilations) == 1
    assert first.tobytes() == second.tobytes()
    assert len(list(folder.glob("*.engine"))) == 1
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.tensors["action_head.bias"].add_(1) is None or w,
        lambda w: dataclasses.replace(w, image_mean=((0.0, 0.0, 0.0),) * 2),
        lambda w: dataclasses.replace(w, action_normalizer=w.state_normalizer),
    ],
)
def test_another_network_is_another_key(weights, change):
    before = engine_factory.engine_key(weights, "fp32", 1, "a")
    assert before == engine_factory.engine_key(random_weights(TINY), "fp32", 1, "a")
    assert engine_factory.engine_key(change(random_weights(TINY)), "fp32", 1, "a") != before


def test_other_settings_are_another_key(weights, monkeypatch):
    keys = {
        engine_factory.engine_key(weights, *said)
        for said in (("fp32", 1, "a"), ("bf16", 1, "a"), ("fp32", 2, "a"), ("fp32", 1, "b"))
    }
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"another machine"}))
    assert len(keys | {engine_factory.engine_key(weights, "fp32", 1, "a")}) == 5


SPOILT = {
    "half of it": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
    "garbage": lambda content: b"garbage" * 100,
    "one bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "a byte less": lambda content: content[:-1],
    "another error": lambda content: content.replace(b"0.25", b"0.05"),
    "only the digest": lambda content: content[: len(engine_cache.MAGIC) + 32],
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_file_that_is_not_what_was_written_is_no_engine(folder, caplog, case):
    cache = BlobCache()
    assert cache.write("key", Stored(b"an engine", 0.25))
    assert cache.read("key") == Stored(b"an engine", 0.25)
    path = folder / "key.engine"
    path.write_bytes(SPOILT[case](path.read_bytes()))
    assert cache.read("key") is None
    assert "compiling again" in caplog.text


@needs_openvino
@pytest.mark.parametrize("how", ["truncated", "of others", "no engine"])
def test_what_the_cache_cannot_give_is_compiled_again(compilations, started, weights, caplog, how):
    (path,) = started.glob("*.engine")
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "of others":
        path.chmod(0o666)
    else:
        BlobCache().write(path.stem, Stored(b"written by us, and no engine", 0.0))
    assert error_of(make_engine(weights, OPENVINO), weights) <= EXACT
    assert "compiling again" in caplog.text
    make_engine(weights, OPENVINO)
    assert len(compilations) == 1


@needs_openvino
def test_a_cache_that_cannot_be_written_costs_only_time(monkeypatch, caplog, weights):
    monkeypatch.setenv("METRONOME_CACHE", "/proc/no-such-folder")
    caplog.set_level(logging.INFO)
    assert error_of(make_engine(weights, OPENVINO), weights) <= EXACT
    assert "engine cache: not stored" in caplog.text
    assert not BlobCache(Path("/dev/null/engines")).write("key", Stored(b"", 0.0))


def test_a_folder_that_others_may_write_is_not_used(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    assert not BlobCache(shared).write("key", Stored(b"blob", 0.0))
    assert "can be written by another user" in caplog.text
    assert not list(shared.iterdir())


def test_the_longest_unused_go_first(tmp_path):
    import os

    cache = BlobCache(tmp_path / "c", capacity_bytes=2500)
    for age, key in enumerate(("oldest", "old", "new")):
        assert cache.write(key, Stored(b"x" * 1000, 0.5))
        os.utime(tmp_path / "c" / f"{key}.engine", (age, age))
    assert cache.read("oldest") is None
    assert cache.read("old") == Stored(b"x" * 1000, 0.5)
    assert cache.write("newest", Stored(b"y", 0.0))
    cache.remove("new")
    assert sorted(p.stem for p in (tmp_path / "c").iterdir()) == ["newest", "old"]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("METRONOME_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert engine_cache.default_folder() == tmp_path / "metronome"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(engine_cache.default_folder()) == "/home/somebody/.cache/metronome"


# --- the choice --------------------------------------------------------------------------------


class _Says:
    """An engine that answers the probe with what it is told."""

    device, threads, sizes = "cpu", 1, (1,)

    def __init__(self, name, precision):
        self.name, self.precision, self.closed = name, precision, False

    def close(self):
        self.closed = True


@pytest.fixture
def machine(monkeypatch):
    """Makers with these errors (or exceptions) by (engine, precision), on a CPU with all units."""

    def has(errors, flags=("amx_bf16", "amx_fp16")):
        made = []

        def maker(name):
            def make(weights, device, precision, threads, graph_options):
                result = errors.get((name, precision), EngineUnavailable("not on this machine"))
                if isinstance(result, Exception):
                    raise result
                made.append(_Says(name, precision))
                return made[-1], result

            return make

        monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(flags))
        for name in engine_factory.ENGINE_FACTORIES:
            monkeypatch.setitem(engine_factory.ENGINE_FACTORIES, name, maker(name))
        return made

    return has


FINE = {("openvino", "fp32"): 1e-7, ("openvino", "bf16"): 5e-3, ("torch", "fp32"): 0.0,
        ("torch", "bf16"): 6e-3, ("openvino", "fp16"): 1e-3}  # fmt: skip
CHOICES = {
    "the fastest that is right": ({}, {}, ("openvino", "bf16")),
    "no bfloat16 units": ({"flags": ("avx2",)}, {}, ("openvino", "fp32")),
    "bf16 errs too much": ({}, {("openvino", "bf16"): 0.03}, ("openvino", "fp32")),
    "bf16 gives no numbers": ({}, {("openvino", "bf16"): float("inf")}, ("openvino", "fp32")),
    "fp32 errs too much": (
        {"flags": ("avx2",)}, {("openvino", "fp32"): 1e-3}, ("torch", "fp32")),
    "openvino is not there": (
        {},
        {("openvino", "bf16"): EngineUnavailable("No module named 'openvino'"),
         ("openvino", "fp32"): EngineUnavailable("No module named 'openvino'")},
        ("torch", "bf16"),
    ),
    "openvino fails": (
        {"flags": ("avx2",)}, {("openvino", "fp32"): InferenceError("x")}, ("torch", "fp32")),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_auto_takes_the_first_that_is_right_and_says_so(weights, machine, caplog, case):
    arguments, changes, expected = CHOICES[case]
    made = machine({**FINE, **changes}, **arguments)
    caplog.set_level(logging.INFO)
    engine = make_engine(weights, EngineOptions(device="cpu", threads=1))
    assert (engine.name, engine.precision) == expected
    assert [one.closed for one in made] == [True] * (len(made) - 1) + [False]
    last = caplog.records[-1].getMessage()
    assert f"inference by {expected[0]} on cpu, {expected[1]}, error against float32" in last
    skipped = [r.getMessage() for r in caplog.records if "engine skipped" in r.getMessage()]
    assert len(skipped) == len([c for c in changes if c[1] in ("bf16", "fp32")])


def test_what_is_asked_for_by_name_is_used_and_its_error_told(weights, machine, caplog):
    machine({("openvino", "bf16"): 0.03})
    options = EngineOptions(device="cpu", engine="openvino", precision="bf16")
    assert make_engine(weights, options).precision == "bf16"
    assert "bf16, error against float32 torch 3.0e-02: more than 2e-02" in caplog.text


def test_fp16_that_overflows_is_refused(weights, machine):
    machine({("openvino", "fp16"): float("inf"), ("torch", "fp16"): float("inf")})
    with pytest.raises(ContractMismatch, match=r"precision: got 'fp16', .*openvino in fp16: NaN"):
        make_engine(weights, EngineOptions(device="cpu", precision="fp16"))


REFUSED = {
    "an engine of a GPU": (
        {"engine": "cuda-graph"},
        r"engine: got 'cuda-graph', expected one of \('auto', 'openvino', 'torch'\) on device 'cpu'"
    ),
    "no such engine": ({"engine": "tensorrt"}, r"engine: got 'tensorrt', expected one of"),
    "no such precision": ({"precision": "int8"}, r"precision: got 'int8', expected one of"),
    "no units": ({"precision": "bf16"}, r"precision: got 'bf16', expected .*'fp32'.* no units"),
    "no half units": ({"precision": "fp16"}, r"precision: got 'fp16', expected .*'fp32'.* no unit"),
    "no threads": ({"threads": 0}, r"threads: got 0, expected at least 1"),
    "no such device": ({"device": "cuda:7"}, r"device: got 'cuda:7', expected 'cpu' or one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_field(weights, monkeypatch, case):
    changes, message = REFUSED[case]
    monkeypatch.setattr(hardware, "cpu_flags", frozenset)
    with pytest.raises(ContractMismatch, match=message):
        make_engine(weights, EngineOptions(**{"device": "cpu", **changes}))


def test_without_openvino_torch_serves_and_says_why(weights, monkeypatch, caplog):
    for name in [n for n in sys.modules if n.startswith("policies.act.openvino")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("policies.act.openvino_engine", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "policies.act.openvino_import", raising=False)
    engine = make_engine(weights, EngineOptions(device="cpu", precision="fp32", threads=1))
    assert engine.name.startswith("torch")
    assert "engine skipped: openvino in fp32:" in caplog.text
    assert "pip install '.[server]'" in caplog.text
    with pytest.raises(ContractMismatch, match=r"engine: got 'openvino', expected one that works"):
        make_engine(weights, OPENVINO)


@needs_openvino
def test_openvino_refuses_a_format_the_cpu_only_emulates(weights):
    from policies.act import openvino_engine
    from policies.act.weight_fusion import fuse

    if "fp16" in hardware.precisions(torch.device("cpu")):
        pytest.skip("this CPU has fp16 units")
    with pytest.raises(EngineUnavailable, match=r"fp16 is not among this CPU's .*FP32"):
        openvino_engine.compile_fused(fuse(weights), "fp16", 1)


def test_a_core_is_left_to_the_control_loop(tmp_path, monkeypatch):
    """Two hardware threads of a core are one core; a core we may not use is none."""
    pairs = {0: "0,4", 1: "1,5", 2: "2,6", 4: "0,4", 5: "1,5"}
    for cpu, siblings in pairs.items():
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(hardware, "TOPOLOGY", tmp_path)
    for allowed, threads in (((0, 1, 2, 4, 5), 2), ((0, 4), 1), ((0, 1), 1), ((7, 8, 9), 2)):
        monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _, cpus=allowed: set(cpus))
        assert hardware.default_threads() == threads


def test_the_probe_is_the_same_everywhere():
    first, second = probe(TINY), probe(TINY)
    for a, b in zip(first.images, second.images, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(first.images) == 2
    assert (first.images[0][:, :32] == first.images[0][0, :32]).all()


# --- as a policy -------------------------------------------------------------------------------


def test_a_bad_observation_of_a_batch_costs_no_other(tiny):
    policy = load_policy(str(tiny), device="cpu", engine="torch", precision="fp32", threads=1)
    assert isinstance(policy, ActPolicy)
    observations = [observation(policy.contract, seed) for seed in range(2 * MAX_BATCH + 1)]
    observations[3].state[:] = np.nan
    answers = policy.infer_batch(observations)
    assert isinstance(answers.pop(3), ObservationError)
    del observations[3]
    for obs, answer in zip(observations, answers, strict=True):
        assert isinstance(answer, ActionChunk)
        np.testing.assert_array_equal(answer.actions, policy.infer(obs).actions)
        assert answer.obs_timestep == obs.timestep
    assert policy.infer_batch([]) == []
    assert policy.batch_sizes == (1,)


def test_an_engine_that_fails_fails_all_it_was_given(tiny, monkeypatch):
    policy = load_policy(str(tiny), device="cpu", engine="torch", precision="fp32", threads=1)

    def fail(batch):
        raise InferenceError("out of memory")

    monkeypatch.setattr(policy._engine, "run", fail)
    observations = [observation(policy.contract, seed) for seed in range(3)]
    answers = policy.infer_batch(observations)
    assert [str(answer) for answer in answers] == ["out of memory"] * 3


@needs_openvino
def test_what_was_chosen_is_in_the_policys_info(tiny):
    info = load_policy(str(tiny), device="cpu", precision="fp32", threads=2).info
    assert info.engine.startswith("openvino 20")
    assert (info.device, info.precision, info.threads) == ("cpu", "fp32", 2)


def test_a_backbone_for_each_camera_is_refused_whatever_the_engine(tiny):
    from safetensors.torch import load_file, save_file

    path = tiny / "model.safetensors"
    tensors = load_file(path)
    tensors["model.backbones.1.0.body.conv1.weight"] = torch.zeros(1)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="a backbone for each camera is not supported"):
        load_policy(str(tiny), engine="openvino")
