"""ACT on a server in another process: the same bits as in process, over each transport."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from policies.act.config import ActConfig
from policies.checkpoint.load import load_policy
from policies.checkpoint.untrained import make_untrained
from policies.errors import ContractMismatch, ObservationError
from policies.types import CameraContract, MetaObs
from runtime.client import PolicyClient
from runtime.server.server_process import ServerProcess

CAMERAS = (
    CameraContract("top", source_hw=(60, 80), crop=(10, 12, 32, 64), model_hw=(32, 64)),
    CameraContract("wrist", source_hw=(64, 128), model_hw=(32, 64), resize="area"),
)
SIZES = ActConfig(
    state_dim=14,
    action_dim=14,
    chunk_size=20,
    n_cameras=2,
    image_hw=(32, 64),
    width=32,
    n_heads=4,
    feedforward=64,
    n_encoder_layers=2,
    n_style_layers=1,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "act"
    make_untrained(folder, config=SIZES, cameras=CAMERAS)
    return folder


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    with ServerProcess(["-m", str(checkpoint)]) as server:
        yield server.address


def observation(seed: int, *, model_size: bool = False) -> MetaObs:
    rng = np.random.default_rng(seed)
    return MetaObs(
        images={
            c.name: rng.integers(
                0, 256, (*(c.model_hw if model_size else c.source_hw), 3), np.uint8
            )
            for c in CAMERAS
        },
        state=rng.normal(size=14).astype(np.float32),
        timestep=seed,
    )


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_served_is_bit_equal_to_in_process(checkpoint: Path, address: str, transport: str) -> None:
    local = load_policy(str(checkpoint))
    with PolicyClient(address, transport=transport, deterministic=True) as client:
        assert client.contract == local.contract
        for seed in range(10):
            ours, theirs = local.infer(observation(seed)), client.infer(observation(seed))
            assert theirs.actions.tobytes() == ours.actions.tobytes()
            assert theirs.obs_timestep == seed


def test_images_of_the_models_size_are_accepted(checkpoint: Path, address: str) -> None:
    local = load_policy(str(checkpoint))
    small = observation(3, model_size=True)
    with PolicyClient(address) as client:
        np.testing.assert_array_equal(client.infer(small).actions, local.infer(small).actions)


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_nan_state_is_an_error_and_the_session_continues(address: str, transport: str) -> None:
    with PolicyClient(address, transport=transport) as client:
        bad = observation(0)
        bad.state[[2, 5]] = np.nan
        with pytest.raises(ObservationError, match=r"state: got .*nan.* in dimensions \[2, 5\]"):
            client.infer(bad)
        client.infer(observation(0))


def test_wrong_camera_is_refused_by_name(address: str) -> None:
    with PolicyClient(address) as client:
        obs = observation(0)
        obs.images = {"front": obs.images["top"], "wrist": obs.images["wrist"]}
        with pytest.raises(ContractMismatch, match=r"cameras: got \['front', 'wrist'\]"):
            client.infer(obs)
