"""Runs Mobile ALOHA's or Agilex's own code, unmodified, and keeps what it answers.

    python tests/policies/original_peer.py PEER CLONE OUT [--full] [--base] [--mended]

A program of its own, for an environment with torch, torchvision, einops, h5py and matplotlib: it
uses nothing of ours. PEER is mobile_aloha or agilex, CLONE a folder with act-plus-plus or
cobot_magic; ``--mended`` builds act-plus-plus's style encoder as its users mend it, ``--base`` adds
the mobile base to cobot_magic's. OUT gets a checkpoint with random weights, written as their
training writes it, and ``expected.npz``: the observation that their evaluation was given, and the
actions that it commanded. The robot, ROS, the simulation and the libraries of other policies are
stood in for; so is the GPU.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import torch

CAMERAS = ["cam_high", "cam_left_wrist", "cam_right_wrist"]
SIZES = {
    False: {"hidden_dim": 16, "dim_feedforward": 24, "nheads": 2, "enc_layers": 2, "dec_layers": 3,
            "chunk_size": 20, "image_hw": (64, 96)},
    True: {"hidden_dim": 512, "dim_feedforward": 3200, "nheads": 8, "enc_layers": 4,
           "dec_layers": 7, "chunk_size": 32, "image_hw": (480, 640)},
}  # fmt: skip
ABSENT = (
    "IPython", "wandb", "cv2", "rospy", "std_msgs.msg", "geometry_msgs.msg", "sensor_msgs.msg",
    "nav_msgs.msg", "cv_bridge", "sim_env", "aloha_scripts.robot_utils", "aloha_scripts.real_env",
    "robomimic.models.base_nets", "robomimic.algo.diffusion_policy",
    "diffusers.schedulers.scheduling_ddpm", "diffusers.schedulers.scheduling_ddim",
    "diffusers.training_utils",
)  # fmt: skip
BASE_DELAY = 13
"""Ticks by which act-plus-plus takes the base's actions before the arms'."""


class StandIn(types.ModuleType):
    """A module that has whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=f"{self.__name__}.{name}")


def stand_in() -> None:
    """What is not the network's or the evaluation's own, and the GPU."""
    for name in ABSENT:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), StandIn(".".join(parts[:end])))
    # What matplotlib asks of an interactive session.
    sys.modules["IPython"].version_info, sys.modules["IPython"].get_ipython = (9, 0), lambda: None
    os.getlogin = lambda: "user"
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self


def make_every_tensor_count(policy: torch.nn.Module) -> None:
    """Fresh weights have biases of zero and a batch-norm that does nothing."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in policy.state_dict().items():
            noise = torch.randn(tensor.shape, generator=random)
            if name.endswith("running_var"):
                tensor.copy_((0.3 * noise).exp())
            elif ".bn2." in name and name.endswith("weight"):
                tensor.copy_(0.3 + 0.05 * noise)
            elif tensor.ndim == 1:
                tensor.add_(0.1 * noise)


def write_episodes(folder: Path) -> None:
    """Two of nine ticks, without pictures: what the statistics are of."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for episode in range(2):
        with h5py.File(folder / f"episode_{episode}.hdf5", "w") as file:
            for name, dim in (("observations/qpos", 14), ("observations/qvel", 14),
                              ("action", 14), ("base_action", 2)):  # fmt: skip
                scale = random.uniform(0.05, 1.0, dim)
                file[name] = (random.normal(size=(9, dim)) * scale + scale).astype(np.float32)


