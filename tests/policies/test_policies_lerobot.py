"""LeRobot's own files and LeRobot's own numbers: ours are the same.

What the archive holds was written by the real library, see ``lerobot_cases.py``.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot_cases import CASES, IMAGE, fill, observation
from safetensors.torch import load_file, save_file

from policies.act.policy import ActPolicy
from policies.checkpoint.load import load_weights
from policies.checkpoint.weight_folders import WEIGHTS
from policies.errors import CheckpointError
from policies.types import MetaObs

pytestmark = pytest.mark.usefixtures("full_width")  # LeRobot's own is as wide

VERSIONS = ("0.3.3", "0.4.4", "0.6.1")
ARCHIVE = Path(__file__).with_name("lerobot.tar.xz")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function that gives a case's folder, weights and all; each set of weights is made once."""
    root, made = tmp_path_factory.mktemp("lerobot"), {}
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(root, filter="data")

    def folder(version, name):
        path = root / version / name
        shapes = (path / "shapes.json").read_text()
        if shapes not in made:
            made[shapes] = root / f"{len(made)}.safetensors"
            tensors = {k: torch.from_numpy(v) for k, v in fill(json.loads(shapes)).items()}
            save_file(tensors, made[shapes])
        weights, buffers = path / WEIGHTS, path / "buffers.safetensors"
        if buffers.exists():
            save_file({**load_file(made[shapes]), **load_file(buffers)}, weights)
        elif not weights.exists():
            weights.hardlink_to(made[shapes])
        return path

    return folder


def written_cases():
    """Version and name of each, the versions in order."""
    with tarfile.open(ARCHIVE) as tar:
        found = sorted({Path(entry).parts[:2] for entry in tar.getnames()})
    assert {version for version, _ in found} == set(VERSIONS)
    return found


def check(folder, given, *, whole):
    """The errors of state, pixels and actions; of the network's answer, too, where ``whole``."""
    weights = load_weights(str(folder))
    pictures, state = observation(folder.name, given)
    with np.load(folder / "expected.npz") as expected:
        yield "state", weights.state_normalizer.normalize(state), expected["state"]
        norms = zip(pictures.values(), weights.image_mean, weights.image_std, strict=True)
        pixels = [
            (picture[::31, ::37] / 255 - np.float64(mean)) / np.float64(std)
            for picture, mean, std in norms
        ]
        yield "pixels", np.stack(pixels).transpose(0, 3, 1, 2), expected["pixels"]
        back = weights.action_normalizer.denormalize(expected["chunk"])
        yield "actions", back, expected["actions"]
        if whole:
            policy = ActPolicy(weights, device="cpu", engine="torch", precision="fp32", threads=1)
            robots = policy.contract.camera_names  # in the policy's order, as its pictures are
            obs = MetaObs(dict(zip(robots, pictures.values(), strict=True)), state)
            yield "chunk", policy.infer(obs).actions, expected["actions"]
            assert np.array_equal(expected["first"], expected["actions"][0])


@pytest.mark.parametrize(("version", "name"), written_cases())
def test_what_lerobot_wrote_gives_what_lerobot_computes(written, version, name):
    """The files of all versions; the network, which is the same in all, once."""
    folder = written(version, name)
    for what, got, wanted in check(folder, CASES[name], whole=version == VERSIONS[-1]):
        error = np.abs(got - wanted).max() / np.abs(wanted).max()
        assert error <= TOLERANCE, what


@pytest.mark.parametrize(
    ("name", "cameras"),
    [
        ("a renamed camera", ("cam_high", "wrist")),
        ("two cameras for each other", ("wrist", "front")),
        ("a renamed camera nobody needs", ("front", "wrist")),
        ("a camera without a name", ("image",)),
        ("three cameras", ("wrist", "front", "above")),
    ],
)
def test_cameras_have_the_robots_names(written, name, cameras):
    assert load_weights(str(written("0.6.1", name))).contract().camera_names == cameras


def test_a_step_that_names_the_actions_names_them(written):
    contract = load_weights(str(written("0.6.1", "steps without effect"))).contract()
    assert contract.action_names == tuple(f"joint_{i}" for i in range(6))


def to_first_generation(folder):
    """Its keys and names of 2024, as its versions of May to December wrote them."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    modes = raw.pop("normalization_mapping")
    for side in ("input", "output"):
        features = raw.pop(f"{side}_features")
        raw[f"{side}_shapes"] = {name: said["shape"] for name, said in features.items()}
        raw[f"{side}_normalization_modes"] = {
            name: modes[said["type"]].lower() for name, said in features.items()
        }
    for later in ("type", "device", "use_amp", "push_to_hub", "repo_id", "private", "tags"):
        raw.pop(later, None)
    kept = {key: value for key, value in raw.items() if not key.startswith("optimizer_")}
    # Not used then: the style encoder had as many layers as the encoder.
    path.write_text(json.dumps({**kept, "n_vae_encoder_layers": 9, "use_temporal_aggregation": 0}))
    tensors = load_file(folder / WEIGHTS)
    (new,) = (key for key in tensors if "encoder_1d_feature_pos_embed" in key)
    old = new.replace("1d_feature", "robot_and_latent")
    save_file({old if key == new else key: v for key, v in tensors.items()}, folder / WEIGHTS)
    return path


@pytest.mark.parametrize("name", ["as by default", "min and max", "no variational encoder"])
def test_the_first_generation_is_read(written, tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(written("0.3.3", name), folder)
    path = to_first_generation(folder)
    for what, got, wanted in check(folder, CASES[name], whole=True):
        assert np.abs(got - wanted).max() / np.abs(wanted).max() <= TOLERANCE, what
    raw = json.loads(path.read_text())
    for change, message in (
        ({"temporal_ensemble_momentum": 0.9}, "temporal_ensemble_momentum: got 0.9, expected"),
        ({"use_temporal_aggregation": True}, "use_temporal_aggregation: got True, expected"),
        ({"horizon": 16}, "config.json: horizon: unknown key"),
        ({"output_normalization_modes": None}, "output_normalization_modes: got None, expected"),
        (
            {
                "input_normalization_modes": {
                    f"{IMAGE}front": "mean_std",
                    f"{IMAGE}wrist": "min_max",
                }
            },
            "wrist: got mode 'min_max', expected one mode for all VISUAL",
        ),
    ):
        path.write_text(json.dumps({**raw, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_weights(str(folder))


def test_statistics_that_were_never_set_are_refused(written, tmp_path):
    """LeRobot initializes its buffers to infinity, and those of targets may stay it."""
    folder = tmp_path / "as by default"
    shutil.copytree(written("0.3.3", folder.name), folder)
    tensors = load_file(folder / WEIGHTS)
    for prefix, message in (
        ("normalize_targets", ""),
        ("normalize_inputs", r"normalize_inputs.buffer_observation_state.mean: got \[inf"),
    ):
        tensors |= {k: v + torch.inf for k, v in tensors.items() if k.startswith(prefix)}
        save_file(tensors, folder / WEIGHTS)
        if message:
            with pytest.raises(CheckpointError, match=message):
                load_weights(str(folder))
        else:
            load_weights(str(folder))
