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
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT
from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract, PolicyInfo
from runtime.server.server_process import ServerProcess

SIZE, STATE, CHUNK = (480, 640), 14, 100
PEER = Path(__file__).with_name("openpi_peer.py")
PEERS = ("METRONOME_OPENPI_PYTHON", "METRONOME_OPENPI_SOURCE")
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


def measure(python: str, source: str, blocks: int, block: int) -> dict[str, np.ndarray]:
    """Microseconds of each round trip, by way."""
    port = free_port()
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(["-m", MODEL]))
        ours = gateway_address(stack, "openpi", server.address)
        theirs = subprocess.Popen([python, PEER, "serve", source, str(port)])
        try:
            wait_for(port)
            urls = {"our gateway": f"ws://{ours}", "openpi's server": f"ws://127.0.0.1:{port}"}
            command = [python, PEER, "ask", str(blocks), str(block), *urls.values()]
            asked = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            taken_us = json.loads(asked.stdout)
            return {way: np.array(taken_us[url]) for way, url in urls.items()}
        finally:
            theirs.kill()
            theirs.wait()


def main() -> int:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--blocks", type=Number(int, COUNT), default=20)
    parser.add_argument("--block", type=Number(int, COUNT), default=50)
    flags = parser.parse_args()
    python, source = (os.environ.get(name) for name in PEERS)
    if not (python and source):
        parser.error(f"{' and '.join(PEERS)} are not set")
    before = os.getloadavg()[0]
    taken_us = measure(python, source, flags.blocks, flags.block)
    print(f"{flags.blocks} x {flags.block} round trips each; load average before {before:.1f}")
    return int(not report(taken_us, BOUND))


if __name__ == "__main__":
    raise SystemExit(main())
