"""Key files: what is a key, and which files are not used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.options.api_keys import MAX_BYTES, ApiKeys

KEY, OTHER = "0123456789abcdef", "fedcba9876543210"


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_each_line_is_a_key(tmp_path: Path) -> None:
    keys = ApiKeys(key_file(tmp_path, f"# of the lab\n\n  {KEY} \r\n{OTHER}"))
    assert keys.match(KEY) and keys.match(OTHER)


@pytest.mark.parametrize(
    "given",
    ["", KEY[:-1], f"{KEY}0", KEY.upper(), f"{KEY}\n", "# of the lab", "\ud800" * 16, "é", None,
     KEY.encode(), 3, [KEY]],
)  # fmt: skip
def test_anything_else_is_none(tmp_path: Path, given: object) -> None:
    assert not ApiKeys(key_file(tmp_path, f"# of the lab\n{KEY}\n")).match(given)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602, 0o601])
def test_a_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, KEY, mode)
    with pytest.raises(ValueError, match=f"got mode {mode:04o} and owner .*, expected a file that"):
        ApiKeys(path)


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, me = key_file(tmp_path, KEY), os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(ValueError, match=f"and owner {me}, expected .* and owner {me + 1}"):
        ApiKeys(path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "got no key, expected one a line"),
        ("# only\n\n", "got no key, expected one a line"),
        (f"{KEY}\nshort\n", "got a key of 5 characters, expected at least 16"),
        (f"{KEY}\n" * 4000, f"got a longer file, expected at most {MAX_BYTES} bytes"),
    ],
)
def test_a_file_without_good_keys_is_refused(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ApiKeys(key_file(tmp_path, text))


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"No such file|Is a directory"):
        ApiKeys(tmp_path / name)
