"""The toy model as a policy of ours, and the contracts of those that foreign servers compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract, PolicyInfo
from runtime.options.model_name import UpstreamModel
from runtime.options.upstream import UpstreamOptions
from runtime.upstream.load import load_upstream
from runtime.upstream.upstream_policy import UpstreamPolicy
from tests.upstream.foreign_model import CHUNK, toy

STATE_DIM = 14
SIZE = (24, 32)
TOY = {
    "cameras": {"top": {"key": "images/cam_high", "layout": "chw", "size": list(SIZE)}},
    "state": [{"key": "state"}],
    "nested": True,
    "state_dim": STATE_DIM,
    "action_dim": STATE_DIM,
    "chunk_size": CHUNK,
    "n_action_steps": CHUNK,
    "rate_hz": 50,
}
"""openpi's keys, as its ALOHA client has them."""
GROOT_TOY = {
    **TOY,
    "cameras": {"top": {"key": "video.front", "size": list(SIZE)}},
    "state": [{"key": "state.left", "stop": 7}, {"key": "state.right", "stop": 7}],
    "actions": [{"key": "action.left", "stop": 7}, {"key": "action.right", "stop": 7}],
    "nested": False,
}
DRIVE = {
    "state": [{"key": "state"}],
    "state_dim": 2,
    "action_dim": 2,
    "chunk_size": 50,
    "n_action_steps": 10,
    "rate_hz": 50,
    "state_names": ["x.vel", "lift"],
    "action_names": ["lift", "x.vel"],
}


class ToyModel:
    """The toy model in this process."""

    def __init__(self) -> None:
        self.contract = PolicyContract(
            "toy", (CameraContract("top", SIZE, SIZE),), STATE_DIM, STATE_DIM, CHUNK, CHUNK, 0.02
        )
        self.info = PolicyInfo("toy", engine="numpy", trained=False)

    def infer(self, obs: MetaObs) -> ActionChunk:
        return ActionChunk(toy(obs.images["top"], obs.state), obs.timestep, obs.t_capture_ns)

    def reset(self) -> None:
        pass

    def fork(self) -> ToyModel:
        return self

    def close(self) -> None:
        pass


def make() -> ToyModel:
    return ToyModel()


def contract_file(folder: Path, contract: dict, **changes: object) -> Path:
    path = folder / "contract.yaml"
    path.write_text(yaml.safe_dump({**contract, **changes}), encoding="utf-8")
    return path


def load(
    system: str,
    port: int,
    folder: Path,
    contract: dict,
    *,
    timeout_s: float = 5.0,
    api_key: str = "",
    **changes: object,
) -> UpstreamPolicy:
    path = contract_file(folder, contract, **changes)
    options = UpstreamOptions(str(path), timeout_s, api_key)
    return load_upstream(UpstreamModel(system, "127.0.0.1", port), options)


def observations(count: int) -> list[MetaObs]:
    generator = np.random.default_rng(7)
    return [
        MetaObs(
            {"top": generator.integers(0, 256, (*SIZE, 3), np.uint8)},
            generator.normal(size=STATE_DIM).astype(np.float32),
            raw_lang="pass the cube",
            timestep=number,
            t_capture_ns=number + 1,
        )
        for number in range(count)
    ]
