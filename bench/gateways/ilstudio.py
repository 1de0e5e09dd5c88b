"""What ILStudio's client waits for an answer: through the gateway, and from ILStudio's own server.

    METRONOME_ILSTUDIO=FOLDER METRONOME_ILSTUDIO_PYTHON=PYTHON python -m bench.gateways.ilstudio

Its unmodified client, one 480×640 picture, policies that answer zeros, chunks of 100; the two in
turns, in blocks of one run. The gateway and its server are processes of their own, as users have
them; ILStudio's server is a thread of another process than the client's.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np

from bench.gateways.measured import gateway_address, report
from bench.null_policy import NullPolicy
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT
from runtime.server.server_process import ServerProcess
from tests.gateway.ilstudio_peer import FOLDER, PYTHON, Peer, available
from transport.address import parse_address

MODEL = f"python:{NullPolicy.__module__}:one_camera"
WARMUP = 5
BOUND = 0.05
"""Of the gateway's median ÷ ILStudio's."""


def measure(blocks: int, block: int) -> dict[str, Any]:
    """Samples in µs by name: of the gateway and of ILStudio."""
    state = np.ones((1, 14), np.float32)
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 3, 480, 640), dtype=np.uint8)
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(["-m", MODEL]))
        theirs = stack.enter_context(Peer())
        client = stack.enter_context(Peer())
        _, port = parse_address(gateway_address(stack, "ilstudio", server.address))
        client.connect("gateway", port)
        client.connect("ILStudio", theirs.serve())
        samples: dict[str, list[int]] = {"gateway": [], "ILStudio": []}
        for name in samples:
            client.time(name, WARMUP, state, image)
        for _ in range(blocks):
            for name, kept in samples.items():
                kept.extend(client.time(name, block, state, image))
    return {name: np.array(kept) / 1e3 for name, kept in samples.items()}


def main() -> int:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--blocks", type=Number(int, COUNT), default=20)
    parser.add_argument("--block", type=Number(int, COUNT), default=25)
    flags = parser.parse_args()
    if not available():
        parser.error(f"{FOLDER} and {PYTHON} are not set")
    samples = measure(flags.blocks, flags.block)
    return int(not report(samples, BOUND))


if __name__ == "__main__":
    raise SystemExit(main())
