"""Paths that cannot be used, given to the small commands: one line, exit status 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from envs import demonstrations
from runtime.eval_real import replay
from runtime.tools import ctl, keys, top

Main = Callable[[Sequence[str]], int]
DEMONSTRATIONS = ["--task", "sim_transfer_cube", "--num", "1", "--workers", "1", "--out"]


@pytest.mark.parametrize("path", ["x" * 5000, "file", "file/below", "folder", "", "missing"])
@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (replay.main, []),
        (keys.main, ["show"]),
        (keys.main, ["allow", "{path}"]),
        (demonstrations.main, DEMONSTRATIONS),
    ],
)
def test_a_path_that_cannot_be_used_is_one_line(  # noqa: PLR0917  pytest gives them by name
    main: Main,
    arguments: list[str],
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no key", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    if main is demonstrations.main and path in ("", "folder", "missing"):
        pytest.skip("episodes could be written there")
    assert main([part.format(path=path) for part in arguments] + [path]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert said.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("folder", ["x" * 5000, "file", "file/below"])
def test_keys_are_not_made_where_nothing_can_be_written(
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert keys.main(["new", folder, "me"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("text", ['{"format": 2, "mission": 3, "body": []}', "[]", "{", "3"])
def test_a_recording_that_is_none_is_named(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.npz").write_bytes(b"x")
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    assert replay.main([str(tmp_path / "r")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'r'}: ")


@pytest.mark.parametrize("address", ["", "x", "::1:5000", "localhost:0", "localhost:99999"])
@pytest.mark.parametrize(("main", "rest"), [(ctl.main, ["status"]), (top.main, ["--once"])])
def test_an_address_that_is_none_is_one_line(
    main: Main, rest: list[str], address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([address, *rest]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: address")
