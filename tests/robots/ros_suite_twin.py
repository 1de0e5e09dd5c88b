"""``agilex_aloha_twin`` against the node that publishes the twin; run by ``test_robots_ros``."""

from __future__ import annotations

import time

import pytest
from contracts.robot import RobotBehaviour
from ros_rig import twin_node

from robots.errors import RobotError
from robots.factory import make_robot


@pytest.fixture(scope="module")
def simulated():
    with twin_node():
        yield


class TestTwin(RobotBehaviour):
    """The same driver and topics; limits, units and camera of the simulated robot."""

    @pytest.fixture
    def robot(self, simulated):
        with make_robot("agilex_aloha_twin") as made:
            yield made

    def test_a_refused_reset_says_why(self, robot) -> None:
        robot.connect()
        with pytest.raises(RobotError, match=r"refuses: .*seed: got -1, expected 0 to"):
            robot.reset(-1)
        assert robot.reset(3)

    def test_the_scripted_expert_succeeds_over_ros(self, robot) -> None:
        from envs.aloha_physics import AlohaSim
        from envs.scripted_expert import plan_episode

        sim = AlohaSim("sim_transfer_cube")
        sim.reset(11)
        plan = plan_episode(sim)
        robot.connect()
        robot.reset(11)
        began_s = time.monotonic()
        while not robot.outcome().success:
            tick = int((time.monotonic() - began_s) / 0.02)
            assert tick < 800, robot.outcome()
            robot.send_action(plan[min(tick, 399)])
            time.sleep(0.005)
        assert robot.outcome().reward == 4.0
        assert robot.reset(12)
        assert robot.outcome()[:2] == (False, 0.0)
