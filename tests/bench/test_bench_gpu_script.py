"""``bench/gpu.sh`` with stubs of nvidia-smi and python: whom it believes, and what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.inference import gpu

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"
TOOLS = ("bash", "env", "dirname", "cat", "awk", "id", "timeout")
WARNINGS = 'echo "UserWarning: CUDA initialization is slow today" >&2'
PYTHON = f"""{WARNINGS}
case "$*" in
  *"import sys, torch"*) echo "$TORCH_SAYS" >&2; exit "$TORCH_STATUS" ;;
  *find_spec*) [ -e "$INSTALLED" ] || echo "$MISSING" ;;
  *" pip install "*) echo "pip: $*"; : > "$INSTALLED"; exit "$PIP_STATUS" ;;
  *) echo "ran: $*" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))

    def program(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)

    def started(*arguments: str, smi: str | None = WARNINGS, **variables: str):
        program("stub-python", PYTHON)
        if smi is not None:
            program("nvidia-smi", smi)
        settings = {
            "PATH": str(folder),
            "PYTHON": str(folder / "stub-python"),
            "TMPDIR": str(tmp_path),
            "TORCH_SAYS": "",
            "TORCH_STATUS": "0",
            "INSTALLED": str(tmp_path / "installed"),
            "MISSING": "",
            "PIP_STATUS": "0",
        }
        return subprocess.run(
            [SCRIPT, *arguments],
            env={**settings, **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return started


def test_warnings_are_no_refusal(run, tmp_path) -> None:
    done = run("contest", "--net", "full, 1 camera", "--out", "here")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == f"ran: -m bench.inference.gpu contest --net full, 1 camera --out {tmp_path}/here"


def test_an_interpreter_that_fails_is_refused_in_its_own_words(run) -> None:
    done = run("check", TORCH_STATUS="1", TORCH_SAYS="torch 2.11 sees no GPU")
    assert done.returncode == 3
    [line] = done.stderr.splitlines()
    assert line.startswith("bench/gpu.sh: no python here has a torch that sees the GPU; ")
    assert line.endswith("stub-python: torch 2.11 sees no GPU")


@pytest.mark.parametrize(
    ("smi", "words"),
    [
        (None, "no GPU here: there is no nvidia-smi"),
        (
            "echo NVIDIA-SMI has failed: no driver; exit 9",
            "no GPU here: nvidia-smi: NVIDIA-SMI has failed: no driver",
        ),
    ],
)
def test_without_a_gpu_it_is_one_line_and_status_3(run, smi, words) -> None:
    done = run("served", smi=smi)
    assert done.returncode == 3
    assert done.stderr == f"bench/gpu.sh: {words}\n"


def test_parts_are_listed_and_others_refused(run) -> None:
    for arguments in ((), ("--list",)):
        done = run(*arguments, smi=None)
        assert done.returncode == 0
        for part in gpu.PARTS:
            assert f"\n  {part.name:9} {part.within_s / 60:.0f} minutes at most" in done.stdout
    done = run("everything", smi=None)
    assert done.returncode == 2
    assert "expected check, contest, variants or served" in done.stderr


def test_wheels_are_installed_from_their_folder_alone(run, tmp_path) -> None:
    (tmp_path / "wheels").mkdir()
    done = run("served", MISSING="pyzmq", WHEELS="wheels")
    assert done.returncode == 0, done.stderr
    [pip] = [line for line in done.stdout.splitlines() if line.startswith("pip: ")]
    assert f"--no-index --find-links {tmp_path}/wheels pyzmq" in pip
    assert f"--target {tmp_path}/metronome-gpu-{os.getuid()}" in pip


def test_what_cannot_be_installed_is_said_and_the_part_runs(run) -> None:
    done = run("contest", MISSING="lerobot==0.4.4\neinops", PIP_STATUS="1", INSTALLED="/no/such")
    assert done.returncode == 0
    assert "lerobot==0.4.4 is missing and cannot be installed" in done.stderr
    assert done.stdout.count("pip: ") == 1  # without wheels the next one would cost time only
    assert "ran: -m bench.inference.gpu contest" in done.stdout
