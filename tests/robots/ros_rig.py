"""A ROS master and nodes for tests, each a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIST_PACKAGES = Path("/usr/lib/python3/dist-packages")
NEEDED = ("rospy", "rosmaster", "sensor_msgs", "std_msgs")
MISSING = [name for name in NEEDED if not (DIST_PACKAGES / name).is_dir()]
WHY_NOT = "needs ROS 1: apt-get install " + " ".join(
    f"python3-{name.replace('_', '-')}" for name in NEEDED
)
MASTER = (
    "import sys; sys.path.append({path!r}); import rosmaster; "
    "rosmaster.rosmaster_main(['--core', '-p', '{port}'])"
)
PATIENCE_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def master(folder: Path) -> Iterator[dict[str, str]]:
    """A master on a free port of loopback; the environment that leads to it."""
    port = free_port()
    environment = {
        **os.environ,
        "ROS_MASTER_URI": f"http://127.0.0.1:{port}",
        "ROS_IP": "127.0.0.1",
        "ROS_HOME": str(folder),
        "ROS_LOG_DIR": str(folder / "log"),
    }
    environment.pop("ROS_HOSTNAME", None)
    command = [sys.executable, "-c", MASTER.format(path=str(DIST_PACKAGES), port=port)]
    with stopped_afterwards(
        subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    ) as process:
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            assert process.poll() is None, "the ROS master has ended"
            assert time.monotonic() < deadline_s, "the ROS master does not answer"
            with (
                contextlib.suppress(OSError),
                xmlrpc.client.ServerProxy(environment["ROS_MASTER_URI"]) as server,
            ):
                server.getPid("/test")
                break
            time.sleep(0.01)
        yield environment


@contextlib.contextmanager
def stopped_afterwards(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


class AgilexNode:
    """The other side of the driver: ``agilex_node.py``, whose topics can be spoilt one by one."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process
        self.ask({})

    def ask(self, request: Mapping[str, str]) -> None:
        """Hand over a request and wait until it is in force."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"

    @contextlib.contextmanager
    def spoilt(self, topic: str, mode: str) -> Iterator[None]:
        self.ask({"topic": topic, "mode": mode})
        try:
            yield
        finally:
            self.ask({"topic": topic, "mode": "sound"})


@contextlib.contextmanager
def agilex_node() -> Iterator[AgilexNode]:
    """Publishes in Agilex's coordinates to the master of the environment."""
    with stopped_afterwards(
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("agilex_node.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    ) as process:
        yield AgilexNode(process)


@contextlib.contextmanager
def twin_node() -> Iterator[None]:
    """``robots.twin_ros_node`` on the master of the environment."""
    command = [sys.executable, "-m", "robots.twin_ros_node", "--stop_with_stdin"]
    with stopped_afterwards(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)):
        yield
