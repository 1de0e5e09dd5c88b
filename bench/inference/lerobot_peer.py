"""LeRobot's ACT: its own network file, unmodified, run as its policy runs it.

What surrounds that file (configuration parsing, the hub, every other policy) is not needed for a
forward pass and would install gigabytes, so names that the file imports from there are stood in
for. The pictures are prepared as its preprocessor does: to float, to [0, 1], channels first, then
the mean and the deviation.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.inference import torchvision_standin
from bench.inference.contestants import Absent, Run, Setting
from policies.act.config import ActConfig
from policies.act.weights import ActWeights
from policies.checkpoint.weight_names import lerobot_keys

_STATE, _IMAGES, _ENVIRONMENT = (
    f"observation.{name}" for name in ("state", "images", "environment_state")
)


def lerobot(weights: ActWeights, setting: Setting) -> Run:
    """Raises:
    Absent: LeRobot is not installed.
    """
    torch.set_num_threads(setting.threads)
    model = _network(weights).to(setting.device)
    mean, std = (
        torch.tensor(values).reshape(-1, 1, 3, 1, 1).to(setting.device)
        for values in (weights.image_mean, weights.image_std)
    )
    scale, shift = (
        torch.tensor(values, dtype=torch.float32).to(setting.device)
        for values in (weights.action_normalizer.scale, weights.action_normalizer.shift)
    )

    def run(images: NDArray[np.uint8], state: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            pictures = [
                (torch.from_numpy(image).permute(2, 0, 1).float() / 255)[None].to(setting.device)
                for image in images
            ]
            pictures = [(x - m) / s for x, m, s in zip(pictures, mean, std, strict=True)]
            batch = {_IMAGES: pictures, _STATE: torch.from_numpy(state)[None].to(setting.device)}
            actions, _ = model(batch)
            physical: NDArray[np.float32] = (actions[0] * scale + shift).cpu().numpy()
            return physical

    return run


def _network(weights: ActWeights) -> nn.Module:
    module = _import_network_file()
    model: nn.Module = module.ACT(_configuration(weights.config))
    prefix = "model."
    tensors: dict[str, Tensor] = {
        foreign.removeprefix(prefix): weights.tensors[internal]
        for foreign, internal in lerobot_keys(weights.config).items()
        if not internal.startswith("style.")
    }
    model.load_state_dict(tensors, strict=True)
    return model.eval().requires_grad_(False)


def _configuration(config: ActConfig) -> SimpleNamespace:
    """What its network reads of its configuration."""
    return SimpleNamespace(
        use_vae=False,
        chunk_size=config.chunk_size,
        dim_model=config.width,
        n_heads=config.n_heads,
        dim_feedforward=config.feedforward,
        feedforward_activation=config.activation,
        n_encoder_layers=config.n_encoder_layers,
        n_decoder_layers=config.n_decoder_layers,
        latent_dim=config.latent_dim,
        dropout=config.dropout,
        pre_norm=False,
        vision_backbone=config.backbone,
        pretrained_backbone_weights=None,
        replace_final_stride_with_dilation=False,
        image_features=[f"{_IMAGES}.{i}" for i in range(config.n_cameras)],
        robot_state_feature=SimpleNamespace(shape=(config.state_dim,)),
        env_state_feature=None,
        action_feature=SimpleNamespace(shape=(config.action_dim,)),
    )


def _import_network_file() -> ModuleType:
    """``lerobot.policies.act.modeling_act``, with stand-ins for what it imports of LeRobot."""
    found = find_spec("lerobot")
    if found is None or not found.submodule_search_locations:
        raise Absent("not installed: no package lerobot")
    [root] = found.submodule_search_locations
    for package in ("policies", "policies.act", "utils"):
        _package(f"lerobot.{package}", f"{root}/{package.replace('.', '/')}")
    _stand_in("lerobot.policies.act.configuration_act", ACTConfig=SimpleNamespace)
    _stand_in("lerobot.policies.pretrained", PreTrainedPolicy=nn.Module)
    _stand_in(
        "lerobot.utils.constants",
        ACTION="action",
        OBS_ENV_STATE=_ENVIRONMENT,
        OBS_IMAGES=_IMAGES,
        OBS_STATE=_STATE,
    )
    if find_spec("torchvision") is None:
        torchvision_standin.install()
    try:
        return import_module("lerobot.policies.act.modeling_act")
    except ImportError as error:
        raise Absent(f"LeRobot's network cannot be imported: {error}") from error


def _package(name: str, path: str) -> None:
    """The package without what its ``__init__`` would import."""
    module = ModuleType(name)
    module.__path__ = [path]
    sys.modules[name] = module


def _stand_in(name: str, **names: Any) -> None:
    module = ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module
