"""Runs LeRobot's own client: ``PYTHON lerobot_real_client.py JOB.json``, in LeRobot's environment.

Imports nothing of this project. The job has the source tree of LeRobot's release (for its mock
robot, which its wheel has not), the gateway's address, and how to drive the client; the result, a
pickle of plain values and arrays, is what was observed and the actions that arrived.
"""

from __future__ import annotations

import json
import pickle
import sys
import threading
import time
from pathlib import Path

import numpy as np

LIMIT_S = 30.0


def main(job: dict) -> dict:
    sys.path.insert(0, job["source"])
    from lerobot.async_inference.configs import RobotClientConfig
    from lerobot.async_inference.robot_client import RobotClient
    from lerobot.robots import RobotConfig

    from tests.mocks.mock_robot import MockRobot, MockRobotConfig

    random = np.random.default_rng(job["seed"])

    @RobotConfig.register_subclass("seeing_robot")
    class SeeingRobotConfig(MockRobotConfig):
        pass

    class SeeingRobot(MockRobot):
        """The mock robot cannot have cameras in this release."""

        config_class = SeeingRobotConfig

        @property
        def _cameras_ft(self) -> dict[str, tuple]:
            return {"top": (*job["camera_hw"], 3)}

        def get_observation(self) -> dict:
            seen = super().get_observation()
            for name, shape in self._cameras_ft.items():
                seen[name] = random.integers(0, 256, shape, dtype=np.uint8)
            return seen

    globals()["SeeingRobot"] = SeeingRobot  # where LeRobot looks for a robot that is not its own
    make_config = SeeingRobotConfig if job["camera_hw"] else MockRobotConfig
    client = RobotClient(
        RobotClientConfig(
            server_address=job["address"],
            robot=make_config(n_motors=job["motors"]),
            policy_type=job["policy_type"],
            pretrained_name_or_path="user/model",
            actions_per_chunk=job["actions_per_chunk"],
            chunk_size_threshold=0.0,
        )
    )
    result: dict = {"started": client.start(), "chunks": []}
    if not result["started"]:
        client.stop()
        return result
    receiver = threading.Thread(target=client.receive_actions, daemon=True)
    receiver.start()
    client.start_barrier.wait()
    for _ in range(job["count"]):
        timestep = max(client.latest_action, 0)
        began_s = time.perf_counter()
        seen = client.control_loop_observation(job["task"])
        while not client.actions_available():
            if time.perf_counter() - began_s > LIMIT_S:
                raise TimeoutError(f"no actions after {len(result['chunks'])} chunks")
            time.sleep(0)
        took_s = time.perf_counter() - began_s
        chunk = list(client.action_queue.queue)
        result["chunks"].append(
            {
                "seen": seen,
                "timestep": timestep,
                "timesteps": [action.get_timestep() for action in chunk],
                "actions": np.stack([action.get_action().numpy() for action in chunk]),
                "took_s": took_s,
            }
        )
        while client.actions_available():
            client.control_loop_action()
    client.stop()
    return result


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.with_suffix(".pickle").write_bytes(pickle.dumps(main(json.loads(path.read_text()))))
