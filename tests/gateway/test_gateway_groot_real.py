"""GR00T's own client, unmodified, in an environment of its own.

``METRONOME_GROOT_PYTHON``: an interpreter with numpy, msgpack and pyzmq;
``METRONOME_GROOT_SOURCE``: a folder with the package ``gr00t`` of version N1.6.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from policies.types import MetaObs
from tests.gateway.groot_rig import gateway
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import STATE_DIM, ToyPolicy

PYTHON = os.environ.get("METRONOME_GROOT_PYTHON", "")
SOURCE = os.environ.get("METRONOME_GROOT_SOURCE", "")
OBSERVATIONS = 100
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (PYTHON and SOURCE), reason="METRONOME_GROOT_PYTHON or METRONOME_GROOT_SOURCE is unset"
    ),
]
PROGRAM = """
import sys
import numpy as np
from gr00t.data.types import ModalityConfig
from gr00t.policy.server_client import PolicyClient

port, path = int(sys.argv[1]), sys.argv[2]
data = np.load(path)
client = PolicyClient(host="127.0.0.1", port=port)
assert client.ping() is True
config = client.get_modality_config()
assert all(type(value) is ModalityConfig for value in config.values()), config
(video,), (state,) = config["video"].modality_keys, config["state"].modality_keys
(language,), (action,) = config["language"].modality_keys, config["action"].modality_keys
horizon = len(config["action"].delta_indices)
assert client.reset() == {}
actions = []
for picture, values in zip(data["pictures"], data["states"]):
    found, info = client.get_action(
        {
            "video": {video: picture[None, None]},
            "state": {state: values[None, None]},
            "language": {language: [["pick up the cube"]]},
        }
    )
    assert found[action].shape[:2] == (1, horizon) and info == {}
    actions.append(found[action][0])
try:
    client.get_action({"video": {}, "state": {}, "language": {}})
except RuntimeError as error:
    assert "video/top" in str(error), error
else:
    raise AssertionError("an observation without a picture was answered")
try:
    client.kill_server()
except RuntimeError as error:
    assert "'kill'" in str(error), error
assert client.ping() is True
np.savez(path, actions=np.stack(actions))
"""


def test_the_real_client_gets_the_actions_of_our_client(tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    pictures = generator.integers(0, 256, (OBSERVATIONS, 24, 32, 3), np.uint8)
    states = generator.normal(size=(OBSERVATIONS, STATE_DIM)).astype(np.float32)
    path = tmp_path / "data.npz"
    np.savez(path, pictures=pictures, states=states)
    with serving(ToyPolicy(), port=0) as server:
        address = f"{server.host}:{server.port}"
        with gateway(address) as made:
            done = subprocess.run(
                [PYTHON, "-c", PROGRAM, str(made.port), str(path)],
                env={"PYTHONPATH": SOURCE},
                capture_output=True,
                text=True,
                check=False,
                timeout=100,
            )
        assert done.returncode == 0, done.stderr
        with connect(server) as client:
            ours = [
                client.infer(MetaObs({"top": picture}, state)).actions
                for picture, state in zip(pictures, states, strict=True)
            ]
    with np.load(path) as data:
        theirs = data["actions"]
    equal = sum(a.tobytes() == b.tobytes() for a, b in zip(theirs, ours, strict=True))
    assert theirs.dtype == np.float32 and equal == OBSERVATIONS
