"""An .rrd file of the evaluations, read back with Rerun's own reader, has every tick."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from policies import jpeg
from runtime.eval_real.recording import Recording
from runtime.eval_sim import cli as eval_sim
from runtime.live_view.layout import LiveViewLayout, LiveViewSegment, create_segment
from runtime.live_view.live_view import LiveView
from runtime.live_view.live_view_writer import LiveViewWriter
from runtime.live_view.logger_process import Logger
from runtime.live_view.options import VIEWER
from runtime.live_view.rerun_log import VIEWER_URL, RerunLog, _listens
from tests.datasets import truth
from tests.live_view.rrd import RrdFile
from tests.runtime.command import status_of

pytest.importorskip("rerun")

POLICY = "python:tests.datasets.two_camera_policy:make"
TICKS, EPISODES = {"max_timesteps": "12"}, 2
JOINTS = [f"joint_{index}" for index in range(14)]
DT_NS = 20_000_000


def evaluate(tmp_path: Path, target: str, *flags: str, episodes: int = EPISODES) -> int:
    short = [f"--env.{key}={value}" for key, value in TICKS.items()]
    argv = ["-m", POLICY, "-e", "fake", *short, "-o", str(tmp_path / "results"), "--videos", "0"]
    return status_of(eval_sim.main, [*argv, "-n", str(episodes), "--rerun", target, *flags])


def test_what_was_sent_is_in_the_file(tmp_path: Path) -> None:
    """Also what needs several batches, joints with spaces, and states that are no actions."""
    layout = LiveViewLayout(
        title="test", state_names=("x y", "z", "w"), action_names=("a b", "c"),
        cameras={"top left": (8, 16)}, chunk_size=3, step_s=0.5, origin_ns=100, keeps_all=True,
    )  # fmt: skip
    fd = create_segment(layout)
    segment, writer = LiveViewSegment(fd, layout), LiveViewWriter(fd, layout)
    log = RerunLog(str(tmp_path / "a.rrd"), layout)
    logger = Logger(layout, segment, log)
    commands = np.arange(1400, dtype=np.float32).reshape(700, 2) ** 2
    for number, command in enumerate(commands):
        attempt, source = 1 + (number >= 600), number // 300
        writer.tick(100 + number, command, attempt=attempt, source=source, lateness_s=1e-3)
        writer.state(100 + number, np.array([*command, number], np.float32))
    writer.chunk(150, 200, np.ones((2, 2), np.float32), [5_000_000, 0, 0, 0, 0, 0, 0, 1])
    writer.text(120, "fault: é")
    writer.picture("top left", 130, np.full((4, 8, 3), 200, np.uint8))
    while logger.log_batch():
        assert log.flush(10)
    log.close()
    writer.close()
    os.close(fd)
    file = RrdFile(tmp_path / "a.rrd")
    times_ns, values = file.joints("commanded", [r"a\ b", "c"])
    np.testing.assert_array_equal(times_ns, np.arange(700))
    np.testing.assert_array_equal(values, commands)
    np.testing.assert_array_equal(file.scalars("/state/w/measured")[1], np.arange(700))
    planned_ns, _ = file.joints("planned", [r"a\ b", "c"])
    np.testing.assert_array_equal(planned_ns, [100, 100 + 500_000_000])
    assert file.scalars("/timing/stages/pack") == ([50], [5.0])
    assert "/timing/stages/publish" not in file.entities
    assert "/timing/action_age_ms" not in file.entities
    # At tick 600 an attempt begins, which is no seam.
    seams_ns, jumps = file.scalars("/timing/seam_jump")
    np.testing.assert_array_equal(seams_ns, [300])
    np.testing.assert_array_equal(jumps, [601**2 - 599**2])
    assert file.texts() == ["fault: é"]
    (data,) = file.rows(r"/cameras/top\ left", "blob")[1]
    picture = jpeg.codec().decode_jpeg(bytes(data[0]))
    assert picture.shape == (4, 8, 3)
    assert np.abs(picture.astype(int) - 200).max() < 3


@pytest.mark.long
def test_a_file_has_every_tick_of_eval_sim(tmp_path: Path, capsys) -> None:
    path = tmp_path / "run.rrd"
    assert evaluate(tmp_path, str(path)) == 0
    assert f"rerun        {path}" in capsys.readouterr().out
    expected = truth.episodes("fake", TICKS, EPISODES)
    count = 12 * EPISODES
    file = RrdFile(path)
    assert file.timelines == ["time"]
    for kind, key in (("commanded", "action"), ("measured", "observation.state")):
        times_ns, values = file.joints(kind, JOINTS)
        np.testing.assert_array_equal(times_ns, np.arange(count) * DT_NS)
        np.testing.assert_array_equal(values, np.concatenate([one[key] for one in expected]))
    # The strategy plays each chunk to its end, so what was planned is what was commanded. The last
    # chunk of the first episode reaches into the second one; there, the later value counts.
    times_ns, planned = file.joints("planned", JOINTS)
    np.testing.assert_array_equal(times_ns, np.arange(count + 3) * DT_NS)
    np.testing.assert_array_equal(planned[15:24], values_of(expected, "action")[15:24])
    for camera in ("top", "left_wrist"):
        shown_ns, pictures = file.rows(f"/cameras/{camera}", "blob")
        np.testing.assert_array_equal(shown_ns, np.arange(count) * DT_NS)
        assert all(bytes(picture[0])[:2] == b"\xff\xd8" for picture in pictures)
    np.testing.assert_array_equal(file.scalars("/timing/lateness_ms")[1], 0)
    ages = file.scalars("/timing/action_age_ms")[1]
    np.testing.assert_allclose(ages, 1e3 * values_of(expected, "metronome.action_age_s"))
    seams_ns, jumps = file.scalars("/timing/seam_jump")
    seams = np.array([5, 10, 17, 22])
    np.testing.assert_array_equal(seams_ns, seams * DT_NS)
    commands = values_of(expected, "action")
    np.testing.assert_array_equal(jumps, np.abs(commands[seams] - commands[seams - 1]).max(axis=1))
    assert file.texts()[0] == "episode with seed 0"
    assert file.texts()[-1].startswith("seed 1: failure, reward 0.2")


def values_of(episodes: list[dict[str, np.ndarray]], key: str) -> np.ndarray:
    return np.concatenate([one[key] for one in episodes])


@pytest.mark.long
def test_a_file_has_every_tick_of_real_time(tmp_path: Path) -> None:
    path = tmp_path / "run.rrd"
    assert evaluate(tmp_path, str(path), "--realtime") == 0
    file = RrdFile(path)
    times_ns, commands = file.joints("commanded", JOINTS)
    assert commands.shape == (12 * EPISODES, 14)
    measured_ns, _ = file.joints("measured", JOINTS)
    assert set(times_ns) <= set(measured_ns)
    assert set(times_ns) <= set(file.rows("/cameras/top", "blob")[0])
    lateness = file.scalars("/timing/lateness_ms")[1]
    assert lateness[0] == lateness[12] == 0
    assert (np.abs(lateness) < 1000).all()
    assert "/timing/stages/infer" in file.entities or "/timing/stages/reply" in file.entities


@pytest.mark.long
def test_a_file_has_every_tick_of_eval_real(tmp_path: Path) -> None:
    path = tmp_path / "run.rrd"
    cameras = "{top: {camera: top, hw: [120, 160]}, "
    cameras += "left_wrist: {camera: left_wrist, hw: [120, 160]}}"
    command = [
        sys.executable, "-m", "runtime.eval_real", "-c", "sim_twin", "-m", POLICY, "--yes",
        "-n", "2", "--max_timesteps", "40", "--robot.cameras", cameras,
        "-o", str(tmp_path / "results"), "--near", "10", "--same_joints", "--fps", "20",
        "--max_sensing_age_s", "5", "--robot.sensor_timeout_s", "5", "--video_fps", "0",
        "--rerun", str(path),
    ]  # fmt: skip
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    file = RrdFile(path)
    names = sorted({entity.split("/")[2] for entity in file.entities if "/joints/" in entity})
    assert len(names) == 14
    times_ns, commands = file.joints("commanded", names)
    measured_ns, states = file.joints("measured", names)
    np.testing.assert_array_equal(measured_ns, times_ns)
    folder = tmp_path / "results" / "sim_twin" / "sim_transfer_cube"
    for index in range(2):
        recording = Recording.load(folder / f"rollout_{index:03d}")
        order = [names.index(spec.name) for spec in recording.robot_limits.actions]
        rows = recording.rows
        # The view has another zero, but the same intervals, to the ns.
        gaps_ns, first = np.diff(rows["sent_ns"]), len(times_ns) - len(rows["sent_ns"])
        (start,) = (
            at
            for at in range(first + 1)
            if np.array_equal(np.diff(times_ns[at : at + len(gaps_ns) + 1]), gaps_ns)
        )
        shown = slice(start, start + len(gaps_ns) + 1)
        np.testing.assert_array_equal(commands[shown][:, order], rows["command"])
        np.testing.assert_array_equal(states[shown][:, order], rows["state"])
    assert len(file.rows("/cameras/top", "blob")[0]) > 40
    assert {"approach", "wait", "run", "coming to rest: the rollout ends"} <= set(file.texts())
    assert len(file.scalars("/timing/seam_jump")[0]) > 4


@pytest.mark.long
def test_a_process_that_dies_does_not_end_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was logged before is in the file."""
    wait, waits = LiveView.wait, []

    def kill_then_wait(view: LiveView) -> None:
        waits.append(view)
        if len(waits) == 18:
            time.sleep(0.5)
            os.kill(view._process.pid, signal.SIGKILL)
        wait(view)

    monkeypatch.setattr(LiveView, "wait", kill_then_wait)
    assert evaluate(tmp_path, str(tmp_path / "run.rrd")) == 0
    assert "its process ended (killed by SIGKILL)" in caplog.text
    assert 12 <= len(RrdFile(tmp_path / "run.rrd").joints("commanded", JOINTS)[0]) <= 18


