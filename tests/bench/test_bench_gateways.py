"""``make gateways``: what is written, and that a part that fails does not end the others."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from bench.gateways import __main__ as gateways

ROOT = str(gateways.ROOT)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"{ROOT}/tests/x.py:3: in f", "./tests/x.py:3: in f"),
        (f"{sys.prefix}/lib/y.py", "$PYTHON/lib/y.py"),
        (f"'{tempfile.gettempdir()}/a/b'", "'$TMP/a/b'"),
        ("/peers/one/client.py:1", "$METRONOME_OPENPI_SOURCE/client.py:1"),
        ("(/usr/lib/python3/z.py)", "(.../z.py)"),
        ("path: got /v1/realtime, a/b, 1/2", "path: got /v1/realtime, a/b, 1/2"),
    ],
)
def test_no_path_of_the_machine_is_written(text: str, shown: str) -> None:
    environment = {"METRONOME_OPENPI_SOURCE": "/peers/one"}
    assert gateways.without_paths(text, environment) == shown


def test_all_parts_run_and_the_last_lines_say_how(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        gateways.Part("wrong", ("-c", "print('x'); raise SystemExit(3)")),
        gateways.Part("without", ("-c", "1/0"), ("METRONOME_OPENPI_SOURCE",)),
        gateways.Part("empty", ("-c", "print('2 skipped in 0.1s')")),
        gateways.Part("good", ("-c", "import os; print(os.environ['A'])"), (), ("A=few",)),
    ]
    monkeypatch.delenv("METRONOME_OPENPI_SOURCE", raising=False)
    monkeypatch.setattr(gateways, "parts", lambda: parts)
    monkeypatch.setattr(gateways, "RESULT", tmp_path / "gateways.txt")
    monkeypatch.setattr(gateways, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gateways", "--quick"])
    assert gateways.main() == 1
    written = (tmp_path / "gateways.txt").read_text(encoding="utf-8")
    summary = [line.split()[:2] for line in written.partition("== summary\n")[2].splitlines()]
    assert summary == [
        ["failed", "wrong"],
        ["skipped", "without"],
        ["skipped", "empty"],
        ["passed", "good"],
    ]
    assert "x\nfailed with exit status 3\n" in written and "\nfew\n" in written
    assert "skipped: METRONOME_OPENPI_SOURCE not set" in written
    assert written in capsys.readouterr().out


def test_every_benchmark_and_every_file_of_long_tests_is_a_part() -> None:
    titles = {part.title for part in gateways.parts()}
    assert "tests/gateway/test_gateway_openpi_deaths.py" in titles
    assert "tests/gateway/test_gateway_openpi.py" not in titles
    named = {f"bench.gateways.{name}" for name in ("ilstudio", "openpi", "lerobot", "fairness")}
    assert named <= titles
