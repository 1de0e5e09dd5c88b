"""LeRobot's own client, unmodified, against the gateway.

``METRONOME_LEROBOT_PYTHON`` is a Python with lerobot 0.4.4 and grpcio, ``METRONOME_LEROBOT_SOURCE``
that release's source tree.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.types import ActionChunk, MetaObs
from tests.gateway.lerobot_gateway import gateway_of
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import CHUNK, CONTRACT, ToyPolicy

PYTHON = os.environ.get("METRONOME_LEROBOT_PYTHON", "")
SOURCE = os.environ.get("METRONOME_LEROBOT_SOURCE", "")
COUNT, MOTORS = 100, CONTRACT.state_dim
DRIVER = Path(__file__).with_name("lerobot_real_client.py")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (PYTHON and SOURCE),
        reason="needs METRONOME_LEROBOT_PYTHON and METRONOME_LEROBOT_SOURCE",
    ),
]


class BlindPolicy(ToyPolicy):
    """The toy policy without its camera: LeRobot's mock robot has none."""

    def __init__(self) -> None:
        super().__init__()
        self.contract = dataclasses.replace(CONTRACT, cameras=())

    def infer(self, obs: MetaObs) -> ActionChunk:
        black = {"top": np.zeros((24, 32, 3), np.uint8)}
        return super().infer(dataclasses.replace(obs, images=black))

    def fork(self) -> BlindPolicy:
        return BlindPolicy()


def run_client(folder: Path, port: int, **changes: Any) -> tuple[dict[str, Any], str]:
    """What the client saw and got, and its log."""
    job = folder / "job.json"
    values = {
        "source": SOURCE,
        "address": f"127.0.0.1:{port}",
        "seed": 1,
        "count": COUNT,
        "motors": MOTORS,
        "camera_hw": None,
        "policy_type": "toy",
        "actions_per_chunk": 50,
        "task": "",
        **changes,
    }
    job.write_text(json.dumps(values))
    done = subprocess.run(
        [PYTHON, str(DRIVER), str(job)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    return pickle.loads(job.with_suffix(".pickle").read_bytes()), log


@pytest.mark.parametrize("sees", [False, True], ids=["mock robot", "with a camera"])
def test_actions_are_those_of_our_own_client(tmp_path: Path, sees: bool) -> None:
    policy = ToyPolicy() if sees else BlindPolicy()
    with serving(policy) as server:
        with gateway_of(server, contract=policy.contract) as gateway:
            camera_hw = (24, 32) if sees else None
            result, log = run_client(tmp_path, gateway.port, camera_hw=camera_hw, task="stack")
        assert result["started"], log
        equal = 0
        with connect(server) as ours:
            for chunk in result["chunks"]:
                seen = chunk["seen"]
                state = np.array([seen[f"motor_{i + 1}.pos"] for i in range(MOTORS)], np.float32)
                images = {"top": seen["top"]} if sees else {}
                obs = MetaObs(images, state, raw_lang="stack", t_capture_ns=1)
                expected = ours.infer(obs).actions
                # The client drops an action of the step that it executed last.
                steps = np.array(chunk["timesteps"]) - chunk["timestep"]
                assert list(steps) in (list(range(CHUNK)), list(range(1, CHUNK)))
                got = chunk["actions"]
                assert got.dtype == np.float32
                equal += np.allclose(got, expected[steps], rtol=1e-6, atol=0)
    assert (equal, len(result["chunks"])) == (COUNT, COUNT)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"policy_type": "act"}, "policy_type: got 'act', expected 'toy'"),
        ({"motors": 6}, "observation.state: got 6 motors"),
    ],
    ids=["policy", "motors"],
)
def test_a_refusal_ends_the_clients_start(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    policy = BlindPolicy()
    with serving(policy) as server, gateway_of(server, contract=policy.contract) as gateway:
        result, log = run_client(tmp_path, gateway.port, **changes)
    assert result == {"started": False, "chunks": []}
    assert "FAILED_PRECONDITION" in log and reason in log
