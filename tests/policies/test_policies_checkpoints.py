"""Every layout loads and matches; everything wrong is refused by name."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_act import CAMERAS, TINY, observation

from policies.act.policy import ActPolicy
from policies.checkpoint.extras import Extras
from policies.checkpoint.file_readers import read_safetensors
from policies.checkpoint.load import load_policy, load_weights
from policies.checkpoint.packed_weights import pack, unpack
from policies.checkpoint.save import Saved, save_ilstudio, save_lerobot
from policies.checkpoint.untrained import initial_weights, make_untrained
from policies.checkpoint.weight_folders import find_folder
from policies.checkpoint.weight_names import detr_keys, lerobot_keys
from policies.errors import CheckpointError, ContractMismatch
from policies.types import CameraContract, MetaObs

STATS = {
    "state": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.001, 2.0], "min": [-1.0] * 3,
              "max": [1.0] * 3, "q01": [-0.9] * 3, "q99": [0.9] * 3},
    "action": {"mean": [1.0, -1.0], "std": [0.3, 0.7], "min": [-2.0] * 2, "max": [2.0] * 2,
               "q01": [-1.9] * 2, "q99": [1.9] * 2},
}  # fmt: skip
HARMLESS = {"device": "cpu", "precision": "fp32", "threads": 1}


def infer(path, **arguments):
    policy = load_policy(str(path), **{**HARMLESS, **arguments})
    return policy.infer(observation(policy.contract)).actions


# --- reference implementations ---------------------------------------------------------------


@pytest.mark.needs_reference
@pytest.mark.usefixtures("full_width")
@pytest.mark.parametrize(
    ("folder", "expected", "arguments"),
    [
        ("lerobot_act", "actions", {}),
        ("lerobot_act_buffers", "actions", {}),
        ("original_act", "actions",
         {"camera_names": ["top", "angle"], "n_heads": 8, "image_hw": (96, 128)}),
        ("ilstudio_act", "actions_sim_transfer_cube_scripted", {"image_hw": (96, 128)}),
        ("ilstudio_act", "actions_other_robot",
         {"image_hw": (96, 128), "dataset_id": "other_robot"}),
    ],
)  # fmt: skip
def test_reference_outputs_are_matched(reference, folder, expected, arguments):
    policy = load_policy(str(reference / folder / "checkpoint"), **HARMLESS, **arguments)
    with np.load(reference / folder / "expected.npz") as data:
        wanted, states = data[expected], data["state"]
        frames = {name: data[f"image_{name}"] for name in policy.contract.camera_names}
    got = np.stack(
        [
            policy.infer(MetaObs({k: v[i] for k, v in frames.items()}, states[i])).actions
            for i in range(len(wanted))
        ]
    )
    assert np.abs(got - wanted).max() / np.abs(wanted).max() <= 1e-5


@pytest.mark.needs_reference
@pytest.mark.usefixtures("full_width")
def test_both_of_lerobots_layouts_are_one_policy(reference):
    new, old = (
        load_policy(str(reference / name / "checkpoint"), **HARMLESS).contract
        for name in ("lerobot_act", "lerobot_act_buffers")
    )
    assert new == old


@pytest.mark.needs_reference
@pytest.mark.usefixtures("full_width")
def test_the_original_reads_its_yaml(reference, tmp_path):
    folder = tmp_path / "original"
    shutil.copytree(reference / "original_act" / "checkpoint", folder)
    with pytest.raises(CheckpointError, match=r"does not hold camera_names: give it"):
        load_weights(str(folder))
    (folder / "metronome.yaml").write_text("{camera_names: [top, angle], image_hw: [96, 128]}")
    with pytest.raises(CheckpointError, match=r"does not hold n_heads: give it"):
        load_weights(str(folder))
    (folder / "metronome.yaml").write_text(
        "{camera_names: [top, angle], image_hw: [96, 128], n_heads: 8, dt_s: 0.04}"
    )
    contract = load_weights(str(folder)).contract()
    assert contract.camera_names == ("top", "angle")
    assert (contract.dt_s, contract.cameras[0].source_hw) == (0.04, (96, 128))


# --- round trips -------------------------------------------------------------------------------


@functools.cache
def weights_of(config):
    """Weights in which every tensor counts; not to be changed."""
    return {k: v + 0.1 * torch.rand_like(v) for k, v in initial_weights(config, 3).items()}


def saved(config=TINY, extras=None):
    """Weights and their statistics."""
    return Saved(config, weights_of(config), STATS, "d", extras or Extras(cameras=CAMERAS))


def write_original(folder, given):
    """The original's layout of ``given``: seven decoder layers, of which one counts."""
    folder.mkdir()
    keys = detr_keys(given.config)
    state = {k: given.tensors[v] for k, v in keys.items() if v in given.tensors}
    for key in list(state):
        if key.startswith("model.transformer.decoder.layers.0."):
            for layer in range(1, 7):
                state[key.replace("layers.0.", f"layers.{layer}.")] = state[key] + 1
    torch.save(state, folder / "policy_best.ckpt")
    table = {
        f"{name}_{which}": np.asarray(given.stats[what][which], np.float32)
        for what, name in (("state", "qpos"), ("action", "action"))
        for which in ("mean", "std")
    }
    table["qpos_std"] = table["qpos_std"].clip(0.01)
    (folder / "dataset_stats.pkl").write_bytes(pickle.dumps(table))


def test_one_net_in_every_layout_is_one_policy(tmp_path):
    given = saved()
    save_ilstudio(tmp_path / "ilstudio", given)
    save_lerobot(tmp_path / "lerobot", given)
    write_original(tmp_path / "original", given)
    shutil.copy(tmp_path / "ilstudio" / "metronome.yaml", tmp_path / "original")
    first = infer(tmp_path / "ilstudio")
    assert np.abs(first).max() > 0.1
    for name, arguments in (
        ("lerobot", {}),
        ("original", {"camera_names": ["top", "wrist"], "n_heads": 2}),
    ):
        np.testing.assert_allclose(infer(tmp_path / name, **arguments), first, atol=2e-6)


