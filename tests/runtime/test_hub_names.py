"""``-m hf:ORG/NAME``: the real library of the hub, over caches and a server made here."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.errors import ModelNameError
from runtime.eval_real import cli as eval_real
from runtime.eval_sim import cli as eval_sim
from runtime.options import hub
from runtime.options.model_name import LocalModel, read_model_name
from runtime.server import cli as serve
from tests.runtime.hub_repository import COMMIT, fill_cache, served_repository

constants = pytest.importorskip("huggingface_hub.constants")

NAME = "some-lab/act_cube"
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "sub/metronome.yaml": b"x: 1"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The library's cache, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.download.cache_clear()
    yield tmp_path / "hub"
    hub.download.cache_clear()


@pytest.mark.parametrize("revision", ["", "@main", "@v1.0", f"@{COMMIT}"])
def test_a_name_is_the_snapshot_in_the_cache(cache: Path, revision: str) -> None:
    snapshot = fill_cache(cache, NAME, FILES, refs=("main", "v1.0"))
    assert read_model_name(f"hf:{NAME}{revision}") == LocalModel(str(snapshot))


def test_a_name_for_lerobots_own_policies_is_the_snapshot_too(cache: Path) -> None:
    snapshot = fill_cache(cache, NAME, FILES, refs=("v1.0",))
    assert read_model_name(f"lerobot:hf:{NAME}@v1.0") == LocalModel(f"lerobot:{snapshot}")
    with pytest.raises(ModelNameError, match="revision"):
        read_model_name(f"lerobot:hf:{NAME}", fixed_revision=True)


def test_a_path_of_that_name_wins(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"hf:{NAME}").mkdir(parents=True)
    assert read_model_name(f"hf:{NAME}") == LocalModel(f"hf:{NAME}")


def test_a_path_that_does_not_exist_is_never_looked_up(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(cache, NAME, FILES)

    def fail(*_: object) -> None:
        pytest.fail("the hub was asked")

    monkeypatch.setattr(hub, "snapshot_folder", fail)
    with pytest.raises(ModelNameError, match=r"does not exist; .* or hf:ORG/NAME\[@REVISION\] for"):
        read_model_name(NAME)


def test_a_robot_needs_a_fixed_revision(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = fill_cache(cache, NAME, FILES, refs=("main", "v1.0"))
    for revision in ("v1.0", COMMIT):
        model = read_model_name(f"hf:{NAME}@{revision}", fixed_revision=True)
        assert model == LocalModel(str(snapshot))
    for text, got in ((f"hf:{NAME}", "no revision"), (f"hf:{NAME}@main", "a branch")):
        assert eval_real.main(["-m", text, "-c", "dummy"]) == 2
        assert f"got {got}, expected hf:{NAME}@ with a commit hash or a tag" in (
            capsys.readouterr().err
        )


@pytest.mark.parametrize("text", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b@", "hf:a/b@c@d", "hf:a /b"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ModelNameError, match="got no name of the Hugging Face hub, expected hf:"):
        read_model_name(text)


def test_what_the_library_refuses_is_refused(cache: Path) -> None:
    with pytest.raises(ModelNameError, match=r"-m hf:\.\./--\.\.@main: .*; expected a repository"):
        read_model_name("hf:../--..")


def test_offline_says_what_the_cache_has(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill_cache(cache, NAME, FILES, refs=("main", "v1.0"))
    for main in (serve.main, eval_sim.main):
        assert main(["-m", f"hf:{NAME}@v2.0"]) == 2
        said = capsys.readouterr().err
        assert f"-m hf:{NAME}@v2.0: got no complete copy in {cache}, and HF_HUB_OFFLINE" in said
        assert f"one of the revisions there: main, v1.0, {COMMIT}" in said
    with pytest.raises(ModelNameError, match="one of the revisions there: none"):
        read_model_name("hf:nobody/nothing")


def test_a_missing_library_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelNameError, match=r"the hub's library: pip install '\.\[hub\]'"):
        read_model_name(f"hf:{NAME}")


def test_a_repository_of_pickles_is_refused(cache: Path) -> None:
    fill_cache(cache, NAME, {"config.json": b"{}", "pytorch_model.bin": pickle.dumps(1)})
    with pytest.raises(ModelNameError, match=r"got no safetensors file, .* neither downloaded nor"):
        read_model_name(f"hf:{NAME}")


@pytest.mark.long
def test_all_processes_load_the_commit_that_the_first_found(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They do not know this cache: only the folder's path can lead them there."""
    snapshot = fill_cache(cache, NAME, FILES)
    flags = ["-m", f"hf:{NAME}", "-e", "fake", "-n", "2", "--num_envs", "2", "-o", str(tmp_path)]
    assert eval_sim.main(flags) == 2
    said = capfd.readouterr().err
    assert f"error: {snapshot}/config.json: " in said


def read_in_a_process(text: str, **environment: str) -> str:
    script = f"from runtime.options.model_name import read_model_name as r; print(r({text!r}).name)"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_the_librarys_variables_apply(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path / "hub", NAME, FILES)
    found = read_in_a_process(f"hf:{NAME}", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert found == str(snapshot)


def test_only_plain_data_is_downloaded(tmp_path: Path) -> None:
    unwanted = (
        "modeling_act.py",
        "pytorch_model.bin",
        "policy.ckpt",
        "stats.pkl",
        "x.safetensors.pt",
    )
    files = FILES | dict.fromkeys(unwanted, b"code")
    with served_repository(NAME, files) as (address, downloaded):
        found = read_in_a_process(f"hf:{NAME}", HF_HOME=str(tmp_path), HF_ENDPOINT=address)
    assert found == str(tmp_path / "hub/models--some-lab--act_cube/snapshots" / COMMIT)
    assert sorted(downloaded) == sorted(FILES)
    assert {str(p.relative_to(found)): p.read_bytes() for p in Path(found).rglob("*.*")} == FILES
