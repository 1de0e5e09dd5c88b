"""A robot in a process of its own: writes its sensors at a rate, and says when a command arrived.

``python -m bench.end_to_end.robot LINK MEMORY LAYOUT``, started by ``RobotProcess``. Both moments
that an end-to-end time lies between are of this process' clock, and nobody else's.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.process import ROOT
from policies.types import MetaObs, PolicyContract
from runtime.control.clock import MonotonicClock

HZ = 50.0
_FRAME = struct.Struct("=qq")
_ARRIVED = struct.Struct("=q")
Shapes = Mapping[str, tuple[tuple[int, ...], str]]


def shapes(contract: PolicyContract) -> Shapes:
    """The sensors that a policy looks at: shape and dtype by name."""
    cameras = {camera.name: ((*camera.source_hw, 3), "uint8") for camera in contract.cameras}
    return {**cameras, "": ((contract.state_dim,), "float32")}


def _views(memory: Any, layout: Shapes) -> dict[str, NDArray[Any]]:
    views, offset = {}, 0
    for name, (shape, dtype) in layout.items():
        view: NDArray[Any] = np.ndarray(shape, dtype, memory, offset)
        views[name], offset = view, offset + -(-view.nbytes // 64) * 64
    return views


def _nbytes(layout: Shapes) -> int:
    return sum(
        -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64
        for shape, dtype in layout.values()
    )


class RobotProcess:
    """The robot as its driver sees it; the next frame is written once the command is there.

    Args:
        contract: Of the policy that drives it.
    """

    def __init__(self, contract: PolicyContract) -> None:
        layout = shapes(contract)
        self._cameras = contract.camera_names
        self._fd = os.memfd_create("sensors", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, _nbytes(layout))
        self._views = _views(mmap.mmap(self._fd, 0), layout)
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fds = (theirs.fileno(), self._fd)
            command = [sys.executable, "-m", "bench.end_to_end.robot", *map(str, fds)]
            self._process = subprocess.Popen([*command, json.dumps(layout)], cwd=ROOT, pass_fds=fds)

    def observe(self) -> tuple[MetaObs, int]:
        """The next frame, waited for, and when the robot began to write it."""
        number, began_ns = _FRAME.unpack(self._link.recv(_FRAME.size))
        obs = MetaObs(
            images={name: self._views[name] for name in self._cameras},
            state=self._views[""],
            timestep=number,
            t_capture_ns=began_ns,
        )
        return obs, began_ns

    def command(self, action: NDArray[np.float32]) -> int:
        """Send a command; when it had arrived."""
        self._link.send(action.tobytes())
        (arrived_ns,) = _ARRIVED.unpack(self._link.recv(_ARRIVED.size))
        return int(arrived_ns)

    def close(self) -> None:
        self._link.close()
        self._process.wait()
        os.close(self._fd)


def main(link_fd: str, memory_fd: str, layout: str) -> None:
    link = socket.socket(fileno=int(link_fd))
    sensors = _views(mmap.mmap(int(memory_fd), 0), json.loads(layout))
    random = np.random.default_rng(0)
    seen = [
        {name: (random.random(view.shape) * 255).astype(view.dtype) for name, view in pair}
        for pair in [sensors.items()] * 2
    ]
    for sensed in seen:
        sensed[""] /= 255
    clock, period_ns = MonotonicClock(), round(1e9 / HZ)
    number, due_ns = 0, time.monotonic_ns()
    while True:
        due_ns = max(due_ns + period_ns, time.monotonic_ns())
        clock.wait_until_ns(due_ns)
        began_ns = time.monotonic_ns()
        for name, view in sensors.items():
            np.copyto(view, seen[number % 2][name])
        try:
            link.send(_FRAME.pack(number, began_ns))
            if not link.recv(1 << 16):
                return
            arrived_ns = time.monotonic_ns()
            link.send(_ARRIVED.pack(arrived_ns))
        except ConnectionError:
            return
        number += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
