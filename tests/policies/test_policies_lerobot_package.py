"""``lerobot:PATH``: what is refused before LeRobot is asked, and LeRobot itself where it is.

``METRONOME_LEROBOT_PYTHON`` is a Python with lerobot, numba, pyzmq, posix_ipc, pytest, tqdm and
matplotlib.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_policies_checkpoints import saved
from tiny_act import CAMERAS

from policies.checkpoint.lerobot_package import hash_files
from policies.checkpoint.load import load_policy
from policies.checkpoint.save import save_lerobot
from policies.errors import CheckpointError, ContractMismatch

PYTHON = os.environ.get("METRONOME_LEROBOT_PYTHON", "")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small ACT checkpoint of LeRobot's layout."""
    save_lerobot(tmp_path / "act", saved())
    (tmp_path / "act" / "metronome.yaml").unlink()
    return tmp_path / "act"


def edit(path: Path, change: Any) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_only_types_that_are_known_are_loaded(folder: Path) -> None:
    edit(folder / "config.json", lambda raw: raw.update(type="smolvla"))
    with pytest.raises(
        CheckpointError, match=r"type: got 'smolvla', expected one of \['act', 'diffusion', 'vqbet'"
    ):
        load_policy(f"lerobot:{folder}")


def test_a_class_that_processors_name_is_not_imported(folder: Path) -> None:
    step = {"class": "subprocess.Popen", "config": {"args": ["false"]}}
    edit(folder / "policy_preprocessor.json", lambda raw: raw["steps"].append(step))
    with pytest.raises(CheckpointError, match=r"step 'subprocess.Popen' is not supported"):
        load_policy(f"lerobot:{folder}")


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_policy(f"lerobot:{folder}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_id": "x"}, "dataset_id: got 'x', expected none: LeRobot's configuration"),
        ({"image_hw": (1, 2)}, r"image_hw: got \(1, 2\), expected none"),
        ({"graph_options": ["x"]}, "graph_options: got"),
        ({"engine": "openvino"}, r"engine: got 'openvino', expected one of \('auto', 'torch'\)"),
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"precision": "fp8"}, r"precision: got 'fp8', expected one of \('auto', 'fp32'"),
    ],
)
def test_options_that_do_not_apply_are_refused(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((CheckpointError, ContractMismatch), match=message):
        load_policy(f"lerobot:{folder}", **options)


def test_cameras_of_another_size_than_the_networks_are_refused(folder: Path) -> None:
    cameras = [
        {"name": camera.name, "source_hw": [64, 64], "model_hw": [8, 8], "resize": "area"}
        for camera in CAMERAS
    ]
    (folder / "metronome.yaml").write_text(json.dumps({"cameras": cameras}))
    with pytest.raises(CheckpointError, match=r"model_hw: got \(8, 8\), expected"):
        load_policy(f"lerobot:{folder}")


@pytest.mark.skipif(
    importlib.util.find_spec("lerobot") is not None, reason="lerobot is installed here"
)
def test_without_lerobot_the_error_says_so(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No module named 'lerobot'.*pip install lerobot"):
        load_policy(f"lerobot:{folder}")


def test_the_hash_is_that_of_weights_configuration_and_statistics(folder: Path) -> None:
    before = hash_files(folder)
    (folder / "metronome.yaml").write_text("dt_s: 0.05")
    assert hash_files(folder) == before
    found = {before}
    for name in ("config.json", "model.safetensors", "policy_preprocessor.json"):
        path = folder / name
        path.write_bytes(path.read_bytes() + b" ")
        found.add(hash_files(folder))
    assert len(found) == 4


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(not PYTHON, reason="needs METRONOME_LEROBOT_PYTHON, a Python with lerobot")
def test_lerobots_own_policies() -> None:
    done = subprocess.run(
        [
            PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default",
            str(ROOT / "tests/policies/lerobot_package_cases.py"),
        ],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "17 passed" in done.stdout
