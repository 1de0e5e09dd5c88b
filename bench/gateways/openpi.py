"""Round trip of openpi's own client: through our gateway, and to openpi's own server.

    METRONOME_OPENPI_PYTHON=.../bin/python METRONOME_OPENPI_SOURCE=.../openpi \\
        python -m bench.gateways.openpi

The first is the interpreter of an environment with ``openpi-client`` 0.1.2, the second a checkout
of openpi, whose server file is run as it is. One 480x640 picture up, a chunk of 100 down, a policy
that answers zeros; the ways take turns in blocks of one run.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from bench.gateways.measured import gateway_address, report
from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract, PolicyInfo
from runtime.server.server_process import ServerProcess

BLOCKS, BLOCK = 20, 50
SIZE, STATE, CHUNK = (480, 640), 14, 100
PEER = Path(__file__).with_name("openpi_peer.py")
START_WITHIN_S = 30.0
MODEL = "python:bench.gateways.openpi:ZeroPolicy"
BOUND = 1.2
"""Of the gateway's median ÷ openpi's."""


class ZeroPolicy:
    """Answers zeros."""

    def __init__(self) -> None:
        self.contract = PolicyContract(
            policy_type="zeros",
            cameras=(CameraContract("image", SIZE, SIZE),),
            state_dim=STATE,
            action_dim=STATE,
            chunk_size=CHUNK,
            n_action_steps=CHUNK,
            dt_s=0.02,
        )
        self.info = PolicyInfo("zeros", engine="numpy", trained=False)

    def infer(self, obs: MetaObs) -> ActionChunk:
        return ActionChunk(np.zeros((CHUNK, STATE), np.float32), obs.timestep, obs.t_capture_ns)

    def reset(self) -> None:
        pass

    def fork(self) -> ZeroPolicy:
        return self

    def close(self) -> None:
        pass


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for(port: int) -> None:
    deadline_s = time.monotonic() + START_WITHIN_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)


def measure(python: str, source: str) -> dict[str, np.ndarray]:
    """Microseconds of each round trip, by way."""
    port = free_port()
    with ExitStack() as stack:
        server = stack.enter_context(
            ServerProcess(["-m", "python:bench.gateways.openpi:ZeroPolicy"])
        )
        ours = gateway_address(stack, "openpi", server.address)
        theirs = subprocess.Popen([python, PEER, "serve", source, str(port)])
        try:
            wait_for(port)
            urls = {"our gateway": f"ws://{ours}", "openpi's server": f"ws://127.0.0.1:{port}"}
            command = [python, PEER, "ask", str(BLOCKS), str(BLOCK), *urls.values()]
            asked = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            taken_us = json.loads(asked.stdout)
            return {way: np.array(taken_us[url]) for way, url in urls.items()}
        finally:
            theirs.kill()
            theirs.wait()


def main() -> int:
    before = os.getloadavg()[0]
    taken_us = measure(os.environ["METRONOME_OPENPI_PYTHON"], os.environ["METRONOME_OPENPI_SOURCE"])
    print(f"{BLOCKS} x {BLOCK} round trips each; load average before {before:.1f}")
    return int(not report(taken_us, BOUND))


if __name__ == "__main__":
    raise SystemExit(main())
