"""``ros2``: its configuration, and the driver against real rclpy in another process."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from contracts.robot import RobotBehaviour, until

from robots import ros2_environment
from robots.base import ActionKind, JointSample
from robots.errors import (
    ConfigError,
    ConnectFailed,
    ContractViolated,
    RobotError,
    SensorLost,
    StampFault,
)
from robots.factory import make_robot
from robots.ros_topics import pick_joints
from robots.sample_buffer import SampleBuffer
from tests.robots import ros2_rig
from tests.robots.ros2_rig import ARM, COMPRESSED, JOINT_STATES, PICTURES, arm

SHORT = "[{topic: /c, message: JointState, joints: [l0], kinds: {l0: %s}}]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"commands": SHORT % "effort"}, r"kinds.l0: got 'effort', expected one of \['position'"),
        ({"commands": SHORT % "delta"}, r"kinds.l0: got 'delta', expected .* at rest"),
        ({"commands": "[{topic: /c, message: Twist, joints: [l0]}]"}, r"message: got 'Twist'"),
        ({"commands": "[{topic: /c, message: JointState, joints: [l0], units: {l9: deg}}]"},
         r"units: got \['l9'\], expected some of \['l0'\]"),
        ({"commands": "[{topic: /c, message: JointTrajectory, joints: [x], kinds: {x: velocity}}]"},
         r"got a velocity on a JointTrajectory, expected positions"),
        ({"commands": "[{topic: /c, message: JointState, joints: [x, l0], kinds: {x: velocity}}]"},
         r"got positions and velocities on one topic"),
        ({"commands": SHORT % "velocity", "control_hz": "[1, 100]"},
         r"control_hz: got 1 or more, expected 8 or more"),
        ({"commands": "[]"}, r"commands: got no joints, expected at least one"),
        ({"control_hz": "[50, 10]"}, r"control_hz: got 50 to 10"),
        ({"limits.velocity": "[1]"}, r"limits: velocity: got 1 numbers, expected 14"),
        ({"start_pose": "[1]"}, r"start_pose: got 1 numbers, expected 14"),
        ({"start_pose": str([9.0] * 14)}, r"start_pose: got \['l0', .* outside"),
        ({"discovery": "everywhere"}, r"discovery: got 'everywhere' .*localhost"),
        ({"domain_id": "233"}, r"domain_id: got 233, expected 0 to 232"),
        ({"cameras.top.encoding": "nv12"}, r"encoding: got 'nv12'"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_robot(str(ARM), overrides)


def test_kinds_units_and_prefixes_reach_the_contract() -> None:
    commands = [
        {"topic": "/a", "message": "JointTrajectory", "joints": ["l0", "l_grip"],
         "kinds": {"l_grip": "gripper"}, "units": {"l0": "deg"}},
        {"topic": "/b", "message": "Float64MultiArray", "joints": ["x"], "prefix": "base_",
         "kinds": {"x": "velocity"}},
    ]  # fmt: skip
    three = json.dumps([1.0] * 3)
    robot = arm({
        "commands": json.dumps(commands), "start_pose": "null", "start_velocity": "null",
        "limits.position_lower": json.dumps([-1.0] * 3), "limits.position_upper": three,
        "limits.velocity": three, "limits.acceleration": three, "stops_alone_after_s": "0.5",
    })  # fmt: skip
    assert [(spec.name, spec.kind, spec.unit) for spec in robot.contract.actions] == [
        ("l0", ActionKind.POSITION, "deg"),
        ("l_grip", ActionKind.GRIPPER, "range"),
        ("base_x", ActionKind.VELOCITY, "rad/s"),
    ]
    assert robot.start_pose is None


@pytest.mark.parametrize(("name", "dims", "gripper"), [("aloha_ros2", 14, 6), ("piper_ros2", 7, 6)])
def test_a_shipped_configuration_fits_itself(name: str, dims: int, gripper: int) -> None:
    """Written from public descriptions: what they cannot get wrong without an arm."""
    contract = make_robot(name).contract
    assert contract.action_names == contract.joint_names
    assert (contract.state_dim, contract.action_dim) == (dims, dims)
    assert contract.actions[gripper].kind is ActionKind.GRIPPER
    assert contract.actions[gripper].unit == "m"


def test_joints_are_picked_by_name() -> None:
    message = SimpleNamespace(name=["c", "a", "b"], position=[3.0, 1.0, 2.0])
    assert pick_joints(message, ("a", "b")).tolist() == [1.0, 2.0]
    with pytest.raises(ContractViolated, match=r"got joints \['c', 'a', 'b'\], expected each of"):
        pick_joints(message, ("a", "d"))
    message.name[0] = "a"
    with pytest.raises(ContractViolated, match=r"expected each of \['b'\] once"):
        pick_joints(message, ("b",))


def test_a_stamp_that_jumps_ahead_is_a_fault() -> None:
    stream = SampleBuffer[JointSample]("/j", timeout_s=5.0, longest_jump_s=0.5)
    for stamp_ns, received_ns in ((0, 0), (10**9, 10**9), (3 * 10**9, 11 * 10**8)):
        stream.add(JointSample(np.zeros(1, np.float32), stamp_ns, received_ns))
    with pytest.raises(StampFault, match=r"/j: stamp jumped ahead by 1.900 s, .*at most 0.5 s"):
        stream.newest()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("print(3, 10)", r"a Python 3.10, not 3.1\d as here \(ROS 2 Humble's is 3.10: too old\)"),
        (f"print({sys.version_info[0]}, {sys.version_info[1]}); sys.exit('No module named rclpy')",
         r"which has no usable rclpy \(No module named rclpy\); expected one: run `make ros2`"),
    ],
)  # fmt: skip
def test_a_python_without_ros2_is_refused_in_one_line(tmp_path, answers: str, message: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport sys\n{answers}\n")
    python.chmod(0o755)
    with pytest.raises(ConnectFailed, match=message) as refused:
        ros2_environment.find_interpreter(str(python))
    assert "\n" not in str(refused.value)
    with pytest.raises(ConnectFailed, match=r"got /nowhere, which does not exist"):
        ros2_environment.find_interpreter("/nowhere")


@pytest.fixture(scope="module", params=["JointState", "JointTrajectory", "Float64MultiArray"])
def running(request, tmp_path_factory):
    """The arm's and the camera's node, and the owner; once for each kind of command message."""
    folder, domain = tmp_path_factory.mktemp("ros2"), ros2_rig.free_domain()
    overrides = with_message(request.param, domain)
    robot = arm(overrides)
    with ros2_rig.peers(folder, domain, robot) as nodes, robot.companion() as found:
        yield SimpleNamespace(
            overrides={**overrides, **found}, nodes=nodes, folder=folder, kind=request.param
        )


def with_message(message: str, domain: int) -> dict[str, str]:
    (command,) = arm().config.commands
    changed = {
        "topic": command.topic, "message": message, "joints": list(command.joints),
        "kinds": dict(command.kinds),
    }  # fmt: skip
    return {"commands": json.dumps([changed]), "domain_id": str(domain)}


@pytest.mark.long
@pytest.mark.timeout(300)
class TestPeer(RobotBehaviour):
    """Real rclpy on the other side; every kind of command message."""

    @pytest.fixture
    def robot(self, running):
        with arm(running.overrides) as made:
            yield made

    def test_a_trajectory_takes_one_command_period(self, robot, running) -> None:
        if running.kind != "JointTrajectory":
            pytest.skip("a trajectory alone has a duration")
        with robot:
            robot.connect()
            self.move(robot)
        within_s = ros2_rig.read_commands(running.folder, 14)["within_s"]
        assert (within_s > 0).all()
        assert (within_s <= 1 / robot.contract.control_hz[0]).all()

    def test_pictures_are_rgb(self, robot) -> None:
        with robot:
            robot.connect()
            first = robot.get_cameras()["top"].image[0, 0]
            assert first[0] == 255
            assert first[1] <= 1  # hundreds of pictures, not tens of thousands


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    folder, domain = tmp_path_factory.mktemp("ros2"), ros2_rig.free_domain()
    images = (PICTURES, COMPRESSED)
    with ros2_rig.peers(folder, domain, arm(), images) as (joints, camera):
        yield SimpleNamespace(joints=joints, camera=camera, domain=domain)


def spoil(nodes, topic: str, mode: str):
    node = nodes.joints if topic == JOINT_STATES else nodes.camera
    return node.spoilt(topic, mode)


def impatient(nodes) -> dict[str, str]:
    """Where the whole time passes."""
    return {"domain_id": str(nodes.domain), "connect_timeout_s": "6"}


@pytest.mark.long
@pytest.mark.timeout(300)
def test_our_node_leaves_no_shared_memory_behind(nodes) -> None:
    robot = arm({"domain_id": str(nodes.domain)})
    with robot.companion(), robot:
        robot.connect()
        locks = ros2_rig.held_locks(robot.owner_pid)
        assert len(locks) >= 2  # of its segment, and of its ports
    assert [lock for lock in locks if lock.exists()] == []


@pytest.fixture(scope="module")
def connected(nodes):
    with arm({"domain_id": str(nodes.domain)}) as robot:
        robot.connect()
        yield robot


@pytest.mark.long
@pytest.mark.timeout(300)
class TestFaults:
    """Each with its own line, and before any motion where it was so from the beginning."""

    @pytest.mark.parametrize(
        ("topic", "mode", "kind", "message"),
        [
            (JOINT_STATES, "mute", SensorLost, r"got nothing, .* on \['/joint_states'\] .* domain"),
            (PICTURES, "mute", SensorLost, r"got nothing, .* on \['/top/image_raw'\] within 6 s"),
            (PICTURES, "freeze", StampFault, rf"{PICTURES}: stamp stands still at \d+ ns"),
            (JOINT_STATES, "names", ContractViolated, rf"{JOINT_STATES}: got joints .*'another'"),
            (
                JOINT_STATES,
                "count",
                ContractViolated,
                rf"{JOINT_STATES}: got 5 positions, .* 15",
            ),
            (JOINT_STATES, "nan", ContractViolated, rf"{JOINT_STATES}: got .*nan.* finite"),
            (PICTURES, "encoding", ContractViolated, rf"{PICTURES}: got encoding 'nv12'"),
            (PICTURES, "size", ContractViolated, rf"{PICTURES}: got \(height, width\) \(24, 64\)"),
            (PICTURES, "short", ContractViolated, rf"{PICTURES}: got \d+ bytes in rows of 192"),
        ],
    )
    def test_on_connecting(self, nodes, topic: str, mode: str, kind: type, message: str) -> None:
        with spoil(nodes, topic, mode), arm(impatient(nodes)) as robot:
            with pytest.raises(kind, match=message) as refused:
                robot.connect()
            assert type(refused.value) is kind
            assert robot.role is None

    @pytest.mark.parametrize(
        ("overrides", "kind", "message"),
        [
            ({"cameras.top.topic": "/nobody"}, SensorLost,
             r"got no publisher of \['/nobody'\] in ROS domain \d+ on this host, .*there are "
             r"\[.*'/joint_states'.*--ros_discovery subnet"),
            ({"cameras.top.topic": "/joint_states"}, ContractViolated,
             r"/joint_states: got messages of type sensor_msgs/JointState, expected"),
            ({"cameras.top.qos": "reliable"}, ContractViolated,
             r"/top/image_raw: qos: got a publisher that is best_effort, expected reliable"),
            ({"commands": '[{topic: /deaf, message: JointState, joints: [l0]}]'}, ConnectFailed,
             r"got no subscriber on \['/deaf'\] in ROS domain \d+ on this host within 6 s"),
            ({"commands": '[{topic: /joint_commands, message: JointTrajectory, joints: [l0]}]'},
             ContractViolated, r"/joint_commands: got .*JointState, expected traj"),
        ],
    )  # fmt: skip
    def test_wrong_topics(self, nodes, overrides: dict, kind: type, message: str) -> None:
        if "commands" in overrides:
            one = {f"limits.{name}": "[1.0]" for name in ("position_upper", "velocity")}
            one |= {"limits.position_lower": "[-1.0]", "limits.acceleration": "[1.0]"}
            overrides = {**overrides, **one, "start_pose": "null", "start_velocity": "null"}
        with arm({**impatient(nodes), **overrides}) as robot:
            with pytest.raises(kind, match=message) as refused:
                robot.connect()
            assert type(refused.value) is kind

    @pytest.mark.parametrize(
        ("topic", "mode", "expected"),
        [
            (
                PICTURES,
                "mute",
                (SensorLost, rf"{PICTURES}: nothing received for \d.\d+ s, .* 0.8 s"),
            ),
            (JOINT_STATES, "mute", (SensorLost, rf"{JOINT_STATES}: nothing received for \d.\d+ s")),
            (
                PICTURES,
                "freeze",
                (StampFault, rf"{PICTURES}: stamp stands still at \d+ ns for \d."),
            ),
            (
                JOINT_STATES,
                "freeze",
                (StampFault, rf"{JOINT_STATES}: stamp stands still at \d+ ns"),
            ),
            (
                JOINT_STATES,
                "back",
                (StampFault, rf"{JOINT_STATES}: stamp went back by [23]\.\d+ s"),
            ),
            (PICTURES, "ahead", (StampFault, rf"{PICTURES}: stamp jumped ahead by 3\d+\.\d+ s")),
            (JOINT_STATES, "names", (SensorLost, rf"{JOINT_STATES}: got joints")),
            (JOINT_STATES, "nan", (SensorLost, rf"{JOINT_STATES}: got .*nan")),
            (PICTURES, "size", (SensorLost, rf"{PICTURES}: got \(height, width\)")),
        ],
    )
    def test_while_running(
        self, nodes, connected, topic: str, mode: str, expected: tuple[type, str]
    ) -> None:
        kind, message = expected
        raised: list[RobotError] = []

        def look() -> bool:
            try:
                connected.get_observation()
            except RobotError as error:
                raised.append(error)
            return bool(raised)

        def healed() -> bool:
            raised.clear()
            return not look()

        until(healed)
        with spoil(nodes, topic, mode):
            until(look)
            assert type(raised[0]) is kind
            with pytest.raises(kind, match=message):
                raise raised[0]
        until(healed)

    def test_a_compressed_picture(self, nodes) -> None:
        overrides = {"domain_id": str(nodes.domain), "cameras.top.topic": COMPRESSED}
        with arm(overrides) as robot:
            robot.connect()
            assert robot.get_cameras()["top"].image.shape == (48, 64, 3)


@pytest.fixture(scope="module")
def simulated():
    ros2_rig.interpreter()
    domain = {"domain_id": str(ros2_rig.free_domain())}
    with make_robot("ros2_aloha_twin", domain).companion() as found:
        yield {**domain, **found}


@pytest.mark.long
@pytest.mark.timeout(300)
class TestTwin(RobotBehaviour):
    """The shipped configuration, with the simulation that it starts."""

    @pytest.fixture
    def robot(self, simulated):
        with make_robot("ros2_aloha_twin", simulated) as made:
            yield made

    def test_a_refused_reset_says_why(self, robot) -> None:
        robot.connect()
        with pytest.raises(RobotError, match=r"refuses: .*seed: got -1, expected 0 to"):
            robot.reset(-1)
        assert robot.reset(3)

    def test_commands_after_a_reset_begin_at_the_new_pose(self, robot) -> None:
        """Not on the way from where the arms were before it."""
        robot.connect()
        robot.reset(0)
        far = robot.start_pose
        far[0] = 1.0

        def arrived() -> bool:
            robot.send_action(far)
            return abs(robot.get_joints().position[0] - far[0]) < 0.05

        until(arrived)
        robot.reset(0)
        began_ns = robot.get_joints().stamp_ns

        def stayed() -> bool:
            robot.send_action(robot.start_pose)
            joints = robot.get_joints()
            assert abs(joints.position[0]) < 0.05
            return joints.stamp_ns > began_ns + 300_000_000

        until(stayed)
