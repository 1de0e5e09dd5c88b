"""Mobile ALOHA's and Agilex's ACT, which have a backbone for each camera, are read and computed."""

from __future__ import annotations

import dataclasses
import pickle
import shutil

import numpy as np
import plain_detr
import pytest
import torch
from tiny_act import needs_openvino

from policies.checkpoint.extras import Extras
from policies.checkpoint.load import load_policy, load_weights
from policies.checkpoint.save import Saved
from policies.checkpoint.untrained import make_untrained
from policies.errors import CheckpointError
from policies.execution import Execution
from policies.types import CameraContract, MetaObs

EXACT = 1e-5
"""Of max|a - b| / max|b|."""
CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
HEADS = 2
SIZES = {
    "cameras": 3, "backbones": 3, "state": 14, "action": 16, "chunk": 6, "width": 16,
    "feedforward": 24, "encoders": 2, "decoders": 3,
}  # fmt: skip
IMAGE_HW = (70, 96)
ARGUMENTS = {"camera_names": CAMERAS, "n_heads": HEADS, "image_hw": IMAGE_HW}
ENGINES = [{"engine": "torch"}, pytest.param({"engine": "openvino"}, marks=needs_openvino)]
AGILEX = {**SIZES, "state": 16}
"""With the mobile base."""


def stats_of(sizes):
    """``dataset_stats.pkl``'s content, as the descendants write it."""
    random = np.random.default_rng(1)
    table = {"example_qpos": random.normal(size=(9, sizes["state"]))}
    for name, dim in (("qpos", sizes["state"]), ("action", sizes["action"])):
        table[f"{name}_mean"] = random.normal(size=dim).astype(np.float32)
        table[f"{name}_std"] = random.uniform(0.01, 0.5, dim).astype(np.float32)
    table["action_min"] = table["action_mean"] - 1
    table["action_max"] = table["action_mean"] + 1
    return table


def write(folder, tensors, stats, settings=None, extras=""):
    """A checkpoint's folder."""
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "policy_best.ckpt")
    (folder / "dataset_stats.pkl").write_bytes(pickle.dumps(stats))
    if settings is not None:
        (folder / "config.pkl").write_bytes(pickle.dumps(settings))
    if extras:
        (folder / "metronome.yaml").write_text(extras)
    return str(folder)


@pytest.fixture(scope="module")
def mobile_aloha():
    """act-plus-plus's weights; not to be changed."""
    return plain_detr.random_state(**SIZES)


@pytest.fixture(scope="module")
def agilex():
    """cobot_magic's weights, with the base among states and actions; not to be changed."""
    return plain_detr.as_agilex(plain_detr.random_state(**AGILEX))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, mobile_aloha):
    """act-plus-plus's; not to be changed."""
    return write(tmp_path_factory.mktemp("mobile_aloha"), mobile_aloha, stats_of(SIZES))


@pytest.fixture(autouse=True)
def _removed(tmp_path):
    """Three backbones are 130 MB: nothing is kept after a test."""
    yield
    shutil.rmtree(tmp_path)


def without_backbones(tensors):
    """What is refused before they are looked at needs none."""
    return {k: v for k, v in tensors.items() if not k.startswith("model.backbones.")}


def settings(**changes):
    """act-plus-plus's ``config.pkl``."""
    network = {
        "num_queries": 6, "hidden_dim": 16, "backbone": "resnet18", "nheads": HEADS,
        "camera_names": list(CAMERAS), "vq": False, "vq_class": None, "action_dim": 16,
    }  # fmt: skip
    given = {
        "policy_class": "ACT", "camera_names": list(CAMERAS), "temporal_agg": False,
        "real_robot": True, "policy_config": network,
        "actuator_config": {"actuator_network_dir": None, "history_len": None},
    }  # fmt: skip
    network.update({k: v for k, v in changes.items() if k in network})
    given.update({k: v for k, v in changes.items() if k not in network})
    return given


def observation(sizes, seed=0):
    """Pictures (N, H, W, 3) uint8 and a state (S,) float32, in physical units."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (sizes["cameras"], *IMAGE_HW, 3), dtype=np.uint8)
    return images, random.normal(size=sizes["state"]).astype(np.float32)


def expected(tensors, stats, images, state, which="action"):
    """By the step-by-step network and the original's own normalization."""
    normalized = torch.from_numpy((state - stats["qpos_mean"]) / stats["qpos_std"])
    both = {"model.additional_pos_embed.weight": torch.cat(
        [tensors[k] for k in ("model.latent_pos.weight", "model.robot_state_pos.weight")]
    )} if "model.latent_pos.weight" in tensors else {}  # fmt: skip
    actions = plain_detr.actions(
        {**tensors, **both}, torch.from_numpy(images), normalized, n_heads=HEADS
    )
    return actions.numpy() * stats[f"{which}_std"] + stats[f"{which}_mean"]


