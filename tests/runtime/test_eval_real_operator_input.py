"""Invalid input is refused with a message of its own, before anything moves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from policies.checkpoint.load import load_policy
from runtime.eval_real.cli import BAD_INPUT, main
from runtime.server import PolicyServer
from tests.runtime.command import status_of

TWIN = str(Path(__file__).resolve().parents[1] / "faults" / "twin.yaml")
NO_TWIN = ("--robot.address", "metronome-twin-nobody")


@pytest.fixture
def serving(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server of ``tests.faults.sine_policy:<param>``."""
    policy = load_policy(f"python:tests.faults.sine_policy:{request.param}")
    with PolicyServer(policy) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield f"{server.host}:{server.port}"
        finally:
            server.stop("the test is over")
            thread.join()


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert status_of(main, ["--yes", *flags]) == BAD_INPUT
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("-c", "nobody"), r"robot configuration 'nobody': neither a file nor a name among"),
        (("-c", "sim_twin", "--task", "nothing"), r"task configuration 'nothing'"),
        (("-c", "sim_twin", "-n", "0"), r"-n/--num_rollout: got 0, expected 1 to 1000000"),
        (("-c", "sim_twin", "--seed", "-1"), r"-s/--seed: got -1, expected 0 to 16777215"),
        (("-c", "sim_twin", "--gibberish"), r"got '--gibberish', expected a flag of"),
        (("-c", "sim_twin", "--robot.nonsense", "1"), r"nonsense"),
        (
            ("-c", "sim_twin", "--robot.limits.position_limit", ".inf",
             "--robot.limits.position_limit=2"),
            r"^error: --robot.limits.position_limit: got it after --robot.limits.position_limit, ",
        ),
        (
            ("-c", "sim_twin", "--robot.limits.velocity", "[1, 1]", "--robot.limits", "{}"),
            r"^error: --robot.limits: got it after --robot.limits.velocity, expected one of them$",
        ),
        (
            ("-c", "sim_twin", "-m", "127.0.0.1:1", "--fps", "50", "--chunk_size", "20",
             "--image_hw", "100", "100", "--device", "cuda:9"),
            r"^error: --device, --chunk_size, --image_hw: got with -m 127.0.0.1:1, expected none",
        ),
        (("-c", "sim_twin", "-m", "no/such/place"), r"read as a path, which does not exist"),
        (
            ("-c", "sim_twin", "--robot.limits.position_lower", "[4, 0, 0, 0, 0, 0, 0]"),
            r"joint 0 \(left_waist\): got position limits 4.0 to 3.14158",
        ),
        (
            ("-c", "sim_twin", "--robot.limits.velocity", "[1, 1]"),
            r"got 2 numbers, expected 7",
        ),
    ],
)  # fmt: skip
def test_invalid_flags_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    import re

    said = refused(capsys, "-o", str(tmp_path), *flags)
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("serving", "flags", "message"),
    [
        ("make_for_seven_joints", (), "action_dim: the policy has 7, sim_twin has 14"),
        ("make_for_another_camera", (), "missing: ['wrist']"),
        ("make_for_larger_pictures", (), "sim_twin gives 48x64, the policy takes 480x640"),
        ("make", ("--publish_rate", "70"), "expected a whole multiple of the policy's 50 Hz"),
        ("make", ("--publish_rate", "5000"), "expected 1 to 500, which sim_twin takes"),
        ("make", ("--action_manager", "telepathy"), "got 'telepathy', expected one of"),
        ("make", ("--near", "0"), "--near: got 0, expected more than 0"),
        ("make", ("--max_timesteps", "-3"), "--max_timesteps: got -3, expected 1 to 1000000"),
        ("make", (), "the simulator does not answer at"),
    ],
    indirect=["serving"],
)
def test_a_policy_that_does_not_fit_the_robot_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    serving: str,
    flags: tuple[str, ...],
    message: str,
) -> None:
    said = refused(capsys, "-m", serving, "-c", TWIN, *NO_TWIN, "-o", str(tmp_path), *flags)
    assert message in said, said


def test_a_missing_server_is_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = refused(capsys, "-m", "127.0.0.1:1", "-c", TWIN, *NO_TWIN, "-o", str(tmp_path))
    assert "127.0.0.1:1" in said
