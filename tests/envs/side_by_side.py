"""gym-aloha's physics and this project's, stepped side by side; prints what differed as JSON.

A process of its own: dm_control warns at import, and picks its GL for good.
"""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np

warnings.simplefilter("ignore")

from dm_control import mujoco as dm_mujoco  # noqa: E402
from dm_control.rl import control  # noqa: E402
from gym_aloha.constants import ASSETS_DIR  # noqa: E402
from gym_aloha.tasks import sim as theirs  # noqa: E402
from gym_aloha.utils import sample_box_pose, sample_insertion_pose  # noqa: E402

from envs.aloha_physics import AlohaSim  # noqa: E402

STEPS = 400


def compare(task: str, seed: int, *, render: bool) -> dict[str, float]:
    base = theirs.TransferCubeTask if task == "sim_transfer_cube" else theirs.InsertionTask

    class WithoutPictures(base):
        def get_observation(self, physics):
            return {"qpos": self.get_qpos(physics), "objects": self.get_env_state(physics)}

    sim = AlohaSim(task)
    physics = dm_mujoco.Physics.from_xml_path(str(ASSETS_DIR / sim.task.scene))
    env = control.Environment(physics, WithoutPictures(), float("inf"), control_timestep=0.02)
    if task == "sim_transfer_cube":
        theirs.BOX_POSE[0] = sample_box_pose(seed)
    else:
        theirs.BOX_POSE[0] = np.concatenate(sample_insertion_pose(seed))
    step = env.reset()
    sim.reset(seed)
    generator = np.random.default_rng(seed)
    errors = {"joints": 0.0, "objects": 0.0, "rewards": 0, "highest_reward": 0, "pixels": 0}
    for tick in range(STEPS):
        observation = step.observation
        for key, ours in (("qpos", sim.agent_pos), ("objects", sim.object_qpos)):
            name = "joints" if key == "qpos" else key
            errors[name] = max(errors[name], float(np.abs(observation[key] - ours).max()))
        if render and tick in (0, 200):
            expected = physics.render(480, 640, camera_id="top")
            errors["pixels"] += int((expected != sim.render_camera("top")).sum())
        action = generator.uniform(-1, 1, 14).astype(np.float32)
        step = env.step(action)
        reward = sim.step(action)
        errors["rewards"] += int(reward != step.reward)
        errors["highest_reward"] = max(errors["highest_reward"], reward)
    sim.close()
    return errors


if __name__ == "__main__":
    sys.stdout.write(
        json.dumps(compare(sys.argv[1], int(sys.argv[2]), render=sys.argv[3] == "render"))
    )
