"""The dummy, and how a robot's configuration is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from contracts.robot import RobotBehaviour

from policies import yaml_config
from robots.errors import ConfigError
from robots.factory import make_robot

ROOT = Path(__file__).resolve().parents[2]

ILSTUDIO = """
target: deploy.robot.dummy_robot.DummyRobot
name: theirs
config:
  obs_config:
    image:
      primary: {shape: "(48, 64, 3)", dtype: uint8}
      wrist_left: {shape: (32,16, 3), dtype: uint8}
    qpos: {shape: (14,), dtype: float32}
    qvel: {shape: (14,), dtype: float32}
  action_config: {shape: (12,), dtype: float32}
  ctrl_type: abs
  ctrl_space: joint
"""


class TestDummy(RobotBehaviour):
    @pytest.fixture
    def robot(self):
        return make_robot("dummy")

    def test_deltas_add_up(self) -> None:
        with make_robot("dummy", {"ctrl_type": "delta"}) as robot:
            robot.connect()
            for _ in range(3):
                robot.send_action(np.full(14, 0.5, np.float32))
            np.testing.assert_array_equal(robot.get_joints().position, np.full(14, 1.5))


def test_ilstudios_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(ILSTUDIO.replace("{shape: (32,16, 3), dtype: uint8}",
                                     "\n        shape: (32,16, 3)\n        dtype: uint8")
                    .replace("{shape: (14,), dtype", "{shape: '(14,)', dtype")
                    .replace("{shape: (12,), dtype", "{shape: [12], dtype"))  # fmt: skip
    robot = make_robot(str(path))
    assert robot.name == "theirs"
    assert robot.contract.cameras == {"primary": (48, 64), "wrist_left": (32, 16)}
    assert (robot.contract.state_dim, robot.contract.action_dim) == (14, 12)
    assert np.isinf(robot.limits.velocity).all()


def test_only_the_driver_in_use_is_imported() -> None:
    code = (
        "import sys; from robots.factory import make_robot; r = make_robot('dummy'); r.connect(); "
        "print([m for m in ('mujoco', 'torch', 'rospy', 'robots.sim_twin') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"obs_config.qpos.shape": "(7,)"}, r"action_config: got 14 commands, expected at most"),
        ({"obs_config.qpos.shape": "(7, 2)"}, r"obs_config.qpos: got float32 \(7, 2\), expected"),
        ({"obs_config.qpos.dtype": "float64"}, r"obs_config.qpos: got float64 \(14,\), expected"),
        ({"obs_config.image.top.shape": "(4, 4)"}, r"image.top: got uint8 \(4, 4\), expected"),
        ({"obs_config.image.top.shape": "(4, 4, 1)"}, r"image.top: got \(4, 4, 1\), expected 3"),
        ({"obs_config.image.top.shape": "__import__('os')"}, r"top: shape: got .*positive sizes"),
        ({"action_config.shape": "[0]"}, r"action_config.shape\[0\]: got 0, expected 1 to 8192"),
        ({"velocity_limit": "0"}, r"velocity_limit: got 0.0, expected more than 0"),
        ({"velocity_limit": ".inf"}, r"acceleration limit of 40.0 and no velocity limit"),
        ({"position_limit": "-1"}, r"position_limit: got -1.0, expected more than 0"),
        ({"camera_hz": "0"}, r"camera_hz: got 0.0, expected 0.01 to 10000"),
        ({"ctrl_typ": "abs"}, r"dummy.yaml: args: ctrl_typ: unknown key.*mean 'ctrl_type'"),
    ],
)
def test_invalid_values_are_refused_by_key(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        make_robot("dummy", overrides)
    assert isinstance(refused.value, yaml_config.InvalidConfig)  # one catch for all configurations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("type: agilex\n", r"type: got 'agilex', expected one of \['dummy', 'sim_twin', 'agilex_"),
        ("type: 'lerobot:'\n", r"got 'lerobot:', expected one of .*'lerobot:<type>'"),
        ("name: x\n", r"type: got '', expected either the key 'type' or 'target'"),
        ("type: dummy\nargs: {a: 1}\nconfig: {a: 1}\n", r"args: got both 'args' and 'config'"),
        ("type: dummy\ncolour: red\n", r"colour: unknown key"),
    ],
)
def test_files_without_a_valid_driver_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        make_robot(str(path))


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"robot configuration 'agilex'.*'dummy'.*'sim_twin'"):
        make_robot("agilex")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "type: invalid_driver cannot be imported: ModuleNotFoundError"),
        ("1 / 0", "type: invalid_driver cannot be imported: ZeroDivisionError"),
        ("made = 1", r"type: invalid_driver has no make\(args, name, source, overrides\)"),
    ],
)
def test_an_invalid_user_driver_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / "invalid_driver.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "invalid_driver", raising=False)
    config = tmp_path / "arm.yaml"
    config.write_text("type: python:invalid_driver\n")
    with pytest.raises(ConfigError, match=complaint):
        make_robot(str(config))
