"""What the machine does while time is kept: the whole pipeline four times over, and a hog.

The server infers, four clients render, send and wait, all on every core; one more process copies
memory as fast as it can. ``python -m bench.pacing.load client HOST:PORT`` and ``... hog`` are the
parts; they end with their parent.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from bench.null_policy import NullPolicy
from envs.factory import load_env_config, make_world
from runtime.client import PolicyClient
from runtime.options.defaults import DEFAULT_CHECKPOINT
from runtime.server.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 4
HOG_BYTES = 256 * 2**20
"""Far more than any cache holds."""
_PR_SET_PDEATHSIG = 1

LOADS = ("idle", "loaded")


@contextmanager
def load(name: str) -> Iterator[None]:
    """``idle``: nothing. ``loaded``: everything, and every part of it has begun to work."""
    if name == "idle":
        yield
        return
    model = DEFAULT_CHECKPOINT if Path(DEFAULT_CHECKPOINT).exists() else _NULL
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(["-m", model]))
        # One after the other: a handshake has two seconds, and all at once would starve it.
        running = []
        for part in [["client", server.address]] * CLIENTS + [["hog"]]:
            process = stack.enter_context(_running(part))
            assert process.stdout is not None
            if process.stdout.readline() != b"working\n":
                raise RuntimeError(f"a part of the load did not start: {process.args}")
            running.append(process)
        yield
        ended = [process.args for process in running if process.poll() is not None]
        if ended:
            raise RuntimeError(f"a part of the load ended early: {ended}")


_NULL = f"python:{NullPolicy.__module__}:one_camera"


@contextmanager
def _running(part: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "bench.pacing.load", *part]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _client(address: str) -> None:
    """Render, ask, wait, step, for ever."""
    with PolicyClient(address) as policy:
        contract = policy.contract
        world = make_world(
            load_env_config("aloha"), cameras=contract.cameras, rendering=contract.rendering
        )
        world.reset(0)
        timestep = 0
        while True:
            obs = world.observe(policy.loan_images())
            obs.timestep = timestep
            chunk = policy.infer(obs)
            world.step(chunk.actions[0])
            if timestep == 0:
                print("working", flush=True)
            timestep += 1


def _hog() -> None:
    """Copy memory that no cache holds, for ever."""
    source = np.ones(HOG_BYTES // 8)
    target = np.zeros_like(source)
    print("working", flush=True)
    while True:
        np.copyto(target, source)


if __name__ == "__main__":
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _client(*sys.argv[2:]) if sys.argv[1] == "client" else _hog()
