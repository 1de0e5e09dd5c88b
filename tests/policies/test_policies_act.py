"""ACT as a policy: what it checks, what it promises."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_act import needs_openvino, observation

from policies.act import hardware
from policies.act.torch_engine import TorchEngine
from policies.checkpoint.load import load_policy
from policies.errors import CheckpointError, ContractMismatch, InferenceError, ObservationError
from policies.types import MetaObs, Policy


@pytest.fixture
def policy(tiny):
    return load_policy(str(tiny), device="cpu", engine="torch", precision="fp32", threads=1)


def test_it_is_a_policy(policy):
    assert isinstance(policy, Policy)
    assert policy.fork() is policy
    policy.reset()
    policy.close()
    policy.close()
    assert (policy.info.device, policy.info.precision, policy.info.threads) == ("cpu", "fp32", 1)
    assert policy.contract.dataset_id == "t"


def test_a_chunk_says_what_it_was_made_from(policy):
    obs = dataclasses.replace(observation(policy.contract), timestep=7, t_capture_ns=99)
    chunk = policy.infer(obs)
    assert (chunk.obs_timestep, chunk.t_capture_ns) == (7, 99)
    assert (chunk.actions.shape, chunk.actions.dtype) == ((5, 2), np.float32)
    assert set(chunk.stages_ns) == {"preprocess", "infer", "postprocess"}


def test_observations_are_only_read_and_chunks_are_the_callers(policy):
    obs = observation(policy.contract)
    for array in (*obs.images.values(), obs.state):
        array.flags.writeable = False
    first = policy.infer(obs).actions
    kept = first.copy()
    policy.infer(observation(policy.contract, seed=1))
    np.testing.assert_array_equal(first, kept)
    first[:] = 0
    np.testing.assert_array_equal(policy.infer(obs).actions, kept)


def test_client_side_crop_gives_the_same_action(policy):
    from policies.image_resize import prepare

    obs = observation(policy.contract)
    cropped = {c.name: prepare(obs.images[c.name], c) for c in policy.contract.cameras}
    small = dataclasses.replace(obs, images=cropped)
    np.testing.assert_array_equal(policy.infer(small).actions, policy.infer(obs).actions)


def test_pictures_can_be_resized_before_the_first_request(tiny, monkeypatch):
    warm = []
    monkeypatch.setattr("policies.act.policy.warm_up", warm.extend)
    policy = load_policy(str(tiny), device="cpu", engine="torch", precision="fp32", threads=1)
    assert tuple(warm) == policy.contract.cameras


CHILD = """
import sys
import numpy as np
from policies.checkpoint.load import load_policy
from policies.types import MetaObs
for threads, engine in ((1, "torch"), (2, "torch"), (1, "openvino"), (2, "openvino")):
    policy = load_policy(
        sys.argv[1], device="cpu", engine=engine, precision="fp32", threads=threads
    )
    with np.load(sys.argv[2]) as data:
        obs = MetaObs({k: data[k] for k in policy.contract.camera_names}, data["state"])
    sys.stdout.buffer.write(policy.infer(obs).actions.tobytes())