@pytest.mark.long
def test_a_full_disk_does_not_end_the_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.rrd").symlink_to("/dev/full")
    assert evaluate(tmp_path, str(tmp_path / "run.rrd")) == 0
    # A short evaluation may be over before the process says why it ends.
    over = "the live view is over: [Errno 28] No space left on device" in caplog.text
    assert over or "the live view is incomplete: its process ended (exit status 1)" in caplog.text


@pytest.mark.long
def test_a_viewer_that_is_not_there_does_not_end_the_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert evaluate(tmp_path, "rerun+http://127.0.0.1:9/proxy") == 0
    assert "no live view: --rerun: got nothing at rerun+http://127.0.0.1:9/proxy" in caplog.text


@pytest.mark.long
def test_a_viewer_that_does_not_open_does_not_end_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if _listens(VIEWER_URL, 0.5):
        pytest.skip("a viewer runs on this host")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert evaluate(tmp_path, VIEWER) == 0
    assert "no live view: --rerun: the viewer does not open" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("ended_by", [signal.SIGSTOP, signal.SIGKILL])
def test_a_viewer_that_hangs_or_is_closed_is_not_waited_for(
    tmp_path: Path, ended_by: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    server = "import rerun, sys, time; print(rerun.RecordingStream('x').serve_grpc(grpc_port={}), "
    server += "flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", server.format(19_877)], stdout=subprocess.PIPE, text=True
    ) as viewer:
        try:
            assert viewer.stdout is not None
            url = viewer.stdout.readline().strip()
            viewer.send_signal(ended_by)
            began_s = time.monotonic()
            assert evaluate(tmp_path, url, episodes=40) == 0
            assert time.monotonic() - began_s < 60
        finally:
            viewer.kill()
    if ended_by == signal.SIGSTOP:
        assert "dropped because" in caplog.text
    else:
        assert "no live view" in caplog.text or "the live view is over" in caplog.text
