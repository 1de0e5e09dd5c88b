"""``agilex_aloha`` against a node in Agilex's coordinates; run by ``test_robots_ros``, by itself.

rospy keeps one node, with its threads, for as long as its process lives, and warns of its own age.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
from contracts.robot import RobotBehaviour, until
from ros_rig import agilex_node

from robots.agilex_aloha import AgilexAloha
from robots.base import Role
from robots.errors import (
    ConnectFailed,
    ContractViolated,
    RobotError,
    RobotLost,
    SensorLost,
    StampFault,
)
from robots.factory import make_robot

FRONT, LEFT = "/camera_f/color/image_raw", "/puppet/joint_left"


@pytest.fixture(scope="module")
def agilex():
    """A node in Agilex's coordinates."""
    with agilex_node() as node:
        yield node


class TestAgilex(RobotBehaviour):
    """The shipped configuration, as it is."""

    @pytest.fixture
    def robot(self, agilex):
        with make_robot("agilex_aloha") as made:
            yield made

    def test_pictures_are_rgb_and_of_the_camera_named(self, robot) -> None:
        robot.connect(Role.SENSING)
        for index, name in enumerate(("primary", "wrist_left", "wrist_right")):
            image = robot.get_cameras()[name].image
            assert (image[:, :320, 2] == 255).all()
            assert (image[:, 320:, 2] == 0).all()
            assert (image[..., 0] == 10 * index + 5).all()

    def test_both_arms_are_commanded_each_its_half(self, robot) -> None:
        robot.connect()
        target = robot.start_pose
        target[[1, 8]] = 0.2, 0.4

        def arrived() -> bool:
            robot.send_action(target)
            return np.abs(robot.get_joints().position - target).max() < 1e-6

        until(arrived)
        robot.send_action(robot.start_pose)

    def test_depth_belongs_to_the_picture(self, agilex) -> None:
        with make_robot("agilex_aloha", {"ros_operator.use_depth_image": "true"}) as robot:
            assert robot.contract.depth_cameras == ("primary", "wrist_left", "wrist_right")
            robot.connect(Role.SENSING)
            for index, sample in enumerate(robot.get_cameras().values()):
                assert sample.depth.dtype == np.uint16
                assert sample.depth.shape == (480, 640)
                assert sample.depth[0, 0] // 1000 == index + 1
            assert set(robot.get_observation().depth) == set(robot.contract.cameras)


class TestPictures:
    """Compressed topics, and encodings beside the plain ones, as real messages."""

    def test_compressed_colour_and_depth(self, agilex) -> None:
        overrides = {
            "ros_operator.img_front_topic": "/camera_f/color/image_raw/compressed",
            "ros_operator.img_left_topic": "/camera_l/color/png",
            "ros_operator.img_front_depth_topic": "/camera_f/depth/image_raw/compressedDepth",
            "ros_operator.use_depth_image": "true",
        }
        with make_robot("agilex_aloha", overrides) as robot:
            robot.connect(Role.SENSING)
            samples = robot.get_cameras()
        for index, name in enumerate(("primary", "wrist_left", "wrist_right")):
            image = samples[name].image.astype(int)
            assert image.shape == (480, 640, 3)
            assert np.abs(image[:, :310, 2] - 255).max() <= 3
            assert image[:, 330:, 2].max() <= 3
            assert np.abs(image[:, 330:, 0] - (10 * index + 5)).max() <= 3
            assert samples[name].depth.dtype == np.uint16
            assert samples[name].depth[0, 0] // 1000 == index + 1

    def test_subsampled(self, agilex) -> None:
        with agilex.spoilt(FRONT, "yuyv"), make_robot("agilex_aloha") as robot:
            robot.connect(Role.SENSING)
            assert (robot.get_cameras()["primary"].image == 255).all()

    def test_an_assumed_colour_order_is_logged_once(self, agilex, caplog) -> None:
        with agilex.spoilt(FRONT, "8UC3"), make_robot("agilex_aloha") as robot:
            robot.connect(Role.SENSING)
            assert (robot.get_cameras()["primary"].image[:, :320, 2] == 255).all()
        said = [r.message for r in caplog.records if "taken for blue, green, red" in r.message]
        assert len(said) == 1
        assert said[0].startswith(f"{FRONT}: encoding '8UC3'")

    @pytest.mark.parametrize(
        ("key", "topic", "message"),
        [
            ("img_front_topic", LEFT, "type sensor_msgs/JointState, expected sensor_msgs/Image or"),
            ("puppet_arm_left_topic", FRONT, "type sensor_msgs/Image, expected sensor_msgs/JointS"),
        ],
    )
    def test_a_topic_of_another_type(self, agilex, key: str, topic: str, message: str) -> None:
        with (
            make_robot("agilex_aloha", {f"ros_operator.{key}": topic}) as robot,
            pytest.raises(ContractViolated, match=f"{topic}: got messages of {message}"),
        ):
            robot.connect(timeout_s=1.0)


