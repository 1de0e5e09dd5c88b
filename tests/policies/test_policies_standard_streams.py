"""Commands whose streams are closed, full, left by their reader, or of few characters."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from policies import standard_streams
from policies.standard_streams import NonFailingStream, run_command

ROOT = Path(__file__).resolve().parents[2]
FAKE = ["eval_sim.py", "-m", "python:tests.runtime.toy_policy:make", "-e", "fake", "-n", "1",
        "--videos", "0", "--env.max_timesteps", "3"]  # fmt: skip


def shell(streams: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with ``arguments``, its streams as a shell's ``streams`` say."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("streams", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_end_an_evaluation(streams: str, tmp_path: Path) -> None:
    done = shell(streams, *FAKE, "-o", str(tmp_path))
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert json.loads(next(tmp_path.rglob("*.json")).read_text())["failure"] == ""


def test_a_reader_that_left_does_not_end_an_evaluation(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, *FAKE, "-o", str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert next(tmp_path.rglob("*.json")).is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this machine has no /dev/full")
def test_output_that_is_lost_on_a_full_disk_is_a_failure(tmp_path: Path) -> None:
    done = shell(">/dev/full", "-m", "runtime.tools.keys", "new", str(tmp_path), "me")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line[:38]) == (1, "error: the output cannot be written: [")
    assert (tmp_path / "me.key").is_file()
    assert (
        shell(">/dev/full 2>/dev/full", "-m", "runtime.tools.keys", "show", "/nosuch").returncode
        == 2
    )


def test_a_terminal_of_few_characters_shows_the_others_as_question_marks() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "runtime.server",
            "-m",
            "python:tests.runtime.toy_policy:make",
            "--port",
            "0",
            "--config",
            "/nosuch/🚀.yaml",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "/nosuch/?.yaml" in done.stderr


def test_what_cannot_be_shown_is_replaced() -> None:
    raw = io.BytesIO()
    stream = NonFailingStream(io.TextIOWrapper(raw, encoding="ascii"))
    print("🚀 started", file=stream)
    stream.flush()
    assert raw.getvalue() == b"? started\n"


def test_ctrl_c_is_a_status_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    for name in ("stdin", "stdout", "stderr"):  # whatever it makes of them, they come back
        monkeypatch.setattr(sys, name, getattr(sys, name))
    assert run_command(interrupted) == standard_streams.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "command", [["eval_sim.py"], ["-m", "runtime.tools.keys"], ["-m", "envs.demonstrations"]]
)
def test_a_command_with_closed_output_prints_no_error(command: list[str]) -> None:
    assert shell(">&- 2>&-", *command, "--help").returncode == 0


@pytest.mark.parametrize(
    "variables",
    [
        {"MPLBACKEND": "nosuch", "OMP_NUM_THREADS": "abc", "LC_ALL": "C", "PYTHONUTF8": "0"},
        {"TMPDIR": "/nosuch", "HOME": "/nosuch", "COLUMNS": "x", "TERM": "x", "NO_COLOR": "1"},
    ],
)
def test_odd_environment_variables_do_not_end_an_evaluation(
    variables: dict[str, str], tmp_path: Path
) -> None:
    done = shell("", *FAKE, "-o", str(tmp_path), **variables)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
