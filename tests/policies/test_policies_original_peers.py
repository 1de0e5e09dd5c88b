"""Mobile ALOHA's and Agilex's own code, run by itself, commands what we compute.

Skipped without clones of theirs: METRONOME_ACT_PLUS_PLUS (github.com/MarkFzp/act-plus-plus) and
METRONOME_COBOT_MAGIC (github.com/agilexrobotics/cobot_magic) name their folders,
METRONOME_COBOT_MAGIC_OLD one of cobot_magic at commit f6af1ec, before its change of statistics, and
METRONOME_PEER_PYTHON a Python with torch, torchvision, einops, h5py and matplotlib.
METRONOME_PEER_FULL=1 runs the networks at their full size, too: three cameras of 480x640.
``--log-level=INFO -rP`` shows the figures.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_act import needs_openvino

from policies.checkpoint.load import load_policy, load_weights
from policies.types import MetaObs

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("full_width")]

EXACT = 1e-5
"""Of max|a - b| / max|b|."""
CLONES = {
    "mobile_aloha": "METRONOME_ACT_PLUS_PLUS",
    "agilex": "METRONOME_COBOT_MAGIC",
    "agilex_old": "METRONOME_COBOT_MAGIC_OLD",
}
SCRIPT = Path(__file__).with_name("original_peer.py")
NAMES = ("cam_high", "cam_left_wrist", "cam_right_wrist")
BASE_DELAY = 13
"""Ticks by which act-plus-plus's evaluation takes the base's actions before the arms'."""

full = pytest.mark.skipif(
    os.environ.get("METRONOME_PEER_FULL") != "1", reason="METRONOME_PEER_FULL is not 1"
)
RUNS = {
    "mobile ALOHA": ("mobile_aloha",),
    "mobile ALOHA, mended": ("mobile_aloha", "--mended"),
    "Agilex": ("agilex",),
    "Agilex with the base": ("agilex", "--base"),
    "Agilex before December 2024": ("agilex_old", "--base"),
    "mobile ALOHA, full size": ("mobile_aloha", "--mended", "--full"),
    "Agilex, full size": ("agilex", "--full"),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(run, marks=[full, pytest.mark.long] if "--full" in RUNS[run] else [])
        for run in RUNS
    ],
)
def answered(request, tmp_path_factory):
    """A folder with their checkpoint and ``expected.npz``, and what it is of."""
    run = RUNS[request.param]
    variable = CLONES[run[0]]
    clone = os.environ.get(variable)
    if clone is None:
        pytest.skip(f"{variable} does not name a clone")
    python = os.environ.get("METRONOME_PEER_PYTHON", sys.executable)
    needs = "import torchvision, einops, h5py, matplotlib"
    if subprocess.run([python, "-c", needs], check=False, capture_output=True).returncode:
        pytest.skip(f"{python}: not all there of: {needs}")
    folder = tmp_path_factory.mktemp("peer")
    command = [python, str(SCRIPT), run[0].removesuffix("_old"), clone, str(folder), *run[1:]]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    yield folder, run
    shutil.rmtree(folder)


def arguments(folder, run):
    """What their checkpoint does not say; Mobile ALOHA's config.pkl names cameras and heads."""
    if run[0] != "mobile_aloha":
        which = "qpos" if run[0] == "agilex_old" else "action"
        (folder / "metronome.yaml").write_text(f"action_statistics: {which}")
    with np.load(folder / "expected.npz") as data:
        given = {"image_hw": data["images"].shape[1:3]}
    if run[0] == "mobile_aloha":
        return given
    return {**given, "camera_names": NAMES, "n_heads": 8 if "--full" in run else 2}


def error_of(folder, run, actions):
    """Of ``actions`` (T, A), against what they commanded to the arms and the base."""
    with np.load(folder / "expected.npz") as data:
        want = np.hstack([data["arms"], data["base"]])
    got = actions
    if run[0] == "mobile_aloha":
        got = np.hstack([actions[:-BASE_DELAY, :-2], actions[BASE_DELAY:, -2:]])
    assert got.shape == want.shape
    error = float(np.abs(got - want).max() / np.abs(want).max())
    logger.info("%s: max|a-b|/max|b| %.1e", " ".join(run), error)
    return error


def observed(folder):
    with np.load(folder / "expected.npz") as data:
        return data["images"], data["state"]


@pytest.mark.long
@pytest.mark.parametrize("engine", ["torch", pytest.param("openvino", marks=needs_openvino)])
def test_the_engines_command_the_same(answered, engine, monkeypatch, tmp_path):
    monkeypatch.setenv("METRONOME_CACHE", str(tmp_path))
    folder, run = answered
    policy = load_policy(
        str(folder), engine=engine, device="cpu", precision="fp32", threads=1,
        **arguments(folder, run),
    )  # fmt: skip
    images, state = observed(folder)
    chunk = policy.infer(MetaObs(dict(zip(NAMES, images, strict=True)), state))
    policy.close()
    assert error_of(folder, run, chunk.actions) <= EXACT


@pytest.mark.long
def test_the_plain_network_commands_the_same(answered):
    folder, run = answered
    weights = load_weights(str(folder), **arguments(folder, run))
    images, state = observed(folder)
    with torch.inference_mode():
        normalized = weights.inference_model()(
            torch.from_numpy(images)[None],
            torch.from_numpy(weights.state_normalizer.normalize(state))[None],
        )
    actions = weights.action_normalizer.denormalize(normalized[0].numpy())
    assert error_of(folder, run, actions) <= EXACT