def infer(path, images, state, **arguments):
    with_defaults = {"device": "cpu", "precision": "fp32", "threads": 1, **arguments}
    policy = load_policy(path, **with_defaults)
    names = policy.contract.camera_names
    try:
        return policy.infer(MetaObs(dict(zip(names, images, strict=True)), state)).actions
    finally:
        policy.close()


def error(got, want):
    return float(np.abs(got - want).max() / np.abs(want).max())


# --- what is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_mobile_alohas_checkpoint_gives_its_actions(
    checkpoint, mobile_aloha, engine, monkeypatch, tmp_path
):
    monkeypatch.setenv("METRONOME_CACHE", str(tmp_path))
    images, state = observation(SIZES)
    want = expected(mobile_aloha, stats_of(SIZES), images, state)
    assert want.shape == (6, 16)
    assert error(infer(checkpoint, images, state, **ARGUMENTS, **engine), want) <= EXACT


@pytest.mark.parametrize("which", ["action", "qpos"])
@pytest.mark.parametrize("engine", ENGINES)
def test_agilexs_checkpoint_gives_its_actions(tmp_path, agilex, engine, which, monkeypatch):
    monkeypatch.setenv("METRONOME_CACHE", str(tmp_path))
    stats = stats_of(AGILEX)
    path = write(tmp_path / "c", agilex, stats, extras=f"action_statistics: {which}")
    images, state = observation(AGILEX)
    want = expected(agilex, stats, images, state, which)
    assert error(infer(path, images, state, **ARGUMENTS, **engine), want) <= EXACT


def test_the_plain_network_gives_them_too(checkpoint, mobile_aloha):
    weights = load_weights(checkpoint, **ARGUMENTS)
    assert weights.config.backbone_per_camera
    images, state = observation(SIZES)
    normalized = weights.state_normalizer.normalize(state)
    with torch.inference_mode():
        actions = weights.inference_model()(
            torch.from_numpy(images[None]), torch.from_numpy(normalized[None])
        )
    want = expected(mobile_aloha, stats_of(SIZES), images, state)
    assert error(weights.action_normalizer.denormalize(actions[0].numpy()), want) <= EXACT


def test_each_camera_needs_its_own_backbone(checkpoint):
    """With the cameras in another order the actions are others: the order must be right."""
    images, state = observation(SIZES)
    straight = infer(checkpoint, images, state, engine="torch", **ARGUMENTS)
    turned = infer(checkpoint, images[::-1], state, engine="torch", **ARGUMENTS)
    assert error(turned, straight) > 100 * EXACT


def test_one_backbone_is_one_for_all_cameras(tmp_path):
    sizes = {**SIZES, "backbones": 1, "cameras": 2}
    tensors, stats = plain_detr.random_state(**sizes), stats_of(sizes)
    path = write(tmp_path / "c", tensors, stats)
    images, state = observation(sizes)
    arguments = {**ARGUMENTS, "camera_names": ("a", "b")}
    assert not load_weights(path, **arguments).config.backbone_per_camera
    got = infer(path, images, state, engine="torch", **arguments)
    assert error(got, expected(tensors, stats, images, state)) <= EXACT


# --- what lies around the network ---------------------------------------------------------------


def without_style_encoder(tensors):
    return {k: v for k, v in tensors.items() if not k.startswith("model.encoder.")}


def with_a_transformer_as_style_encoder(tensors):
    """As act-plus-plus's code builds it before anybody mends it."""
    prefix = "model.transformer."
    whole = {
        f"model.encoder.{k.removeprefix(prefix)}": v
        for k, v in tensors.items()
        if k.startswith(prefix)
    }
    return {**without_style_encoder(tensors), **whole}


def with_what_older_versions_wrote(tensors):
    return {**tensors, "model.input_proj_next_action.weight": torch.zeros(16, 16),
            "model.input_proj_next_action.bias": torch.zeros(16)}  # fmt: skip


def without_the_style_at_all(tensors):
    names = ("cls_embed", "encoder_action_proj", "encoder_joint_proj", "latent_proj", "pos_table")
    kept = without_style_encoder(tensors)
    return {k: v for k, v in kept.items() if k.split(".")[1] not in names}


@pytest.mark.parametrize(
    "change",
    [
        without_style_encoder,
        with_a_transformer_as_style_encoder,
        with_what_older_versions_wrote,
        without_the_style_at_all,
    ],
)
def test_what_only_training_needs_may_be_there_or_not(tmp_path, checkpoint, mobile_aloha, change):
    path = write(tmp_path / "c", change(mobile_aloha), stats_of(SIZES))
    whole = load_weights(checkpoint, **ARGUMENTS)
    got = load_weights(path, **ARGUMENTS)
    trunk = {k for k in whole.tensors if not k.startswith("style.")}
    assert {k for k in got.tensors if not k.startswith("style.")} == trunk
    assert all(torch.equal(got.tensors[k], whole.tensors[k]) for k in trunk)