"""


@needs_openvino
def test_the_same_bits_in_any_process(whole, tmp_path):
    """Here the compiled engine comes from the compiler, and there from the cache."""
    here = b""
    for threads, engine in ((1, "torch"), (2, "torch"), (1, "openvino"), (2, "openvino")):
        policy = load_policy(
            str(whole), device="cpu", engine=engine, precision="fp32", threads=threads
        )
        obs = observation(policy.contract)
        here += policy.infer(obs).actions.tobytes()
    np.savez(tmp_path / "obs.npz", state=obs.state, **obs.images)
    command = [sys.executable, "-c", CHILD, str(whole), str(tmp_path / "obs.npz")]
    assert subprocess.run(command, capture_output=True, check=True).stdout == here


def replace(obs, **changes):
    return dataclasses.replace(obs, **changes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda o: replace(o, state=o.state.astype(float)), ContractMismatch,
         r"state: got float64 \(3,\), expected float32 \(3,\)"),
        (lambda o: replace(o, state=o.state[:2]), ContractMismatch, r"state: got float32 \(2,\)"),
        (lambda o: replace(o, state=[0, 0, 0]), ContractMismatch, "state: got list, expected"),
        (lambda o: replace(o, state=o.state * np.float32(np.nan)), ObservationError,
         r"state: got .*dimensions \[0, 1, 2\], expected finite"),
        (lambda o: replace(o, images={"top": o.images["top"]}), ContractMismatch,
         r"images.wrist: got no such camera among \['top'\], expected \('top', 'wrist'\)"),
        (lambda o: replace(o, images={**o.images, "z": o.images["top"]}), ContractMismatch,
         "images.z: got a picture, expected only"),
        (lambda o: replace(o, images={**o.images, "top": o.images["top"] / 255}), ContractMismatch,
         "images.top: got dtype float64, expected uint8"),
        (lambda o: replace(o, images={**o.images, "top": o.images["top"][1:]}), ContractMismatch,
         r"images.top: got shape \(39, 64, 3\), expected \(40, 64, 3\) or \(32, 64, 3\)"),
    ],
)  # fmt: skip
def test_other_observations_are_refused_by_field(policy, change, error, message):
    obs = observation(policy.contract)
    expected = policy.infer(obs).actions
    with pytest.raises(error, match=message):
        policy.infer(change(obs))
    np.testing.assert_array_equal(policy.infer(obs).actions, expected)


def test_a_nan_among_the_actions_is_a_failure(policy, monkeypatch):
    broken = np.full((1, 5, 2), np.nan, np.float32)
    monkeypatch.setattr(TorchEngine, "run", lambda self, batch: broken)
    with pytest.raises(InferenceError, match=r"NaN or infinity among the actions"):
        policy.infer(observation(policy.contract))


def test_what_this_machine_lacks_is_said(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "cpu_flags", frozenset)
    with pytest.raises(ContractMismatch, match=r"device: got 'cuda', expected 'cpu' or one of 0"):
        load_policy(str(tiny), device="cuda")
    with pytest.raises(ContractMismatch, match=r"device: got 'tpu', expected one of"):
        load_policy(str(tiny), device="tpu")
    with pytest.raises(
        ContractMismatch, match=r"precision: got 'bf16', expected one of .*'fp32'.*no un"
    ):
        load_policy(str(tiny), device="cpu", precision="bf16")
    with pytest.raises(ContractMismatch, match=r"precision: got 'fp8', expected one of"):
        load_policy(str(tiny), precision="fp8")
    with pytest.raises(ContractMismatch, match=r"threads: got 0, expected at least 1"):
        load_policy(str(tiny), threads=0)
    assert load_policy(str(tiny)).info.precision == "fp32"


def test_bf16_is_near_fp32(tiny, monkeypatch):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    exact, rough = (
        load_policy(str(tiny), device="cpu", engine="torch", precision=p, threads=1)
        for p in ("fp32", "auto")
    )
    assert rough.info.precision == "bf16"
    obs = observation(exact.contract)
    np.testing.assert_allclose(rough.infer(obs).actions, exact.infer(obs).actions, atol=0.02)


@pytest.fixture
def cuda_flags():
    """torch's global switches as a fresh process has them; put back afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    defaults = {
        (cudnn, "allow_tf32"): True,
        (cudnn, "deterministic"): False,
        (cudnn, "benchmark"): True,
        (matmul, "allow_tf32"): True,
    }
    before = {switch: getattr(*switch) for switch in defaults}
    for switch, value in defaults.items():
        setattr(*switch, value)
    yield lambda: [getattr(*switch) for switch in defaults]
    for switch, value in before.items():
        setattr(*switch, value)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", torch.float32, [False, True, False, False]),
        ("cuda:1", torch.bfloat16, [True, True, False, True]),
        ("cpu", torch.float32, [True, False, True, True]),
    ],
)
def test_float32_on_cuda_is_no_tf32_and_its_bits_repeat(cuda_flags, device, dtype, expected):
    hardware.configure_cuda(torch.device(device), dtype)
    assert cuda_flags() == expected


