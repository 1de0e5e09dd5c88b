"""openpi's own client, unmodified, gets the actions that ours gets.

Needs an interpreter with ``openpi-client`` 0.1.2: ``METRONOME_OPENPI_PYTHON=.../bin/python``.
"""

from __future__ import annotations

import io
import os
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.types import MetaObs
from runtime.options.api_keys import ApiKeys
from tests.gateway.openpi_serving import StatelessPolicy, gateway_to
from tests.runtime.serving import connect, serving

pytestmark = pytest.mark.long

PYTHON = os.environ.get("METRONOME_OPENPI_PYTHON", "")
COUNT = 100
PROMPT = "pick up the cube"
KEY = "0123456789abcdef"
CLIENT = """
    import io, sys
    import numpy as np
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    sent = np.load(io.BytesIO(sys.stdin.buffer.read()))
    port, prompt, key, layout = sys.argv[1:]
    client = WebsocketClientPolicy("127.0.0.1", int(port), api_key=key)
    assert client.get_server_metadata()["server"] == "metronome"
    actions = []
    for number, (image, state) in enumerate(zip(sent["images"], sent["states"])):
        if layout == "aloha":
            observation = {"state": state, "images": {"top": image.transpose(2, 0, 1)}}
        else:
            observation = {"observation/state": state, "observation/image": image}
        observation["prompt"] = prompt
        if number == 3:
            try:
                client.infer({**observation, "observation/image": image[:5], "images": {}})
            except RuntimeError as error:
                assert "images.top: got " in str(error), error
            else:
                raise AssertionError("no error")
        answer = client.infer(observation)
        assert answer["server_timing"]["infer_ms"] > 0
        actions.append(answer["actions"])
    np.save(sys.stdout.buffer, np.stack(actions))
"""


@pytest.mark.skipif(not Path(PYTHON).is_file(), reason="METRONOME_OPENPI_PYTHON: no interpreter")
@pytest.mark.parametrize("layout", ["aloha", "libero"])
def test_openpis_client_gets_the_actions_that_ours_gets(layout: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    images = generator.integers(0, 256, (COUNT, 24, 32, 3), np.uint8)
    states = generator.normal(size=(COUNT, 14)).astype(np.float32)
    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_text(KEY, encoding="utf-8")
    with serving(StatelessPolicy()) as server:
        with connect(server) as ours:
            expected = [
                ours.infer(MetaObs({"top": image}, state, raw_lang=PROMPT, timestep=i)).actions
                for i, (image, state) in enumerate(zip(images, states, strict=True))
            ]
        with gateway_to(server, api_keys=ApiKeys(path)) as gateway:
            theirs = ask_theirs(gateway.port, layout, images=images, states=states)
    equal = [np.array_equal(a, b) for a, b in zip(theirs, expected, strict=True)]
    assert sum(equal) == COUNT


def ask_theirs(port: int, layout: str, **arrays: Any) -> Any:
    """The actions that openpi's client gets, (COUNT, T, A)."""
    data = io.BytesIO()
    np.savez(data, **arrays)
    done = subprocess.run(
        [PYTHON, "-c", textwrap.dedent(CLIENT), str(port), PROMPT, KEY, layout],
        input=data.getvalue(),
        capture_output=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr.decode()
    return np.load(io.BytesIO(done.stdout))