def impatient(**overrides: str) -> AgilexAloha:
    return make_robot("agilex_aloha", overrides)


class TestRefusals:
    """What is wrong is told by topic and numbers before anything moves."""

    @pytest.fixture(autouse=True)
    def _node(self, agilex):
        self.node = agilex

    @pytest.mark.parametrize(
        ("topic", "mode", "kind", "message"),
        [
            (
                FRONT,
                "mute",
                SensorLost,
                rf"got nothing, or a single message, on \['{FRONT}'\] within",
            ),
            (
                LEFT,
                "mute",
                SensorLost,
                rf"got nothing, or a single message, on \['{LEFT}'\] within",
            ),
            (FRONT, "freeze", StampFault, rf"{FRONT}: stamp stands still at \d+ ns"),
            (LEFT, "names", ContractViolated, rf"{LEFT}: got joints \[.*'joint3', 'joint2'.*expec"),
            (LEFT, "count", ContractViolated, rf"{LEFT}: got 6 positions, expected 7"),
            (LEFT, "nan", ContractViolated, rf"{LEFT}: got .*nan.*expected finite"),
            (FRONT, "encoding", ContractViolated, rf"{FRONT}: got encoding 'nv12', expected one"),
            (FRONT, "size", ContractViolated, rf"{FRONT}: got \(height, width\) \(240, 640\), exp"),
            (FRONT, "short", ContractViolated, rf"{FRONT}: got \d+ bytes in rows of 1926 for 480"),
            (
                "/master/joint_right",
                "deaf",
                ConnectFailed,
                r"got no subscriber on \['/master/joint_r",
            ),
        ],
    )
    def test_on_connecting(self, topic: str, mode: str, kind: type, message: str) -> None:
        with self.node.spoilt(topic, mode), impatient() as robot:
            with pytest.raises(kind, match=message) as refused:
                robot.connect(timeout_s=1.0)
            assert type(refused.value) is kind
            assert robot.role is None
        with impatient() as robot:
            robot.connect()

    @pytest.mark.parametrize(
        ("topic", "mode", "kind", "message"),
        [
            (FRONT, "mute", SensorLost, rf"{FRONT}: nothing received for 0.\d+ s, expected .* 0.3"),
            (LEFT, "mute", SensorLost, rf"{LEFT}: nothing received for 0.\d+ s, expected .* 0.3"),
            (FRONT, "freeze", StampFault, rf"{FRONT}: stamp stands still at \d+ ns for 0.\d+ s"),
            (LEFT, "back", StampFault, rf"{LEFT}: stamp went back by [23]\.\d+ s, from \d+ to"),
            (LEFT, "names", ContractViolated, rf"{LEFT}: got joints"),
        ],
    )
    def test_while_running(self, topic: str, mode: str, kind: type, message: str) -> None:
        def look() -> bool:
            try:
                robot.get_observation()
            except RobotError as error:
                raised.append(error)
            return bool(raised)

        raised: list[RobotError] = []
        with impatient(sensor_timeout_s="0.3") as robot:
            robot.connect()
            with self.node.spoilt(topic, mode):
                until(look)
            assert type(raised[0]) is kind
            with pytest.raises(kind, match=message):
                raise raised[0]

            def healed() -> bool:
                raised.clear()
                return not look()

            until(healed)

    def test_commands_without_a_subscriber(self) -> None:
        with impatient() as robot:
            robot.connect()
            pose = robot.get_joints().position

            def unheard() -> bool:
                try:
                    robot.send_action(pose)
                except RobotLost as error:
                    assert "the last subscriber on /master/joint_left has gone" in str(error)
                    return True
                return False

            with self.node.spoilt("/master/joint_left", "deaf"):
                until(unheard)

    def test_no_simulated_robot(self) -> None:
        topics = "{outcome: /nobody/outcome, reset: /nobody/reset}"
        with (
            impatient(twin=topics) as robot,
            pytest.raises(
                SensorLost,
                match=r"no simulated robot on /nobody/outcome and .*twin_ros_node` running",
            ),
        ):
            robot.connect(timeout_s=1.0)


def test_the_programs_logging_is_left_alone(agilex, caplog) -> None:
    root = logging.getLogger()
    before, level, kind = list(root.handlers), root.level, logging.getLoggerClass()
    with make_robot("agilex_aloha") as robot:
        robot.connect(Role.CONTROL)
    assert root.handlers == before
    assert root.level == level
    assert logging.getLoggerClass() is kind