def test_a_checkpoint_whose_evaluation_averages_is_played_so(tmp_path, mobile_aloha):
    stats = stats_of(SIZES)
    plain = load_weights(write(tmp_path / "a", mobile_aloha, stats, settings()), image_hw=IMAGE_HW)
    assert plain.contract().execution is None
    path = write(tmp_path / "b", mobile_aloha, stats, settings(temporal_agg=True))
    said = load_weights(path, image_hw=IMAGE_HW).contract().execution
    assert said == Execution("temporal_ensemble", 0.01, 1)
    assert said.source == "config.pkl: temporal_agg"


def test_what_config_pkl_says_need_not_be_said_again(tmp_path, mobile_aloha):
    path = write(tmp_path / "c", mobile_aloha, stats_of(SIZES), settings())
    weights = load_weights(path, image_hw=IMAGE_HW)
    assert tuple(camera.name for camera in weights.cameras) == CAMERAS
    assert weights.config.n_heads == HEADS
    names = ("top", "left", "right")
    renamed = load_weights(path, image_hw=IMAGE_HW, camera_names=names)
    assert tuple(camera.name for camera in renamed.cameras) == names


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ({"camera_names": CAMERAS[::-1]}, {}, "config.pkl: camera_names: got .* in this order"),
        ({"camera_names": ("top", "x", "cam_high")}, {}, "config.pkl: camera_names: got .*in this"),
        ({"camera_names": CAMERAS[:2]}, {}, "config.pkl: camera_names: got .* in this order"),
        ({"n_heads": 4}, {}, "config.pkl: n_heads: got 4, expected 2"),
        ({}, {"policy_class": "Diffusion"}, "policy_class: got 'Diffusion', expected 'ACT'"),
        ({}, {"vq": True, "vq_class": 32}, "config.pkl: use_vq: got True, expected False"),
        ({}, {"camera_names": []}, r"config.pkl: camera_names: got \[\], expected names"),
        ({}, {"nheads": "8"}, "config.pkl: nheads: got '8', expected int"),
        ({}, {"temporal_agg": 1}, "config.pkl: temporal_agg: got 1, expected a bool"),
        ({}, {"policy_config": None}, "config.pkl: policy_config: got None, expected dict"),
    ],
)
def test_what_contradicts_config_pkl_is_refused(tmp_path, mobile_aloha, given, changes, message):
    tensors = without_backbones(mobile_aloha)
    path = write(tmp_path / "c", tensors, stats_of(SIZES), settings(**changes))
    with pytest.raises(CheckpointError, match=message):
        load_weights(path, image_hw=IMAGE_HW, **given)


# --- what is not said ---------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["camera_names", "n_heads"])
def test_names_and_heads_are_asked_for(checkpoint, missing):
    arguments = {k: v for k, v in ARGUMENTS.items() if k != missing}
    with pytest.raises(CheckpointError, match=f"does not hold {missing}: give it"):
        load_weights(checkpoint, **arguments)


def test_whose_statistics_agilexs_actions_have_is_asked_for(tmp_path, agilex):
    stats = stats_of(AGILEX)
    path = write(tmp_path / "c", agilex, stats)
    with pytest.raises(CheckpointError, match=r"does not say which: expected 'action_statistics: "):
        load_weights(path, **ARGUMENTS)
    for part in ("mean", "std"):
        stats[f"action_{part}"] = stats[f"qpos_{part}"]
    load_weights(write(tmp_path / "c", agilex, stats), **ARGUMENTS)
    write(tmp_path / "c", agilex, stats, extras="action_statistics: joint")
    with pytest.raises(CheckpointError, match=r"action_statistics: got 'joint' .*expected one of"):
        load_weights(path, **ARGUMENTS)


def test_statistics_of_another_length_are_refused(tmp_path, mobile_aloha):
    path = write(tmp_path / "c", mobile_aloha, stats_of(SIZES), extras="action_statistics: qpos")
    with pytest.raises(CheckpointError, match=r"qpos: got 14 dimensions, expected 16"):
        load_weights(path, **ARGUMENTS)


def test_other_layouts_have_no_such_question(tmp_path):
    make_untrained(tmp_path / "c")
    yaml = tmp_path / "c" / "metronome.yaml"
    yaml.write_text(yaml.read_text() + "action_statistics: qpos\n")
    with pytest.raises(CheckpointError, match=r"action_statistics: got qpos, expected none"):
        load_weights(str(tmp_path / "c"))


