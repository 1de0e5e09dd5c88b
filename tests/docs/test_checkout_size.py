"""The limit on what git tracks: met exactly is met, one byte more is not."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.checkout_size import ROOT, main


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Twelve tracked files of 1 to 12 bytes, 78 together, and a large one that is not tracked."""
    for size in range(1, 13):
        (tmp_path / f"of {size}").write_bytes(bytes(size))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    (tmp_path / "untracked").write_bytes(bytes(1000))
    return tmp_path


def test_at_the_limit_it_passes(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(checkout, 78) == 0
    assert capsys.readouterr() == ("tracked files: 78 bytes of at most 78\n", "")


def test_above_it_fails_and_names_the_ten_largest(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(checkout, 77) == 1
    first, *files = capsys.readouterr().err.splitlines()
    assert first == "error: tracked files: got 78 bytes, at most 77; the largest:"
    assert [line.split(maxsplit=1) for line in files] == [
        [str(size), f"of {size}"] for size in range(12, 2, -1)
    ]


def test_a_tracked_file_that_was_removed_weighs_nothing(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "of 12").unlink()
    assert main(checkout, 66) == 0
    assert capsys.readouterr().out == "tracked files: 66 bytes of at most 66\n"


def test_where_there_is_no_checkout_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert main(tmp_path, 0) == 0
    said = f"tracked files: not counted, {tmp_path} is not a git checkout\n"
    assert capsys.readouterr().out == said


def test_make_check_counts() -> None:
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe and "python -m tests.docs.checkout_size" in recipe[1]
