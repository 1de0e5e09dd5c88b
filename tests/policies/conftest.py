"""Tiny checkpoints, made on the spot, and the reference ones where they are at hand."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_act import CAMERAS, TINY, narrow_backbones

from policies.act import backbone, model
from policies.act.config import CHANNELS
from policies.checkpoint.untrained import make_untrained

ARCHIVE = "act_reference_checkpoints.tar.xz"


@pytest.fixture(autouse=True, scope="module")
def _narrow_backbones() -> Iterator[None]:
    """What a backbone computes does not depend on its width; how long it takes does."""
    with narrow_backbones():
        yield


@pytest.fixture
def full_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backbones as they are: for real checkpoints, and for what child processes read."""
    for module in (backbone, model):
        monkeypatch.setattr(module, "CHANNELS", CHANNELS)


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
    with narrow_backbones():
        make_untrained(folder, task="t", config=TINY, cameras=CAMERAS, stored_as="bf16")
    return folder


@pytest.fixture
def whole(full_width, tmp_path):
    """As ``tiny``, with the backbone that a child process expects."""
    make_untrained(tmp_path / "whole", task="t", config=TINY, cameras=CAMERAS, stored_as="bf16")
    return tmp_path / "whole"


@pytest.fixture
def tiny(_tiny_once, tmp_path):
    """A checkpoint in ILStudio's layout with two cameras, 3 joints, 2 actions; to be spoilt."""
    return Path(shutil.copytree(_tiny_once, tmp_path / "tiny"))
