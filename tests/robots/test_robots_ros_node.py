"""The ROS driver, without ROS where that suffices, and over a real master where there is one."""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ros_rig
from hypothesis import given
from hypothesis import strategies as st

from robots import ros_node
from robots.errors import ConfigError, ConnectFailed, ContractViolated
from robots.factory import make_robot
from robots.ros_images import decode_colour, decode_depth

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.skipif(bool(ros_rig.MISSING), reason=ros_rig.WHY_NOT)
@pytest.mark.timeout(300)
@pytest.mark.parametrize("robot", ["agilex", "twin"])
def test_over_a_real_master(tmp_path: Path, robot: str) -> None:
    suite = Path(__file__).with_name(f"ros_suite_{robot}.py")
    # Warnings are rospy's. Native tracebacks: pytest's own parse sources, which CPython 3.11 can
    # fail at while other threads run.
    flags = ["-q", "-W", "ignore", "--tb", "native", "-p", "no:cacheprovider"]
    with ros_rig.master(tmp_path) as environment:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", str(suite), *flags],
            check=False,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


def test_the_shipped_configuration_has_agilexs_limits_and_pose(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        robot = make_robot("agilex_aloha")
    upper = [2.6878, 3.4034, 0.0, 1.85, 1.3089, 1.7453, 7.0]
    lower = [-2.6878, 0.0, -3.0543, -1.85, -1.3089, -1.7453, 0.0]
    np.testing.assert_array_equal(robot.limits.position_upper, upper * 2)
    np.testing.assert_array_equal(robot.limits.position_lower, lower * 2)
    np.testing.assert_allclose(robot.start_velocity, [*[0.4] * 6, 8.0] * 2)
    pose = robot.start_pose
    assert robot.limits.violations(pose) == ()
    assert pose[13] == np.float32(3.557830810546875)
    # The measured pose has both elbows a little outside; that is said, and they stay at the limit.
    assert (pose[2], pose[9]) == (0.0, 0.0)
    assert [re.search(r"start pose of (\w+)", r.message)[1] for r in caplog.records] == [
        "left_joint2", "right_joint2"]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"limit_pos.upper": "[1, 2]"}, r"position_upper: got 2 numbers, expected 14, one for eac"),
        ({"limit_vel": "[1]"}, r"velocity: got 1 numbers, expected 14, one for each of \['left_jo"),
        ({"limit_pos.lower": "[9, 0, -3, -1, -1, -1, 0, -2, 0, -3, -1, -1, -1, 0]"},
         r"joint 0 \(left_joint0\): got position limits 9.0 to 2.6878, expected the lower one"),
        ({"init_pos.right": "[0, 0, 0, 0, 0, 0]"}, r"init_pos.right: got 6 numbers, expected 7"),
        ({"init_pos.left": "[0, 0, 0.2, 0, 0, 0, 0]"},
         r"init_pos: got 0.2 for joint 2 \(left_joint2\), expected -3.0543 to 0, its limits"),
        ({"init_pos.left": "[.nan, 0, 0, 0, 0, 0, 0]"}, r"init_pos.left\[0\]: got nan"),
        ({"ros_operator.arm_steps_length": "[0.1]"}, r"arm_steps_length: got \(0.1,\), expected 7"),
        ({"ros_operator.publish_rate": "0"}, r"publish_rate: got 0.0, expected 0.01 to 10000"),
        ({"ros_operator.use_robot_base": "true"}, r"use_robot_base: got true, expected false: the"),
        ({"joint_names": "[a, a, b, c, d, e, f]"}, r"joint_names: got .*, expected 7 different"),
        ({"cameras": "{top: {camera: rear}}"}, r"cameras.top.camera: got 'rear' .*one of \['front"),
        ({"sensor_timeout_s": "0"}, r"sensor_timeout_s: got 0.0, expected more than 0"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_robot("agilex_aloha", overrides)


def test_ilstudios_own_file_needs_only_the_limits_that_it_does_not_have(tmp_path: Path) -> None:
    ours = (ROOT / "configs" / "robot" / "agilex_aloha.yaml").read_text()
    theirs = ours[: ours.index("  # Of the commands while")].replace(
        "type: agilex_aloha", "type: deploy.robot.agilex_aloha.AgilexAloha"
    )
    path = tmp_path / "theirs.yaml"
    path.write_text(theirs)
    with pytest.raises(ConfigError, match=r"args: limit_vel: missing"):
        make_robot(str(path))
    fourteen = str([1.0] * 14)
    robot = make_robot(str(path), {"limit_vel": fourteen, "limit_acc": fourteen})
    assert robot.contract == make_robot("agilex_aloha").contract


def test_a_missing_master_is_reported_at_once(monkeypatch) -> None:
    uri = f"http://127.0.0.1:{ros_rig.free_port()}"
    monkeypatch.setenv("ROS_MASTER_URI", uri)
    with pytest.raises(ConnectFailed, match=rf"no ROS master answers at {uri} .*roscore running"):
        make_robot("agilex_aloha").connect()


@pytest.mark.parametrize("uri", ["", "localhost:11311", "http://"])
def test_an_address_that_is_none(monkeypatch, uri: str) -> None:
    monkeypatch.setenv("ROS_MASTER_URI", uri)
    with pytest.raises(ConnectFailed, match=r"no ROS master answers at "):
        ros_node.check_master(1.0)


def test_a_master_that_does_not_answer_times_out(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("ROS_MASTER_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began_s = time.monotonic()
        with pytest.raises(ConnectFailed, match=r"within 0.2 s \(timed out\)"):
            make_robot("agilex_aloha").connect(timeout_s=0.2)
        assert time.monotonic() - began_s < 60  # and not for ever


def test_a_module_that_is_not_installed_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConnectFailed, match=r"ROS 1 is not installed .*apt-get install python3-ro"):
        ros_node.import_ros("rospy_of_another_world")
    assert sys.path[-1] == ros_node.DIST_PACKAGES  # appended: nothing of ours is replaced


def image(array: np.ndarray, encoding: str, *, pad: int = 0, big: bool = False) -> SimpleNamespace:
    """A ``sensor_msgs/Image`` as rospy delivers it."""
    height, width = array.shape[:2]
    rows = array.astype(array.dtype.newbyteorder(">" if big else "<")).reshape(height, -1)
    rows = rows.view(np.uint8)
    rows = np.concatenate([rows, np.full((height, pad), 7, np.uint8)], axis=1)
    return SimpleNamespace(
        height=height, width=width, encoding=encoding, is_bigendian=int(big), step=rows.shape[1],
        data=rows.tobytes(),
    )  # fmt: skip


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(0, 5), st.booleans(), st.integers(0, 2**32)
)
def test_pictures_come_out_as_they_went_in(
    height: int, width: int, pad: int, big: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    rgb = generator.integers(0, 256, (height, width, 3), np.uint8)
    for encoding, sent in (("rgb8", rgb), ("bgr8", rgb[..., ::-1])):
        got = decode_colour(image(sent, encoding, pad=pad), (height, width))
        np.testing.assert_array_equal(got, rgb)
        assert got.flags.c_contiguous
    for encoding, kind in (("16UC1", np.uint16), ("mono16", np.uint16), ("32FC1", np.float32)):
        depth = generator.integers(0, 2**16, (height, width)).astype(kind)
        got = decode_depth(image(depth, encoding, pad=pad, big=big))
        np.testing.assert_array_equal(got, depth)
        assert got.dtype == kind


def test_depth_of_an_unknown_kind() -> None:
    with pytest.raises(ContractViolated, match=r"got encoding 'rgb8', expected one of \['16UC1'"):
        decode_depth(image(np.zeros((2, 2, 3), np.uint8), "rgb8"))
