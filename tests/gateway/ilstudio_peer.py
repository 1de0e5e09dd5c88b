"""ILStudio's own client and server, from a copy of it, in its own Python.

This file is both sides: ``Peer`` is used here; ``python ilstudio_peer.py FOLDER FD`` is the process
that ``Peer`` starts. That process may have NumPy 1 and knows nothing of this repository, so arrays
cross as bytes. Packages that ILStudio imports for its simulations are replaced by empty ones where
they are missing; nothing of its client or server is changed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import types
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

FOLDER, PYTHON = "METRONOME_ILSTUDIO", "METRONOME_ILSTUDIO_PYTHON"
"""Environment variables: the copy of ILStudio, and a Python with numpy<2 and torch."""
UNUSED = ("torchvision", "tianshou", "tianshou.env", "PIL", "imageio", "cv2")
CHUNK, DIM = 100, 14
"""Of ILStudio's server's answers."""


def available() -> bool:
    """Whether the environment names a copy of ILStudio."""
    return FOLDER in os.environ and PYTHON in os.environ


class Peer:
    """A process with ILStudio's clients, by a name each."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            command = [os.environ[PYTHON], __file__, os.environ[FOLDER], str(fd)]
            self._process = subprocess.Popen(command, pass_fds=[fd], stdout=subprocess.DEVNULL)
        self._link = Connection(ours.detach())

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._link.close()

    def serve(self) -> int:
        """Start ILStudio's own server with a policy that answers zeros; returns its port."""
        return self._ask("serve")

    def connect(self, name: str, port: int, chunk_size: int = CHUNK) -> None:
        self._ask("connect", name, port, chunk_size)

    def chunk(self, name: str, t: int, state: Any, image: Any) -> np.ndarray:
        """The answer to one observation: (T, N, A); raises what the client raised."""
        return _array(self._ask("chunk", name, t, _packed(state), _packed(image)))

    def select_action(self, name: str, t: int, state: Any, image: Any) -> np.ndarray:
        """What ILStudio's evaluation does at tick ``t``; (N, A)."""
        return _array(self._ask("select", name, t, _packed(state), _packed(image)))

    def reset(self, name: str) -> None:
        self._ask("reset", name)

    def time(self, name: str, count: int, state: Any, image: Any) -> list[int]:
        """ns of ``count`` round trips."""
        return self._ask("time", name, count, _packed(state), _packed(image))

    def _ask(self, *request: Any) -> Any:
        self._link.send(request)
        ok, answer = self._link.recv()
        if not ok:
            raise RuntimeError(answer)
        return answer


def _packed(array: Any) -> tuple[bytes, str, tuple[int, ...]]:
    array = np.asarray(array)
    return array.tobytes(), array.dtype.str, array.shape


def _array(packed: tuple[bytes, str, tuple[int, ...]]) -> np.ndarray:
    data, dtype, shape = packed
    return np.frombuffer(data, dtype).reshape(shape).copy()


# The other process


class _Child:
    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}
        self._ticks = 0

    def serve(self) -> int:
        import torch
        from benchmark.base import MetaPolicy
        from deploy.remote.server import PolicyServer

        zeros = torch.zeros(1, CHUNK, DIM)
        model = types.SimpleNamespace(select_action=lambda obs: zeros)
        normalizer = types.SimpleNamespace(
            normalize_metaobs=lambda obs, space: obs, denormalize_metaact=lambda action: action
        )
        policy = MetaPolicy(model, CHUNK, normalizer, normalizer, "joint", "abs")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        server = PolicyServer(policy, "127.0.0.1", port)
        threading.Thread(target=server.start, daemon=True).start()
        return port

    def connect(self, name: str, port: int, chunk_size: int) -> None:
        from deploy.remote.client import PolicyClient

        deadline = time.monotonic() + 10
        while True:
            try:
                self._clients[name] = PolicyClient("127.0.0.1", port, chunk_size)
                return
            except ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def chunk(self, name: str, t: int, state: Any, image: Any) -> Any:
        obs = self._observation(state, image)
        obs.timestep = np.array([[t] for _ in obs.state])
        answer = self._clients[name]._send_meta_obs(obs)
        if not answer:
            raise RuntimeError("the answer is empty")
        return _packed([[row["action"] for row in step] for step in answer])

    def select(self, name: str, t: int, state: Any, image: Any) -> Any:
        action = self._clients[name].select_action(self._observation(state, image), t)
        assert {(row["ctrl_space"], row["ctrl_type"]) for row in action} == {("joint", "abs")}
        return _packed([row["action"] for row in action])

    def reset(self, name: str) -> None:
        self._clients[name].reset()

    def time(self, name: str, count: int, state: Any, image: Any) -> list[int]:
        obs, client, spans = self._observation(state, image), self._clients[name], []
        for _ in range(count):
            self._ticks += 1
            obs.timestep = np.array([[self._ticks] for _ in obs.state])
            began = time.perf_counter_ns()
            answer = client._send_meta_obs(obs)
            spans.append(time.perf_counter_ns() - began)
            assert len(answer) == CHUNK
        return spans

    def _observation(self, state: Any, image: Any) -> Any:
        from benchmark.base import MetaObs

        found = MetaObs(state=_array(state), image=_array(image))
        found.raw_lang = ["Transfer the cube."] * len(found.state)
        return found


def main(folder: str, fd: str) -> None:
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
    sys.path[:] = [folder, *(path for path in sys.path if path != here)]
    for name in UNUSED:
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].SubprocVectorEnv = sys.modules[name].transforms = None  # type: ignore[attr-defined]
    link, child = Connection(int(fd)), _Child()
    while True:
        try:
            what, *arguments = link.recv()
        except EOFError:
            return
        try:
            link.send((True, getattr(child, what)(*arguments)))
        except Exception as error:
            link.send((False, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main(*sys.argv[1:])