@pytest.mark.parametrize("names", [CAMERAS[:1], CAMERAS[:2], (*CAMERAS, "cam_low")])
def test_a_camera_without_a_backbone_is_refused(checkpoint, names):
    with pytest.raises(CheckpointError, match=f"camera_names: got {len(names)}, expected 3: each"):
        load_weights(checkpoint, **{**ARGUMENTS, "camera_names": names})


# --- what is not supported ----------------------------------------------------------------------


def bottlenecks(blocks):
    third = "model.backbones.0.0.body.layer3."
    shown = {"model.backbones.0.0.body.layer1.0.conv3.weight": torch.zeros(1)}
    return {**shown, **{f"{third}{i}.conv3.weight": torch.zeros(1) for i in range(blocks)}}


UNSUPPORTED = {
    "depth": ({"model.depth_backbones.0.conv1.weight": torch.zeros(1)}, "use_depth_image: got T"),
    "cnnmlp": (
        {"model.backbone_down_projs.0.0.weight": torch.zeros(1)},
        "policy_class: got 'CNNMLP', expected 'ACT'",
    ),
    "env_state": ({"model.input_proj_env_state.weight": torch.zeros(1)}, "env_state: got a policy"),
    "pre_norm": ({"model.transformer.encoder.norm.weight": torch.zeros(1)}, "pre_norm: got True"),
    "learned positions": (
        {"model.backbones.0.1.row_embed.weight": torch.zeros(1)},
        "position_embedding: got 'learned', expected 'sine'",
    ),
    "resnet50": (bottlenecks(6), r"backbone: got 'resnet50', expected one of \('resnet18'"),
    "resnet101": (bottlenecks(23), "backbone: got 'resnet101', expected one of"),
    "vq": ({"model.latent_proj.weight": torch.zeros(32, 16)}, "use_vq: got True, expected False"),
    "latent": ({"model.latent_proj.weight": torch.zeros(9, 16)}, "expected 64 rows, a mean and"),
    "one number": (
        {"model.latent_proj.weight": torch.zeros(())},
        r"got shape \(\), expected 64 row",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_the_network_cannot_be_is_refused_by_name(tmp_path, mobile_aloha, case):
    extra, message = UNSUPPORTED[case]
    path = write(tmp_path / "c", {**without_backbones(mobile_aloha), **extra}, stats_of(SIZES))
    with pytest.raises(CheckpointError, match=message):
        load_weights(path, **ARGUMENTS)


def test_what_nobody_knows_is_refused(tmp_path, mobile_aloha):
    tensors = {**mobile_aloha, "model.new.weight": torch.zeros(1)}
    path = write(tmp_path / "c", tensors, stats_of(SIZES))
    with pytest.raises(CheckpointError, match=r"1 unknown keys, the first 'model.new"):
        load_weights(path, **ARGUMENTS)


AGILEX_DAMAGE = {
    "no latent": (lambda t: t.pop("model.latent_pos.weight"), "key 'model.latent_pos.weight' is m"),
    "two rows": (
        lambda t: t.update({"model.robot_state_pos.weight": torch.zeros(2, 16)}),
        r"robot_state_pos.weight: got shape \(2, 16\), expected one row",
    ),
    "another width": (
        lambda t: t.update({"model.robot_state_pos.weight": torch.zeros(1, 8)}),
        r"robot_state_pos.weight: got shape \(1, 8\), expected \(1, 16\)",
    ),
}


@pytest.mark.parametrize("case", AGILEX_DAMAGE)
def test_damaged_tables_of_positions_are_refused(tmp_path, agilex, case):
    change, message = AGILEX_DAMAGE[case]
    tensors = without_backbones(agilex)
    change(tensors)
    path = write(tmp_path / "c", tensors, stats_of(AGILEX), extras="action_statistics: action")
    with pytest.raises(CheckpointError, match=message):
        load_weights(path, **ARGUMENTS)


def test_layouts_with_one_backbone_cannot_hold_more(checkpoint, tmp_path):
    weights = load_weights(checkpoint, **ARGUMENTS)
    cameras = tuple(CameraContract(name, IMAGE_HW, IMAGE_HW) for name in CAMERAS)
    message = "backbone_per_camera: got True, expected False: neither ILStudio's layout nor LeRobot"
    with pytest.raises(CheckpointError, match=message):
        Saved(weights.config, weights.tensors, {}, "d", Extras(cameras=cameras))
    with pytest.raises(CheckpointError, match=message):
        make_untrained(tmp_path / "u", config=weights.config, cameras=cameras)
    assert not (tmp_path / "u").exists()
    shared = dataclasses.replace(weights.config, backbone_per_camera=False)
    make_untrained(tmp_path / "u", config=shared, cameras=cameras)