def observation(hw: tuple[int, int], state_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(3, H, W, 3) uint8, smooth and noisy by halves, and (S,) float32."""
    random = np.random.default_rng(7)
    images = random.integers(0, 256, (3, *hw, 3), dtype=np.uint8)
    images[:, :, : hw[1] // 2] = np.linspace(0, 255, hw[1] // 2).astype(np.uint8)[:, None]
    return images, random.normal(size=state_dim).astype(np.float32)


def mobile_aloha(clone: Path, out: Path, size: dict[str, Any], *, mended: bool) -> None:
    """``eval_bc`` of act-plus-plus on its real robot: 14 joints and the base."""
    sys.path[:0] = [str(clone), str(clone / "detr")]
    sys.argv = ["imitate_episodes.py", "--ckpt_dir", str(out), "--policy_class", "ACT",
                "--task_name", "aloha_mobile", "--seed", "0", "--num_steps", "1"]  # fmt: skip
    import imitate_episodes
    import utils
    from detr.models import backbone, detr_vae

    backbone.is_main_process = lambda: False  # no download
    if mended:
        made = []

        def build_transformer(args: Any, original: Any = detr_vae.build_transformer) -> Any:
            made.append(args)
            return original(args) if len(made) % 2 else detr_vae.build_encoder(args)

        detr_vae.build_transformer = build_transformer
    chunk = size["chunk_size"]
    sizes = {k: v for k, v in size.items() if k not in ("chunk_size", "image_hw")}
    network = {"lr": 1e-5, "num_queries": chunk, "kl_weight": 10, "lr_backbone": 1e-5,
               "backbone": "resnet18", "camera_names": CAMERAS, "vq": False, "vq_class": None,
               "vq_dim": None, "action_dim": 16, "no_encoder": False,
               **sizes}  # fmt: skip
    config = {"ckpt_dir": str(out), "state_dim": 14, "real_robot": True, "policy_class": "ACT",
              "onscreen_render": False, "policy_config": network, "camera_names": CAMERAS,
              "episode_len": chunk - BASE_DELAY, "task_name": "aloha_mobile",
              "temporal_agg": False, "actuator_config": {"actuator_network_dir": None}}  # fmt: skip
    policy = imitate_episodes.make_policy("ACT", network)
    make_every_tensor_count(policy)
    torch.save(policy.serialize(), out / "policy_best.ckpt")
    (out / "config.pkl").write_bytes(pickle.dumps(config))
    write_episodes(out / "data")
    stats, _ = utils.get_norm_stats(sorted(map(str, (out / "data").glob("*.hdf5"))))
    (out / "dataset_stats.pkl").write_bytes(pickle.dumps(stats))

    images, state = observation(size["image_hw"], 14)
    seen = {"images": dict(zip(CAMERAS, images, strict=True)), "qpos": state}
    robot = mock.MagicMock()
    robot.reset.return_value = robot.step.return_value = types.SimpleNamespace(
        observation=seen, reward=0
    )
    sys.modules["aloha_scripts.real_env"].make_real_env = lambda **_: robot
    imitate_episodes.eval_bc(config, "policy_best.ckpt", num_rollouts=1)
    commanded = [call.args for call in robot.step.call_args_list]
    arms, base = (np.stack([each[i] for each in commanded]) for i in (0, 1))
    np.savez(out / "expected.npz", images=images, state=state, arms=arms, base=base)


def agilex(clone: Path, out: Path, size: dict[str, Any], *, base: bool) -> None:
    """``model_inference`` of cobot_magic's inference.py, one whole chunk."""
    act = clone / "aloha-devel" / "act"
    sys.path[:0] = [str(act)]
    chunk = size["chunk_size"]
    settings = {**size, "ckpt_dir": out, "temporal_agg": "", "pos_lookahead_step": chunk,
                "max_publish_step": chunk, "use_robot_base": "1" if base else ""}  # fmt: skip
    settings.pop("image_hw")
    sys.argv = ["inference.py"]
    for name, value in settings.items():
        sys.argv += [f"--{name}", str(value)]
    import inference
    import utils
    from detr.models import backbone

    backbone.is_main_process = lambda: False  # no download
    args = inference.get_arguments()
    config = inference.get_model_config(args)
    policy = inference.make_policy("ACT", config["policy_config"])
    make_every_tensor_count(policy)
    torch.save(policy.serialize(), out / "policy_best.ckpt")
    write_episodes(out / "data")
    stats = utils.get_norm_stats(str(out / "data"), 2, base)
    (out / "dataset_stats.pkl").write_bytes(pickle.dumps(stats))

    images, state = observation(size["image_hw"], 16 if base else 14)
    arms = [
        types.SimpleNamespace(position=x, velocity=x, effort=x) for x in (state[:7], state[7:14])
    ]
    twist = types.SimpleNamespace(
        linear=types.SimpleNamespace(x=state[-2]), angular=types.SimpleNamespace(z=state[-1])
    )
    odometry = types.SimpleNamespace(twist=types.SimpleNamespace(twist=twist))
    robot = mock.MagicMock()
    robot.get_frame.return_value = (*images, None, None, None, *arms, odometry)
    sent = robot.robot_base_publish if base else robot.puppet_arm_publish
    inference.rospy.is_shutdown = lambda: len(sent.call_args_list) >= chunk
    inference.rospy.Rate = mock.MagicMock()
    with mock.patch("builtins.input", return_value=""):
        inference.model_inference(args, config, robot)
    commanded = [np.concatenate(call.args) for call in robot.puppet_arm_publish.call_args_list]
    velocities = [call.args[0] for call in robot.robot_base_publish.call_args_list]
    np.savez(out / "expected.npz", images=images, state=state, arms=np.stack(commanded),
             base=np.stack(velocities) if base else np.zeros((chunk, 0)))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=("mobile_aloha", "agilex"))
    parser.add_argument("clone", type=Path)
    parser.add_argument("out", type=Path)
    for flag in ("--full", "--base", "--mended"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stand_in()
    torch.manual_seed(0)
    clone, out, size = args.clone.resolve(), args.out.resolve(), SIZES[args.full]
    os.chdir(out)
    if args.peer == "mobile_aloha":
        mobile_aloha(clone, out, size, mended=args.mended)
    else:
        agilex(clone, out, size, base=args.base)


if __name__ == "__main__":
    main()
