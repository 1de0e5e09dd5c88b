"""From LeRobot's observation to its actions: through our gateway, and from LeRobot's own server.

    METRONOME_LEROBOT_PYTHON=PYTHON python -m bench.gateways.lerobot

``PYTHON`` has lerobot 0.4.4 and grpcio. The client's own calls and classes, ``must_go``, one
480x640 picture up, a chunk of 100 down, policies that cost nothing, LeRobot's server with
``inference_latency`` 0; the two in turns, in blocks of one run.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from bench.gateways.measured import gateway_address, report
from bench.null_policy import NullPolicy
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT
from runtime.server.server_process import ServerProcess

MODEL = f"python:{NullPolicy.__module__}:one_camera"
PEER = Path(__file__).with_name("lerobot_peer.py")
BOUND = 1.2
"""Of the gateway's median ÷ LeRobot's."""


def lerobot_address(stack: ExitStack, python: str, folder: str) -> str:
    """The address of LeRobot's server. It writes its logs into ``folder``."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = subprocess.Popen(
        [python, "-P", PEER, "serve", str(port)], cwd=folder, stderr=subprocess.DEVNULL
    )
    stack.callback(server.wait)
    stack.callback(server.kill)
    return f"127.0.0.1:{port}"


def measure(python: str, blocks: int, block: int) -> dict[str, np.ndarray]:
    """Microseconds of each exchange, by way."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        server = stack.enter_context(ServerProcess(["-m", MODEL]))
        addresses = {
            "gateway": gateway_address(stack, "lerobot", server.address),
            "LeRobot": lerobot_address(stack, python, folder),
        }
        command = [python, "-P", PEER, "ask", str(blocks), str(block), *addresses.values()]
        asked = subprocess.run(command, check=True, cwd=folder, stdout=subprocess.PIPE, text=True)
        taken_us = json.loads(asked.stdout.splitlines()[-1])
    return {way: np.array(taken_us[address]) for way, address in addresses.items()}


def main() -> int:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--blocks", type=Number(int, COUNT), default=10)
    parser.add_argument("--block", type=Number(int, COUNT), default=20)
    flags = parser.parse_args()
    python = os.environ.get("METRONOME_LEROBOT_PYTHON")
    if not python:
        parser.error("METRONOME_LEROBOT_PYTHON is not set")
    load = os.getloadavg()[0]
    samples = measure(python, flags.blocks, flags.block)
    print(f"{flags.blocks} x {flags.block} exchanges each; load average before {load:.1f}")
    return int(not report(samples, BOUND))


if __name__ == "__main__":
    raise SystemExit(main())
