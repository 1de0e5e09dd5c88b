"""What is loaded from the cache of the Hugging Face hub: plain data, through links; no pickles."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from test_policies_checkpoints import HARMLESS, infer, saved
from tiny_act import observation

from policies.checkpoint.file_readers import read_torch
from policies.checkpoint.load import load_policy
from policies.checkpoint.safe_pickle import read_pickle
from policies.checkpoint.save import save_ilstudio, save_lerobot
from policies.errors import CheckpointError
from tests.runtime.hub_repository import COMMIT, fill_cache

REFUSED = "got a pickle in a snapshot of the Hugging Face hub"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_snapshot_of_links_is_loaded_and_its_code_is_not_run(tmp_path: Path) -> None:
    save_lerobot(tmp_path / "c", saved())
    code = {"modeling_act.py": b"raise SystemExit('code of the hub was run')"}
    snapshot = fill_cache(tmp_path, "org/name", contents(tmp_path / "c") | code)
    policy = load_policy(str(snapshot), **HARMLESS)
    assert COMMIT in policy.info.checkpoint
    actions = policy.infer(observation(policy.contract)).actions
    assert (actions == infer(tmp_path / "c")).all()


@pytest.mark.parametrize("downloaded", [False, True])
def test_pickled_statistics_are_refused_with_the_reason(tmp_path: Path, downloaded: bool) -> None:
    """Whether or not another program has downloaded them."""
    save_ilstudio(tmp_path / "c", saved())
    files = contents(tmp_path / "c")
    pickles = [name for name in files if name.endswith(".pkl")]
    assert pickles
    if not downloaded:
        files = {name: content for name, content in files.items() if name not in pickles}
    snapshot = fill_cache(tmp_path, "org/name", files)
    with pytest.raises(CheckpointError, match=REFUSED):
        load_policy(str(snapshot))
    with pytest.raises(CheckpointError, match=REFUSED):
        load_policy(str(snapshot.parent.parent))  # the repository's folder in the cache


def test_pickles_are_read_elsewhere_but_not_in_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "w.ckpt")
    (tmp_path / "s.pkl").write_bytes(pickle.dumps({"a": 1}))
    assert read_pickle(tmp_path / "s.pkl") == {"a": 1}
    assert list(read_torch(tmp_path / "w.ckpt")) == ["w"]
    files = {name: (tmp_path / name).read_bytes() for name in ("w.ckpt", "s.pkl")}
    snapshot = fill_cache(tmp_path, "org/name", files)
    monkeypatch.chdir(snapshot)
    for folder in (snapshot, Path()):
        with pytest.raises(CheckpointError, match=REFUSED):
            read_pickle(folder / "s.pkl")
        with pytest.raises(CheckpointError, match=REFUSED):
            read_torch(folder / "w.ckpt")
