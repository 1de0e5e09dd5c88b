"""Tiny checkpoints, made on the spot, and the reference ones where they are at hand."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import pytest
from tiny_act import CAMERAS, TINY

from policies.checkpoint.untrained import make_untrained

ARCHIVE = "act_reference_checkpoints.tar.xz"


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The folder with the four reference checkpoints."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "fixtures"
    archive = Path(os.environ.get("METRONOME_REFERENCE", beside)) / ARCHIVE
    if not archive.is_file():
        pytest.skip(f"no {archive}: set METRONOME_REFERENCE to its folder")
    folder = tmp_path_factory.mktemp("reference")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.rglob("expected.npz")).parent.parent


@pytest.fixture(scope="session")
def _tiny_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_untrained(folder, task="t", config=TINY, cameras=CAMERAS, stored_as="bf16")
    return folder


@pytest.fixture
def tiny(_tiny_once, tmp_path):
    """A checkpoint in ILStudio's layout with two cameras, 3 joints, 2 actions; to be spoilt."""
    return Path(shutil.copytree(_tiny_once, tmp_path / "tiny"))