def test_lerobots_older_layout_has_its_statistics_in_the_weights(tmp_path):
    save_lerobot(tmp_path / "new", saved())
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    stats = load_file(next((tmp_path / "old").glob("policy_pre*.safetensors")))
    for key, value in stats.items():
        feature, _, name = key.rpartition(".")
        prefix = "unnormalize_outputs" if feature == "action" else "normalize_inputs"
        tensors[f"{prefix}.buffer_{feature.replace('.', '_')}.{name}"] = value
    save_file(tensors, tmp_path / "old" / "model.safetensors")
    for leftover in (tmp_path / "old").glob("policy_*"):
        leftover.unlink()
    np.testing.assert_array_equal(infer(tmp_path / "old"), infer(tmp_path / "new"))


def test_the_two_encoders_are_not_mistaken_for_each_other():
    """Both layouts have ``model.encoder.layers.0.*`` of the same shapes; they mean two things."""
    key = "model.encoder.layers.0.linear1.weight"
    assert detr_keys(TINY)[key] == "style.layers.0.linear1.weight"
    assert lerobot_keys(TINY)[key] == "encoder.0.linear1.weight"


def test_bf16_files_are_read(tmp_path):
    given = saved()
    save_ilstudio(tmp_path / "a", given)
    save_ilstudio(tmp_path / "b", given, stored_as="bf16")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in "ab"]
    assert sizes[1] < 0.6 * sizes[0]
    np.testing.assert_allclose(infer(tmp_path / "b"), infer(tmp_path / "a"), atol=0.05)
    weights = read_safetensors(tmp_path / "b" / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_extras_come_back(tmp_path):
    extras = Extras(cameras=CAMERAS, dt_s=0.1, n_action_steps=3, training={"seed": 4})
    save_ilstudio(tmp_path / "a", saved(extras=extras))
    contract = load_weights(str(tmp_path / "a")).contract()
    assert contract.cameras == CAMERAS
    assert (contract.dt_s, contract.n_action_steps, contract.chunk_size) == (0.1, 3, 5)


CAMERA = "cameras: [{name: top, source_hw: [40, 64], model_hw: [32, 64], %s}]"
CROPPED, RESIZED = CAMERA % "crop: [4, 0, 32, 64]", CAMERA % "resize: area"


@pytest.mark.parametrize(
    ("cameras", "sizes"),
    [(CROPPED, [(40, 64), (32, 64)]), (RESIZED, [(40, 64), (32, 64)]),
     ("cameras: [{name: top, source_hw: [32, 64], model_hw: [32, 64]}]", [(64, 96)])],
)  # fmt: skip
@pytest.mark.parametrize("layout", [save_ilstudio, save_lerobot])
def test_a_size_beside_cameras_of_another_is_refused(tmp_path, layout, cameras, sizes):
    """A crop that was trained with would be dropped without a word."""
    config = dataclasses.replace(TINY, n_cameras=1)
    plain = (CameraContract("top", (32, 64), (32, 64)),)
    layout(tmp_path / "a", saved(config, Extras(cameras=plain)))
    file, folder = tmp_path / "a" / "metronome.yaml", str(tmp_path / "a")
    # The same in other words is none.
    assert load_weights(folder, image_hw=(32, 64)).cameras == plain
    for height, width in sizes:
        file.write_text(cameras)
        said = f"got --image_hw {height} {width} beside cameras of metronome.yaml.* one of them"
        with pytest.raises(CheckpointError, match=said):
            load_weights(folder, image_hw=(height, width))
        file.write_text(f"{cameras}\nimage_hw: [{height}, {width}]")
        with pytest.raises(CheckpointError, match=rf"got image_hw \[{height}, {width}\] beside"):
            load_weights(folder)


def test_untrained_is_flagged_and_repeatable(tiny, tmp_path):
    make_untrained(tmp_path / "again", task="t", config=TINY, cameras=CAMERAS, stored_as="bf16")
    for file in tiny.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert not load_policy(str(tiny), **HARMLESS).info.trained


def test_the_newest_checkpoint_of_a_run(tiny, tmp_path):
    run = tmp_path / "run"
    for number in (2, 10, 9):
        shutil.copytree(tiny, run / f"checkpoint-{number}")
    for name in ("normalize.json", "policy_metadata.json", "t_stats_joint_abs.pkl"):
        shutil.move(run / "checkpoint-10" / name, run / name)
    (run / "checkpoint-9" / "config.json").write_text("{}")
    np.testing.assert_array_equal(infer(run), infer(tiny))
    np.testing.assert_array_equal(infer(run / "checkpoint-2"), infer(tiny))
    (run / "checkpoint-10" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"checkpoint-10"):
        infer(run)


def test_pretrained_model_is_looked_into(tmp_path):
    save_lerobot(tmp_path / "run" / "pretrained_model", saved())
    np.testing.assert_array_equal(infer(tmp_path / "run"), infer(tmp_path / "run/pretrained_model"))


def test_chunks_are_cut(tiny):
    policy = load_policy(str(tiny), chunk_size=2, **HARMLESS)
    assert (policy.contract.chunk_size, policy.contract.n_action_steps) == (2, 2)
    np.testing.assert_array_equal(infer(tiny, chunk_size=2), infer(tiny)[:2])
    with pytest.raises(ContractMismatch, match=r"chunk_size: got 6, expected 1 to 5, as trained"):
        load_policy(str(tiny), chunk_size=6, **HARMLESS)


def test_data_sets_have_their_own_normalizers(tiny):
    path = tiny / "normalize.json"
    raw = json.loads(path.read_text())
    raw["datasets"].append(
        {"dataset_id": "u", "ctrl_space": "ee", "ctrl_type": "rel", "action_norm_mask": [0]}
    )
    for what in ("state", "action"):
        raw[what]["u"] = "percentile"
    path.write_text(json.dumps(raw))
    shutil.copy(tiny / "t_stats_joint_abs.pkl", tiny / "u_stats_ee_rel.pkl")
    t, u = (load_weights(str(tiny), dataset_id=name).contract() for name in "tu")
    assert t.normalizer_hash != u.normalizer_hash
    assert (u.ctrl_space, u.ctrl_type, u.dataset_ids) == ("ee", "relative", ("t", "u"))
    assert load_weights(str(tiny)).dataset_id == "t"
    with pytest.raises(CheckpointError, match=r"got 'v', expected one of \['t', 'u'\]"):
        load_weights(str(tiny), dataset_id="v")


# --- refusals ----------------------------------------------------------------------------------


def edit_json(name, **changes):
    def edit(folder):
        raw = json.loads((folder / name).read_text())
        raw.update(changes)
        (folder / name).write_text(json.dumps(raw))

    return edit


def edit_weights(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def truncate(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def poison(tensors):
    tensors["model.action_head.bias"][0] = float("nan")


def widen(tensors):
    tensors["model.action_head.weight"] = torch.zeros(9, 16)


PER_CAMERA = "model.backbones.1.0.body.conv1.weight"

REFUSALS = {
    "truncated": (truncate, "model.safetensors: truncated, or no safetensors file"),
    "garbage": (write("model.safetensors", "garbage"), "model.safetensors: truncated, or no safe"),
    "no weights": (remove("model.safetensors"), "model.safetensors"),
    "another kind": (
        edit_json("policy_metadata.json", policy_name="diffusion_policy"),
        "policy_metadata.json: policy_name: got 'diffusion_policy', expected 'act'",
    ),
    "another type": (
        edit_json("config.json", type="diffusion"),
        "config.json: type: got 'diffusion', expected 'act'",
    ),
    "backbone": (
        edit_json("config.json", backbone="vit_b_16"),
        "config.json: backbone: got 'vit_b_16', expected one of",
    ),
    "pre_norm": (
        edit_json("config.json", pre_norm=True),
        "config.json: pre_norm: got True, expected False",
    ),
    "missing size": (
        write("config.json", '{"camera_names": ["top", "wrist"], "enc_layers": 1}'),
        "config.json: key 'state_dim' is missing",
    ),
    "wrong type": (
        edit_json("config.json", hidden_dim="16"),
        "config.json: hidden_dim: got '16', expected int",
    ),
    "a size beyond all reason": (
        edit_json("config.json", hidden_dim=10**30),
        "config.json: width: got 1000000000000000000000000000000, expected 1 to",
    ),
    "layers beyond all reason": (
        edit_json("config.json", dec_layers=10**9),
        "config.json: dec_layers: got 1000000000, expected 1 to 64",
    ),
    "not json": (write("config.json", "{"), "config.json: Expecting property name"),
    "unused key": (
        edit_weights(lambda t: t.update(extra=torch.zeros(1))),
        "1 unknown keys, the first 'extra'",
    ),
    "missing key": (
        edit_weights(lambda t: t.pop("model.query_embed.weight")),
        "key 'model.query_embed.weight' is missing",
    ),
    "wrong shape": (
        edit_weights(widen),
        r"model.action_head.weight: got shape \(9, 16\), expected \(2, 16\)",
    ),
    "nan": (edit_weights(poison), "model.action_head.bias: NaN or infinity among the weights"),
    "a backbone per camera": (
        edit_weights(lambda t: t.update({PER_CAMERA: torch.zeros(1)})),
        "a backbone for each camera is not supported in this layout, expected model.backbones.0",
    ),
    "no normalizer": (remove("normalize.json"), "normalize.json: missing; without it there is no"),
    "no statistics": (
        remove("t_stats_joint_abs.pkl"),
        "t_stats_joint_abs.pkl: missing, the normalizer of data set 't'",
    ),
    "no action normalizer": (
        edit_json("normalize.json", action={}),
        "normalize.json: key 't' is missing",
    ),
    "normalizer kind": (
        edit_json("normalize.json", action={"t": "fancy"}),
        "got normalizer 'fancy', expected one of",
    ),
    "statistics of another robot": (
        lambda folder: (folder / "t_stats_joint_abs.pkl").write_bytes(
            pickle.dumps({"state": STATS["action"], "action": STATS["action"]})
        ),
        "state statistics of 't': got 2 dimensions, expected 3",
    ),
    "unknown extra": (
        write("metronome.yaml", "camera_name: [top]"),
        "metronome.yaml: camera_name: unknown key, expected one of .*'camera_names'",
    ),
    "extra cameras": (
        write("metronome.yaml", "cameras: [{name: a, source_hw: [32, 32], model_hw: [32, 32]}]"),
        r"cameras: got \['a'\], expected \['top', 'wrist'\]",
    ),
    "impossible crop": (
        write(
            "metronome.yaml",
            "cameras: [{name: a, source_hw: [32, 32], model_hw: [32, 32], crop: [1, 0, 32, 32]}]",
        ),
        "cameras.a.crop: got .*a window inside",
    ),
    "two extras": (write("metronome.json", "{}"), "got both"),
    **{
        f"extras as {name}": (
            write(name, "dt_s: 0.05"),
            rf"{name}: got this name, expected one of \['metronome.yaml', 'metronome.json'\]",
        )
        for name in ("metronome.yml", "metronome.yaml.txt", "Metronome.yaml", "metronome.YAML")
    },
    "masks": (edit_json("config.json", masks=True), "masks: got True, expected False"),
    "what it says itself": (
        write("metronome.yaml", "n_heads: 2"),
        "metronome.yaml: n_heads: got 2, expected none: this layout defines it",
    ),
    "a key twice": (
        write("config.json", '{"dec_layers": 1, "dec_layers": 7}'),
        "config.json: key 'dec_layers' is given twice",
    ),
    "not downloaded": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "model.safetensors: a Git LFS pointer, .* run git lfs pull",
    ),
    "a mask misspelt": (
        edit_json(
            "normalize.json",
            datasets=[
                {"dataset_id": "t", "ctrl_space": "joint", "ctrl_type": "abs", "action_mask": [0]}
            ],
        ),
        r"normalize.json: datasets: action_mask: unknown key \(got \[0\]\), expected .*norm_mask",
    ),
    "another version": (
        edit_json("normalize.json", version="3.0"),
        "normalize.json: version: got '3.0', expected '2.0'",
    ),
    "names too few": (
        write("metronome.yaml", "{image_hw: [32, 64], state_names: [a]}"),
        r"state_names: got \['a'\], expected 3 different names",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_checkpoints_are_refused_by_name(tiny, case):
    edit, message = REFUSALS[case]
    edit(tiny)
    with pytest.raises((CheckpointError, ContractMismatch), match=message):
        load_weights(str(tiny)).contract()


def edit_processor(folder, change):
    path = folder / "policy_preprocessor.json"
    raw = json.loads(path.read_text())
    change(raw["steps"])
    path.write_text(json.dumps(raw))


def edit_step(name, file="pre", **keys):
    """Sets keys of a step's settings."""

    def edit(folder):
        path = folder / f"policy_{file}processor.json"
        raw = json.loads(path.read_text())
        next(s for s in raw["steps"] if s["registry_name"] == name)["config"].update(keys)
        path.write_text(json.dumps(raw))

    return edit


def edit_tensors(**changes):
    """Replaces statistics; None removes one. ``__`` stands for a dot."""

    def edit(folder):
        for path in folder.glob("policy_*.safetensors"):
            tensors = load_file(path)
            for key, value in changes.items():
                tensors.pop(key.replace("__", "."), None)
                if value is not None:
                    tensors[key.replace("__", ".")] = torch.tensor(value)
            save_file(tensors, path)

    return edit


def add_step(name, at, file="pre", **config):
    def edit(folder):
        path = folder / f"policy_{file}processor.json"
        raw = json.loads(path.read_text())
        raw["steps"].insert(at, {"registry_name": name, "config": config})
        path.write_text(json.dumps(raw))

    return edit


def features(**shapes):
    """Sets the input features, by type and shape; ``__`` stands for a dot."""
    return edit_json(
        "config.json",
        input_features={
            name.replace("__", "."): {"type": kind, "shape": shape}
            for name, (kind, shape) in shapes.items()
        },
    )


def renames(**names):
    table = {f"observation.images.{k}": f"observation.images.{v}" for k, v in names.items()}
    return edit_step("rename_observations_processor", rename_map=table)


TOP, RENAME = "observation.images.top", "rename_observations_processor"
STATE_AND_TOP = {
    "observation__state": ("STATE", [3]),
    "observation__images__top": ("VISUAL", [3, 32, 64]),
}
LEROBOT_REFUSALS = {
    "a step nobody knows": (
        lambda f: edit_processor(f, lambda s: s.append({"registry_name": "crop_processor"})),
        "policy_preprocessor.json: step 'crop_processor' is not supported",
    ),
    "no normalizer step": (
        lambda f: edit_processor(f, lambda s: s.pop()),
        "policy_preprocessor.json: got 0 steps 'normalizer_processor', expected one",
    ),
    "half of the processors": (
        lambda f: (f / "policy_preprocessor.json").unlink(),
        "policy_preprocessor.json: missing; LeRobot writes it beside policy_postprocessor.json",
    ),
    "no processor at all": (
        lambda f: [path.unlink() for path in f.glob("policy_*.json")],
        "no normalizer: neither policy_preprocessor.json nor normalize_inputs",
    ),
    "observation history": (edit_json("config.json", n_obs_steps=2), "n_obs_steps: got 2, exp"),
    "an input nobody knows": (
        edit_json("config.json", input_features={"observation.environment_state":
                                                  {"type": "ENV", "shape": [3]}}),
        "observation.environment_state: the state of an environment is not supported",
    ),
    "a feature that is none": (
        edit_json("config.json", input_features={"observation.state": 3}),
        "config.json: got 3, expected an object with 'type'",
    ),
    "a shape of words": (
        edit_json("config.json", output_features={"action": {"shape": ["two"]}}),
        r"config.json: shape: got \['two'\], expected integers",
    ),
    "a size beyond all reason": (
        edit_json("config.json", dim_feedforward=10**30),
        "config.json: feedforward: got 1000000000000000000000000000000, expected 1 to",
    ),
    "a camera beyond all reason": (
        lambda f: edit_json("config.json", input_features={
            "observation.state": {"type": "STATE", "shape": [3]},
            "observation.images.top": {"type": "VISUAL", "shape": [3, 10**30, 64]}})(f)
        or (f / "metronome.yaml").unlink(),
        "config.json: image_hw: got .*expected 32 to 8192",
    ),
    "layers in words": (
        edit_json("config.json", n_vae_encoder_layers="x"),
        "n_vae_encoder_layers: got 'x', expected int",
    ),
    "a step that is none": (
        edit_json("policy_preprocessor.json", steps=[3]),
        "policy_preprocessor.json: got 3, expected an object with 'registry_name'",
    ),
    "a step's list of settings": (
        lambda f: edit_processor(f, lambda s: s[-1].update(config=[])),
        r"policy_preprocessor.json: config: got \[\], expected dict",
    ),
    "an eps in words": (
        lambda f: edit_processor(f, lambda s: s[-1]["config"].update(eps="x")),
        "eps: got 'x', expected int or float",
    ),
    "a list of modes": (
        lambda f: edit_processor(f, lambda s: s[-1]["config"]["norm_map"].update(STATE=[])),
        r"STATE: got \[\], expected one of",
    ),
    "a key nobody knows": (
        edit_json("config.json", n_future_steps=3),
        "config.json: n_future_steps: unknown key, expected those of LeRobot's ACT up to 0.6.1",
    ),
    "a mapping of no mode": (
        edit_json("config.json", normalization_mapping={"STATE": "ROBUST"}),
        "config.json: normalization_mapping: STATE: got 'ROBUST', expected one of",
    ),
    "more steps than a chunk": (
        edit_json("config.json", n_action_steps=6),
        "config.json: n_action_steps: got 6, expected 1 to chunk_size = 5",
    ),
    "pre-norm": (edit_json("config.json", pre_norm=True), "pre_norm: got True, expected False"),
    "dilation": (
        edit_json("config.json", replace_final_stride_with_dilation=1),
        "replace_final_stride_with_dilation: got 1, expected False",
    ),
    "gated units": (
        edit_json("config.json", feedforward_activation="glu"),
        "activation: got 'glu', expected one of",
    ),
    "adapters": (edit_json("config.json", use_peft=True), "use_peft: .*merge_and_unload"),
    "depth": (
        features(**STATE_AND_TOP, observation__images__depth=("VISUAL", [1, 32, 64])),
        r"images.depth: got \[1, 32, 64\], expected \[3, H, W\] \(depth pictures are not supp",
    ),
    "several sizes": (
        features(**STATE_AND_TOP, observation__images__wrist=("VISUAL", [3, 64, 64])),
        "cameras of sizes .*several sizes in one policy are not supported",
    ),
    "no state": (
        features(observation__images__top=("VISUAL", [3, 32, 64])),
        "expected at least one camera and 'observation.state'",
    ),
    "a feature of no type": (
        features(**STATE_AND_TOP, observation__x=("REWARD", [1])),
        "observation.x: got type 'REWARD', expected",
    ),
    "the action is none": (
        edit_json("config.json", output_features={"action": {"type": "STATE", "shape": [2]}}),
        "action: got type 'STATE', expected ACTION",
    ),
    "two cameras become one": (renames(a="top", b="top"), "got both .*images.a.*images.b"),
    "a camera renamed away": (renames(top="front"), "nothing becomes 'observation.images.top'"),
    "the state renamed away": (
        edit_step(RENAME, rename_map={"observation.state": "observation.old"}),
        "nothing becomes 'observation.state'",
    ),
    "a camera twice": (
        edit_step(RENAME, rename_map={TOP: "observation.images.wrist", "observation.top": TOP}),
        r"got cameras \['top', 'top'\], expected different names",
    ),
    "renamed to a number": (edit_step(RENAME, rename_map={TOP: 3}), "rename_map: got .*names"),
    "renamed twice": (
        lambda f: renames(a="top")(f) or add_step(RENAME, 1, rename_map={"b": "c"})(f),
        "got a second rename_map, or one after 'normalizer_processor'",
    ),
    "renamed behind the normalizer": (
        add_step(RENAME, 9, rename_map={"b": "c"}),
        "got a second rename_map, or one after 'normalizer_processor'",
    ),
    "renamed behind the policy": (
        add_step(RENAME, 0, "post", rename_map={"b": "c"}),
        "policy_postprocessor.json: rename_obs.*expected none after the policy",
    ),
    "half numbers": (
        edit_step("device_processor", float_dtype="float16"),
        "device_processor: float_dtype: got 'float16', expected null or 'float32'",
    ),
    "half numbers behind": (
        edit_step("device_processor", "post", float_dtype="bfloat16"),
        "policy_postprocessor.json: device_processor: float_dtype: got 'bfloat16'",
    ),
    "a key of a step nobody knows": (
        edit_step("device_processor", pin_memory=True),
        r"device_processor: pin_memory: unknown key \(got True\), expected \['device', 'float_dt",
    ),
    "statistics among the settings": (
        edit_step("normalizer_processor", stats={"action": {}}),
        "normalizer_processor: stats: unknown key",
    ),
    "a key beside the steps": (
        edit_json("policy_preprocessor.json", version=2),
        "policy_preprocessor.json: version: unknown key",
    ),
    "a crop": (
        add_step("image_crop_resize_processor", 1, resize_size=[32, 64]),
        "'image_crop_resize_processor' is not supported, .*cameras in metronome.yaml instead",
    ),
    "a class": (
        lambda f: edit_processor(f, lambda s: s.append({"class": "mine.Step", "config": {}})),
        "step 'mine.Step' is not supported, .*-m python:MODULE:FACTORY",
    ),
    "relative actions": (
        add_step("relative_actions_processor", 1, enabled=True),
        "relative_actions_processor: enabled: got True, expected false",
    ),
    "absolute actions": (
        add_step("absolute_actions_processor", 1, "post", enabled=True),
        "absolute_actions_processor: enabled: got True, expected false",
    ),
    "normalized twice": (
        add_step("normalizer_processor", 1, features={}, norm_map={}),
        "got 2 steps 'normalizer_processor', expected one",
    ),
    "normalized behind the policy": (
        add_step("normalizer_processor", 1, "post", features={}, norm_map={}),
        "policy_postprocessor.json: step 'normalizer_processor' is not supported",
    ),
    "a state file elsewhere": (
        lambda f: edit_processor(f, lambda s: s[-1].update(state_file="../x.safetensors")),
        "state_file: got '../x.safetensors', expected a plain file name",
    ),
    "no state file": (
        lambda f: edit_processor(f, lambda s: s[-1].pop("state_file")),
        "policy_preprocessor.json: key 'observation.state.mean' is missing, which STATE MEAN_STD",
    ),
    "a negative eps": (
        edit_step("normalizer_processor", eps=-1),
        "eps: got -1, expected 0 or more",
    ),
    "a mode nobody knows": (
        edit_step("normalizer_processor", norm_map={"STATE": "ROBUST"}),
        "norm_map: STATE: got 'ROBUST', expected one of .*QUANTILE10",
    ),
    "a type nobody knows": (
        edit_step("normalizer_processor", norm_map={"FORCE": "MEAN_STD"}),
        "norm_map: FORCE: got 'MEAN_STD'",
    ),
    "a feature's type nobody knows": (
        edit_step("normalizer_processor", features={TOP: {"type": "FORCE", "shape": [3]}}),
        "features: observation.images.top: got type 'FORCE'",
    ),
    "a feature is not normalized": (
        edit_step("normalizer_processor", features={TOP: {"type": "VISUAL", "shape": [3]}}),
        "features: 'observation.state' is missing, .*normalize_observation_keys",
    ),
    "keys that are no list": (
        edit_step("normalizer_processor", normalize_observation_keys="observation.state"),
        "normalize_observation_keys: got 'observation.state', expected a list",
    ),
    "a state's deviations are missing": (
        edit_tensors(observation__state__std=None),
        "key 'observation.state.std' is missing, which STATE MEAN_STD .*or set their type to IDEN",
    ),
    "a camera's statistics are missing": (
        edit_tensors(observation__images__wrist__mean=None, observation__images__wrist__std=None),
        "key 'observation.images.wrist.mean' is missing, which VISUAL MEAN_STD",
    ),
    "a mean is no number": (
        edit_tensors(observation__state__mean=[0.0, float("nan"), 0.0]),
        r"observation.state.mean: got \[0.0, nan, 0.0\], expected finite numbers",
    ),
    "a mean of another robot": (
        edit_tensors(action__mean=[0.0] * 7),
        r"action.mean: got shape \(7,\), expected \(2,\)",
    ),
    "statistics of every pixel": (
        edit_tensors(observation__images__top__mean=[[[0.5, 0.5]] * 2] * 3),
        r"top.mean: got shape \(3, 2, 2\), expected \(3, 1, 1\)",
    ),
    "nothing to divide by": (
        lambda f: (
            edit_step("normalizer_processor", eps=0)(f)
            or edit_tensors(observation__state__std=[1.0, 0.0, 1.0])(f)
        ),
        r"observation.state: .*scale is \[0.\] in dimensions \[1\], expected a positive number",
    ),
    "a negative deviation": (
        edit_tensors(action__std=[1.0, -1.0]),
        r"action: .*scale is \[-1.\] in dimensions \[1\], expected a positive number",
    ),
    "a mean is missing": (
        lambda f: save_file({"action.std": torch.ones(2)}, next(f.glob("*_0_unnorm*.safetensors"))),
        "key 'action.mean' is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEROBOT_REFUSALS)
def test_wrong_lerobot_checkpoints_are_refused_by_name(tmp_path, case):
    save_lerobot(tmp_path / "c", saved())
    edit, message = LEROBOT_REFUSALS[case]
    edit(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message):
        load_weights(str(tmp_path / "c"))


def test_wrong_original_checkpoints_are_refused_by_name(tmp_path):
    folder = tmp_path / "original"
    write_original(folder, saved())
    arguments = {"camera_names": ["top", "wrist"], "n_heads": 2, "image_hw": (32, 64)}
    load_weights(str(folder), **arguments)
    with pytest.raises(CheckpointError, match=r"dataset_id: got 'x', expected none: the original"):
        load_weights(str(folder), dataset_id="x", **arguments)
    stats = folder / "dataset_stats.pkl"
    stats.write_bytes(pickle.dumps({"qpos_mean": np.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"'qpos_std' is missing: no normalizer"):
        load_weights(str(folder), **arguments)
    path = folder / "policy_best.ckpt"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"policy_best.ckpt: truncated, or no plain state"):
        load_weights(str(folder), **arguments)
    torch.save({"model": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(CheckpointError, match=r"policy_best.ckpt: truncated, or no plain state"):
        load_weights(str(folder), **arguments)


def test_the_originals_deviations_are_taken_as_they_are(tmp_path):
    folder = tmp_path / "original"
    write_original(folder, saved())
    stats = folder / "dataset_stats.pkl"
    table = pickle.loads(stats.read_bytes())
    arguments = {"camera_names": ["top", "wrist"], "n_heads": 2, "image_hw": (32, 64)}
    for smallest in (0.001, 0.01):
        table["qpos_std"][1] = table["action_std"][0] = smallest
        stats.write_bytes(pickle.dumps(table))
        weights = load_weights(str(folder), **arguments)
        assert weights.state_normalizer.scale[1] == np.float32(smallest)
        assert weights.action_normalizer.scale[0] == np.float32(smallest)
    table["qpos_std"][1] = 0
    stats.write_bytes(pickle.dumps(table))
    with pytest.raises(CheckpointError, match=r"stats.pkl: qpos: .* in dimensions \[1\], expected"):
        load_weights(str(folder), **arguments)
    table["qpos_std"][1], table["action_std"][0] = 1, 0
    table.update(action_min=np.full(9, np.nan), example_qpos=None)
    stats.write_bytes(pickle.dumps(table))
    normalizer = load_weights(str(folder), **arguments).action_normalizer
    still, moving = normalizer.denormalize(np.float32([[-9, 0], [9, 1]])).T
    np.testing.assert_array_equal(still, np.float32([1, 1]))
    assert moving[0] != moving[1]


def edit_stats(folder, change):
    path = folder / "t_stats_joint_abs.pkl"
    stats = pickle.loads(path.read_bytes())
    change(stats)
    path.write_bytes(pickle.dumps(stats))


def kinds(state, action):
    return edit_json("normalize.json", state={"t": state}, action={"t": action})


def test_what_affects_no_action_may_be_missing(tiny):
    """The projection of zeros; not that of the second decoder layer's input."""
    policy = load_policy(str(tiny), device="cpu")
    obs = observation(policy.contract)
    before = policy.infer(obs).actions
    gone = ("model.transformer.decoder.layers.0.self_attn.in_proj_weight", "model.pos_table")
    edit_weights(lambda tensors: [tensors.pop(name) for name in gone])(tiny)
    after = load_policy(str(tiny), device="cpu").infer(obs).actions
    assert after.tobytes() == before.tobytes()
    bias = gone[0].replace("weight", "bias")
    edit_weights(lambda tensors: tensors.pop(bias))(tiny)
    with pytest.raises(CheckpointError, match=f"key '{bias}' is missing"):
        load_policy(str(tiny), device="cpu")


def test_the_projection_of_a_constant_may_be_in_its_bias(tiny):
    before = load_policy(str(tiny), device="cpu")
    obs = observation(before.contract)
    layer = "model.transformer.decoder.layers.0.self_attn."
    output = layer + "out_proj."

    def fold(tensors):
        values = tensors[layer + "in_proj_bias"].chunk(3)[2]
        tensors[output + "bias"] += tensors.pop(output + "weight").float() @ values

    edit_weights(fold)(tiny)
    with pytest.raises(CheckpointError, match=f"key '{output}weight' is missing"):
        load_policy(str(tiny), device="cpu")  # with a projection of the input it is no constant
    edit_weights(lambda tensors: tensors.pop(layer + "in_proj_weight"))(tiny)
    after = load_policy(str(tiny), device="cpu").infer(obs).actions
    np.testing.assert_allclose(after, before.infer(obs).actions, rtol=1e-5, atol=1e-6)


FIRST_LAYER = "model.transformer.decoder.layers.0."
IN_PROJ = FIRST_LAYER + "multihead_attn.in_proj_weight"
NORM = "model.backbones.0.0.body.bn1."


def fold_queries(tensors):
    """Into the queries' positions; what is added to them there is the output of ``norm1``."""
    tensors.update({name: tensor.float() for name, tensor in tensors.items()})
    own, norm, cross = (FIRST_LAYER + name for name in ("self_attn.", "norm1.", "multihead_attn."))
    values = tensors[own + "in_proj_bias"].chunk(3)[2]
    attended = tensors[own + "out_proj.weight"] @ values + tensors[own + "out_proj.bias"]
    norms = tensors[norm + "weight"], tensors[norm + "bias"]
    constant = torch.nn.functional.layer_norm(attended, attended.shape, *norms)
    parts = [tensors[f"{cross}in_proj_{part}"].chunk(3) for part in ("weight", "bias")]
    (weight, *_), (bias, *_) = parts
    queries = tensors["model.query_embed.weight"]
    tensors["model.query_embed.weight"] = (queries + constant) @ weight.T + bias - constant
    for part, (_, keys, values) in zip(("weight", "bias"), parts, strict=True):
        tensors[f"{cross}in_proj_{part}"] = torch.cat((keys, values))


def fold_norms(tensors):
    for name in [key for key in tensors if key.endswith("running_mean")]:
        norm = name.removesuffix("running_mean")
        parts = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = (tensors.pop(norm + part) for part in parts)
        tensors[norm + "scale"] = weight / torch.sqrt(var + 1e-5)
        tensors[norm + "shift"] = bias - mean * tensors[norm + "scale"]


def drop_latent(tensors):
    tensors.pop("model.latent_out_proj.weight")


@pytest.mark.parametrize("fold", [fold_queries, fold_norms, drop_latent])
def test_what_is_constant_may_be_folded(tiny, fold):
    before = infer(tiny, engine="torch")
    edit_weights(fold)(tiny)
    np.testing.assert_allclose(infer(tiny, engine="torch"), before, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NORM + "running_mean"), f"key '{NORM}running_mean' is missing"),
        (
            lambda w: w.update({NORM + "scale": torch.ones(64)}),
            f"1 unknown keys, the first '{NORM}scale'",
        ),
        (
            lambda w: [fold_norms(w), w.pop(NORM + "shift")],
            f"1 unknown keys, the first '{NORM}scale'",
        ),
        (
            lambda w: w.update({IN_PROJ: w[IN_PROJ][:17].clone()}),
            r"in_proj_weight: got shape \(17, 16\), expected \(48, 16\)",
        ),
    ],
    ids=["statistics", "a scale beside them", "a scale alone", "rows of queries"],
)
def test_what_is_folded_in_part_is_refused(tiny, change, message):
    edit_weights(change)(tiny)
    with pytest.raises(CheckpointError, match=message):
        load_weights(str(tiny))


def test_a_style_encoder_needs_the_projection_of_its_latent(tiny):
    edit_weights(lambda w: w.update({"model.cls_embed.weight": torch.ones(1, 16)}))(tiny)
    edit_weights(drop_latent)(tiny)
    with pytest.raises(CheckpointError, match=r"key 'model.latent_out_proj.weight' is missing"):
        load_weights(str(tiny))


def test_queries_of_several_decoder_layers_are_not_folded(tmp_path):
    config = dataclasses.replace(TINY, n_decoder_layers=2)
    save_lerobot(tmp_path / "a", saved(config))
    name = "model.decoder.layers.0.multihead_attn.in_proj_weight"
    edit_weights(lambda w: w.update({name: w[name][16:].clone()}))(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"got shape \(32, 16\), expected \(48, 16\)"):
        load_weights(str(tmp_path / "a"))


@pytest.mark.parametrize("kind", ["minmax", "percentile"])
def test_an_action_of_ilstudio_that_never_moved_is_a_constant(tiny, kind):
    kinds("zscore", kind)(tiny)

    def still(stats):
        for name in ("min", "max", "q01", "q99"):
            stats["action"][name][1] = 0.25

    edit_stats(tiny, still)
    back = load_weights(str(tiny)).action_normalizer.denormalize(np.float32([[-1, -1], [0, 9]]))
    np.testing.assert_array_equal(back[:, 1], [0.25, 0.25])
    kinds(kind, "zscore")(tiny)
    edit_stats(tiny, lambda stats: stats["state"].update(stats["action"]))
    with pytest.raises(CheckpointError, match=r"state: .*scale is \[0.\] in dimensions \[1\]"):
        load_weights(str(tiny))


def test_statistics_of_ilstudio_that_nobody_uses_may_be_anything(tiny):
    wanted = load_weights(str(tiny)).contract()
    edit_stats(
        tiny,
        lambda stats: (
            stats["state"].update(min=[np.nan], q01=None, note="words"),
            stats["action"].pop("max"),
            stats.update(num_transitions=7),
        ),
    )
    assert load_weights(str(tiny)).contract() == wanted
    kinds("identity", "identity")(tiny)
    (tiny / "t_stats_joint_abs.pkl").unlink()
    weights = load_weights(str(tiny))
    for normalizer, dim in ((weights.state_normalizer, 3), (weights.action_normalizer, 2)):
        np.testing.assert_array_equal(normalizer.denormalize(np.ones(dim)), np.ones(dim))


def test_minmax_statistics_of_lerobot(tmp_path):
    save_lerobot(tmp_path / "c", saved())
    for name in ("pre", "post"):
        path = tmp_path / "c" / f"policy_{name}processor.json"
        path.write_text(path.read_text().replace('"ACTION": "MEAN_STD"', '"ACTION": "MIN_MAX"'))
    normalizer = load_weights(str(tmp_path / "c")).action_normalizer
    np.testing.assert_array_equal(normalizer.denormalize(np.array([-1.0, 1.0])), [-2.0, 2.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "gone", "gone: no such checkpoint"),
        (lambda p: p, "unknown layout of a checkpoint: expected config.json"),
        (lambda p: (p / "f").write_text("") or p / "f", "got a file, expected a checkpoint's fol"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, make, message):
    with pytest.raises(CheckpointError, match=message):
        load_policy(str(make(tmp_path)))


def test_a_policy_needs_no_style_encoder(tmp_path):
    given = saved(dataclasses.replace(TINY, n_style_layers=3))
    save_ilstudio(tmp_path / "a", given)
    assert isinstance(load_policy(str(tmp_path / "a"), **HARMLESS), ActPolicy)


# --- layouts that are nearly ours ---------------------------------------------------------------


def hub_cache(folder, hub, commits=("abc",), refs=True):
    """``folder`` as the hub's cache keeps it: files are links to blobs."""
    for commit in commits:
        (hub / "snapshots" / commit).mkdir(parents=True)
        for file in folder.iterdir():
            (hub / "blobs").mkdir(exist_ok=True)
            shutil.copy(file, hub / "blobs" / file.name)
            (hub / "snapshots" / commit / file.name).symlink_to(hub / "blobs" / file.name)
    if refs:
        (hub / "refs").mkdir()
        (hub / "refs" / "main").write_text(commits[0] + "\n")
    return hub


def output_folder(folder, run, last=True):
    for step in (1000, 20000):
        shutil.copytree(folder, run / "checkpoints" / f"{step:06}" / "pretrained_model")
        (run / "checkpoints" / f"{step:06}" / "training_state").mkdir()
    (run / "checkpoints" / "001000" / "pretrained_model" / "config.json").write_text("{}")
    if last:
        (run / "checkpoints" / "last").symlink_to("020000")
    return run


PLACES = {
    "a cache of the hub": lambda c, p: hub_cache(c, p / "models--org--name"),
    "its only snapshot": lambda c, p: hub_cache(c, p / "models--org--name", refs=False),
    "a snapshot": lambda c, p: hub_cache(c, p / "models--org--name") / "snapshots" / "abc",
    "an output folder": lambda c, p: output_folder(c, p / "run"),
    "an output folder without links": lambda c, p: output_folder(c, p / "run", last=False),
    "its checkpoints": lambda c, p: output_folder(c, p / "run") / "checkpoints",
    "the last of them": lambda c, p: output_folder(c, p / "run") / "checkpoints" / "last",
    "one of them": lambda c, p: output_folder(c, p / "run") / "checkpoints" / "020000",
}


@pytest.fixture(scope="module")
def lerobot_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lerobot") / "c"
    save_lerobot(folder, saved())
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_is_found_where_others_keep_it(lerobot_folder, tmp_path, place):
    found = find_folder(PLACES[place](lerobot_folder, tmp_path))
    assert json.loads((found / "config.json").read_text())["type"] == "act"
    assert (found / "model.safetensors").is_file()


def test_a_cache_of_several_snapshots_is_asked_about(lerobot_folder, tmp_path):
    hub = hub_cache(lerobot_folder, tmp_path / "models--o--n", ("abc", "def"), refs=False)
    with pytest.raises(CheckpointError, match=r"with 2 snapshots, .*abc.*def"):
        load_weights(str(hub))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("def")
    assert find_folder(hub).name == "def"


def test_metronome_yaml_may_lie_where_the_user_points(lerobot_folder, tmp_path):
    run = output_folder(lerobot_folder, tmp_path / "run")
    (run / "checkpoints/020000/pretrained_model/metronome.yaml").rename(run / "metronome.yaml")
    (run / "metronome.yaml").write_text("{dt_s: 0.04, action_names: [a, b]}")
    contract = load_weights(str(run)).contract()
    assert (contract.dt_s, contract.action_names) == (0.04, ("a", "b"))
    (run / "metronome.yaml~").write_text("dt_s: 0.05")
    assert load_weights(str(run)).dt_s == 0.04
    (run / "metronome.yml").write_text("dt_s: 0.05")
    with pytest.raises(CheckpointError, match=r"run/metronome.yml: got this name"):
        load_weights(str(run))
    (run / "metronome.yml").unlink()
    (run / "checkpoints/020000/pretrained_model/metronome.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"got both .*metronome.*expected one"):
        load_weights(str(run))


def shard(folder):
    """The weights of ``folder`` in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    places = {key: f"model-{1 + (i % 2)}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(places.values()):
        save_file({k: v for k, v in tensors.items() if places[k] == name}, folder / name)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_in_several_files_are_read(tiny, lerobot_folder, tmp_path):
    shutil.copytree(lerobot_folder, tmp_path / "lerobot")
    for folder in (tiny, tmp_path / "lerobot"):
        whole = load_weights(str(folder)).tensors
        shard(folder)
        parts = load_weights(str(folder)).tensors
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    index = tiny / "model.safetensors.index.json"
    good = index.read_text()
    for change, message in (
        (lambda m: m.update(extra="model-1.safetensors"), "extra: not in 'model-1.safetensors'"),
        (lambda m: m.update(extra="../x"), "got '../x', expected a plain file name"),
        (lambda m: m.popitem(), "got None, but it is in 'model-"),
    ):
        raw = json.loads(good)
        change(raw["weight_map"])
        index.write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match=message):
            load_weights(str(tiny))


@pytest.mark.parametrize("with_config", [True, False])
def test_adapters_alone_are_told_what_they_are(lerobot_folder, tmp_path, with_config):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    if with_config:
        shutil.copy(lerobot_folder / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter weights only .*merge_and_unload"):
        load_weights(str(tmp_path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_file(tiny, encoding):
    wanted = load_weights(str(tiny)).contract()
    for name in ("config.json", "normalize.json", "policy_metadata.json"):
        text = (tiny / name).read_text()
        (tiny / name).write_text(text, encoding=encoding)
    text = (tiny / "metronome.yaml").read_text()
    (tiny / "metronome.yaml").write_text(text, encoding="utf-8-sig")
    assert load_weights(str(tiny)).contract() == wanted


def test_a_home_is_found(tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert load_weights(f"~/{tiny.name}").contract().state_dim == 3
    with pytest.raises(CheckpointError, match="~nobody-of-that-name/x: "):
        load_weights("~nobody-of-that-name/x")


def test_only_our_own_layout_is_packed(tmp_path, monkeypatch):
    monkeypatch.setattr("policies.checkpoint.save.pack", functools.partial(pack, packed_from=1))
    given = saved()
    for save in (save_ilstudio, save_lerobot):
        for stored_as in ("bf16", "bf16_packed"):
            save(tmp_path / save.__name__ / stored_as, given, stored_as=stored_as)
        plain, packed = (
            load_file(tmp_path / save.__name__ / each / "model.safetensors")
            for each in ("bf16", "bf16_packed")
        )
        assert (plain.keys() == packed.keys()) == (save is save_lerobot)
        if save is save_ilstudio:
            assert unpack(packed).keys() == plain.keys()
