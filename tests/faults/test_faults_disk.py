"""A full disk: the result is still reported, and no half-written file is left."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.rig import Motion, Server, evaluation, twin

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(180)]


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A folder that holds 16 KiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_rollout_that_cannot_be_recorded_is_reported_and_is_the_last(tiny: Path) -> None:
    with twin() as arm, Server("make") as server:
        flags = ("--max_timesteps", "100", "--num_rollout", "3", "--yes")
        with evaluation(arm, server.address, tiny, *flags) as program:
            assert program.wait() == 1
        Motion.of(arm.record()).check(arm.limits)
    said = "\n".join(program.said)
    assert "Traceback" not in said
    assert "rollout 0, seed 0: failure, 100 ticks" in said
    assert "not recorded: No space left on device; 1 of 3 rollouts were kept" in said
    assert "success      0/1" in said
    for path in tiny.rglob("*"):
        assert path.is_dir() or not path.name.endswith(".partial")
        assert path.suffix != ".npz" or "rollout" not in path.name
