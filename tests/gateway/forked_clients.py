"""Foreign clients that can be killed: ``python forked_clients.py KIND`` forks one for each line.

This file imports nothing of this project by itself, so that it also runs in the Python of a foreign
client. A line of standard input is ``PORT FILE``: the client asks on that port, without end, and
writes what happens to that file. Its process id is printed.
"""

# ruff: noqa: T201  a command line
from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

DIM = 14
PR_SET_PDEATHSIG = 1
RETRY_S = 0.05
NO_ACTIONS_S = 1.0
"""How long LeRobot's client waits for actions before it observes again."""
UNUSED = ("torchvision", "tianshou", "tianshou.env", "PIL", "imageio", "cv2")
"""What ILStudio imports for its simulations."""


def ilstudio_stand_in() -> Callable[[int], None]:
    from tests.gateway.ilstudio_messages import RawClient, meta_obs

    def drive(port: int) -> None:
        client = RawClient(port)
        ask_forever(lambda t: client.actions(meta_obs(t=t)))

    return drive


def ilstudio() -> Callable[[int], None]:
    import numpy as np

    sys.path.insert(0, os.environ["METRONOME_ILSTUDIO"])
    for name in UNUSED:
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].SubprocVectorEnv = sys.modules[name].transforms = None  # type: ignore[attr-defined]
    from benchmark.base import MetaObs
    from deploy.remote.client import PolicyClient

    def drive(port: int) -> None:
        client = PolicyClient("127.0.0.1", port, 1)  # asks at every tick
        image = np.full((1, 1, 3, 24, 32), 100, np.uint8)
        obs = MetaObs(state=np.zeros((1, DIM), np.float32), image=image)
        obs.raw_lang = ["Transfer the cube."]
        ask_forever(lambda t: client.select_action(obs, t))

    return drive


def ask_forever(ask: Callable[[int], object]) -> None:
    t = 0
    while True:
        print("asking", t, flush=True)
        try:
            ask(t)
        except Exception as error:
            print(f"raised {type(error).__name__}: {error}", flush=True)
            time.sleep(RETRY_S)
        else:
            print("acted", t, flush=True)
        t += 1


def lerobot_stand_in() -> Callable[[int], None]:
    from tests.gateway.lerobot_client import LerobotClient
    from tests.gateway.lerobot_pickles import MOTORS, TimedObservation, dumps, features

    seen = {**dict.fromkeys(MOTORS, 0.5), "task": ""}

    def drive(port: int) -> None:
        client = LerobotClient(port)
        try:
            client.start(lerobot_features=features(cameras=()))
        except Exception as error:
            print(f"started False: {error}", flush=True)
            return
        print("started True", flush=True)

        def ask(t: int) -> None:
            client.send(dumps(TimedObservation(1.0, t, seen)))
            assert client.act(), "it got no actions"

        ask_forever(ask)

    return drive


def lerobot() -> Callable[[int], None]:
    sys.path.insert(0, os.environ["METRONOME_LEROBOT_SOURCE"])
    from lerobot.async_inference.configs import RobotClientConfig
    from lerobot.async_inference.robot_client import RobotClient

    from tests.mocks.mock_robot import MockRobotConfig

    def drive(port: int) -> None:
        client = RobotClient(
            RobotClientConfig(
                server_address=f"127.0.0.1:{port}",
                robot=MockRobotConfig(n_motors=DIM),
                policy_type="toy",
                pretrained_name_or_path="user/model",
                actions_per_chunk=50,
                chunk_size_threshold=0.0,
            )
        )
        started = client.start()
        print("started", started, flush=True)
        if started:
            drive_robot(client)

    return drive


def drive_robot(client: Any) -> None:
    """By its own loop's steps: observe when the queue is empty, else act."""
    threading.Thread(target=client.receive_actions, daemon=True).start()
    client.start_barrier.wait()
    t = 0
    while True:
        print("asking", t, flush=True)
        client.control_loop_observation("")
        until_s = time.monotonic() + NO_ACTIONS_S
        while not client.actions_available() and time.monotonic() < until_s:
            time.sleep(0.001)
        print("acted" if client.actions_available() else "waited in vain", t, flush=True)
        while client.actions_available():
            client.control_loop_action()
        t += 1


def main(kind: str) -> None:
    makes = (ilstudio_stand_in, ilstudio, lerobot_stand_in, lerobot)
    drive = {make.__name__: make for make in makes}[kind]()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        port, path = line.split()
        pid = os.fork()
        if not pid:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            drive(int(port))
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