@pytest.mark.parametrize("pinned", [True, False])
def test_cudnns_attention_is_never_chosen_where_it_is_pinned(pinned):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        cuda = torch.device("cuda")
        hardware.configure_cuda(cuda, torch.bfloat16, pinned_attention=pinned)
        assert torch.backends.cuda.cudnn_sdp_enabled() is not pinned
        hardware.configure_cuda(torch.device("cpu"), torch.bfloat16, pinned_attention=not pinned)
        assert torch.backends.cuda.cudnn_sdp_enabled() is not pinned
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_gpus_formats_are_those_of_its_own_units(monkeypatch):
    """Emulated bfloat16 does not count, nor what another GPU of the machine has."""
    capabilities = {0: (7, 5), 1: (8, 0), 2: (9, 0)}
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )
    found = [hardware.precisions(torch.device("cuda", index)) for index in capabilities]
    assert found == [("fp32", "fp16"), *[("fp32", "bf16", "fp16")] * 2]


def test_every_engine_is_made_exact(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(hardware, "configure_cuda", lambda *arguments, **_: asked.append(arguments))
    load_policy(str(tiny), device="cpu", engine="torch", precision="fp32", threads=1)
    assert asked == [(torch.device("cpu"), torch.float32)]


def test_the_cpus_units_are_read_from_the_kernels_list(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name : avx512_bf16\ncpu MHz : 2445.4\nflags : sse2 amx_bf16 avx2\n")
    assert hardware.cpu_flags(cpuinfo) == {"sse2", "amx_bf16", "avx2"}
    assert hardware.cpu_flags(tmp_path / "gone") == set()
    for flag, formats in (
        ("amx_bf16", ("fp32", "bf16")),
        ("avx512_bf16", ("fp32", "bf16")),
        ("avx512_fp16", ("fp32", "fp16")),
        ("avx512f", ("fp32",)),
    ):
        monkeypatch.setattr(hardware, "cpu_flags", lambda flag=flag: frozenset({flag}))
        assert hardware.precisions(torch.device("cpu")) == formats


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes an importable module and names it."""

    def write(text):
        name = f"users_policy_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return f"python:{name}"

    return write


USERS = """
import numpy as np
from policies.types import ActionChunk, PolicyContract, PolicyInfo

class Hold:
    contract = PolicyContract("hold", (), 2, 2, 1, 1)
    info = PolicyInfo("users")
    def infer(self, obs): return ActionChunk(obs.state[None].copy())
    def reset(self): pass
    def close(self): pass

class Forkable(Hold):
    def fork(self): return self

def broken(): raise ValueError("no weights here")
def nothing(): return 3
class Half(Hold): contract = {}
value = 3
"""


def test_anyones_own_policy_is_served(module):
    name = module(USERS)
    obs = MetaObs({}, np.array([1, 2], np.float32))
    assert load_policy(f"{name}:Forkable").infer(obs).actions.tolist() == [[1, 2]]
    alone = load_policy(f"{name}:Hold")
    assert isinstance(alone, Policy)
    assert alone.infer(obs).actions.tolist() == [[1, 2]]
    alone.reset()
    alone.close()
    assert alone.contract.policy_type == "hold"
    with pytest.raises(Exception, match=r"no fork.., so it serves one session at a time"):
        alone.fork()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (":broken", "the factory failed: ValueError"),
        (":nothing", "returned a int without"),
        (":Half", "contract is a dict and info a PolicyInfo"),
        (":value", "no function 'value' there, got .*'Hold'"),
        (":gone", "no function 'gone' there"),
        ("", "expected python:package.module:factory"),
    ],
)
def test_what_is_no_policy_is_refused(module, factory, message):
    with pytest.raises(CheckpointError, match=message):
        load_policy(module(USERS) + factory)


def test_a_module_that_is_not_there(module):
    with pytest.raises(CheckpointError, match=r"No module named 'no_such_module'"):
        load_policy("python:no_such_module:make")
