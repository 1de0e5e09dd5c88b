"""How ``-m`` is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.errors import ModelNameError
from runtime.options.model_name import LocalModel, ServerAddress, read_model_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:5000", ServerAddress("127.0.0.1", 5000)),
        ("localhost:1", ServerAddress("localhost", 1)),
        ("[::1]:65535", ServerAddress("::1", 65535)),
        ("tcp://127.0.0.1:80", ServerAddress("127.0.0.1", 80)),
        ("python:a.b:c", LocalModel("python:a.b:c")),
        ("lerobot:some/folder", LocalModel("lerobot:some/folder")),
    ],
)
def test_addresses_and_factories(text: str, expected: object) -> None:
    assert read_model_name(text) == expected


def test_an_address_prints_as_it_is_written() -> None:
    for text in ("127.0.0.1:5000", "[::1]:5000"):
        assert str(read_model_name(text)) == text


def test_an_existing_path_is_a_path_whatever_it_looks_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("localhost:5000").mkdir()
    assert read_model_name("localhost:5000") == LocalModel("localhost:5000")
    assert read_model_name(str(tmp_path)) == LocalModel(str(tmp_path))


def test_a_home_is_expanded_where_no_shell_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in ``--model_name_or_path=~/x``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    assert read_model_name("~/x") == LocalModel(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ckpt/absent", "read as a path, which does not exist"),
        ("absent", "read as a path, which does not exist"),
        ("~nobody-of-that-name/x", "read as a path, which does not exist"),
        ("", "read as a path, which does not exist"),
        ("localhost:", "-m 'localhost:'"),
        ("localhost:0x10", "-m 'localhost:0x10'"),
        ("localhost:70000", "70000"),
        ("::1:5000", "-m '::1:5000'"),
        ("nobody.invalid:5000", "the host does not resolve"),
    ],
)
def test_anything_else_says_how_it_was_read_and_what_would_do(text: str, message: str) -> None:
    with pytest.raises(ModelNameError) as caught:
        read_model_name(text)
    assert message in str(caught.value)
    expected = "expected a path that exists, HOST:PORT, [V6]:PORT, lerobot:PATH or python:"
    assert expected in str(caught.value)


def test_what_is_too_long_to_be_a_path_is_none() -> None:
    with pytest.raises(ModelNameError, match="which does not exist"):
        read_model_name("a" * 5000)
