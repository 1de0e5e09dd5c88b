"""Peers that do not keep to anything, at a server that has a robot to serve."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from policies.types import MetaObs
from runtime.client import PolicyClient
from runtime.errors import ServerLost
from runtime.protocol import messages
from runtime.tools.ctl import dial
from tests.faults.crowd_policy import HW, STATE_DIM, expected
from tests.faults.rig import Program, Server
from tests.faults.watch import Holdings
from transport.dialer import Dialer
from transport.handshake_messages import NO_EPOCH, Hello, Opcode

GREETING = b"\xff" + struct.pack(">Q", 1) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
"""Of ZMTP 3.0, RFC 23."""
READY = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
SOAK = bool(os.environ.get("METRONOME_SOAK"))
LATE_S = 1.0
MOST_BYTES = 64 * 2**20

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("make", module="tests.faults.crowd_policy") as server:
        yield server


def observation(index: int, **changes: object) -> MetaObs:
    picture = {"top": np.full((*HW, 3), 7, np.uint8)}
    state = np.full(STATE_DIM, index, np.float32)
    given = {"timestep": index, "t_capture_ns": time.monotonic_ns(), **changes}
    return MetaObs(picture, state, **given)


class Robot:
    """Asks at 50 Hz meanwhile, and checks."""

    def __init__(self, server: Server, transport: str) -> None:
        self._client = PolicyClient(server.address, transport=transport, kind="robot")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.latency_s: list[float] = []
        self.trouble: list[object] = []

    def _run(self) -> None:
        index = 0
        while not self._over.wait(0.02):
            began_s = time.monotonic()
            obs = observation(index)
            try:
                chunk = self._client.infer(obs, timeout_s=30)
            except Exception as error:
                self.trouble.append(error)
                return
            self.latency_s.append(time.monotonic() - began_s)
            if not np.array_equal(chunk.actions, expected(obs)):
                self.trouble.append(f"a wrong answer to {index}")
            index += 1

    def __enter__(self) -> Robot:
        self._thread.start()
        self.check(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._client.close()

    def check(self, requests: int) -> None:
        """It has been served, as if nothing was."""
        deadline_s = time.monotonic() + 30
        while len(self.latency_s) < requests and not self.trouble:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert not self.trouble
        assert max(self.latency_s) < LATE_S


@pytest.fixture(params=["shm", "zmq"] if SOAK else ["zmq"])  # the latter shares their socket
def robot(server: Server, request: pytest.FixtureRequest) -> Iterator[Robot]:
    with Robot(server, request.param) as robot:
        yield robot


def dialled(server: Server, *pieces: bytes) -> socket.socket:
    """A connection that has sent so much of something, or was hung up on, as it should be."""
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    with contextlib.suppress(OSError):
        for piece in pieces:
            raw.sendall(piece)
            time.sleep(0.001)
    return raw


def long_frame(size: int) -> bytes:
    """The head of a ZMTP frame that announces ``size`` bytes."""
    return b"\x02" + struct.pack(">Q", size)


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (b"\xff",),
        (GREETING[:30],),
        (GREETING,),
        (GREETING, READY[:9]),
        (GREETING, READY),
        (GREETING, READY, b"\x00"),
        (GREETING, READY, b"\x00\xc8" + b"x" * 99),
        (GREETING, READY, long_frame(2**40)),
        (GREETING, READY, long_frame(2**63)),
        (GREETING, READY, long_frame(32 * 2**20), b"x" * 2**16),
        (b"GET / HTTP/1.1\r\n\r\n",),
        (bytes(5000),),
    ],
    ids=lambda pieces: f"{len(pieces)} pieces, {sum(map(len, pieces))} bytes",
)
def test_half_of_something_held_open(server: Server, robot: Robot, pieces) -> None:
    before = Holdings.of(server.pid)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(dialled(server, *pieces))
        robot.check(20)
        assert Holdings.of(server.pid).rss_bytes - before.rss_bytes < MOST_BYTES
    robot.check(30)


def test_a_flood_of_connections(server: Server, robot: Robot) -> None:
    before = Holdings.of(server.pid)
    with contextlib.ExitStack() as stack:
        for number in range(300):
            stack.enter_context(dialled(server, *((GREETING, READY)[: number % 3])))
        robot.check(50)
    deadline_s = time.monotonic() + 20
    while Holdings.of(server.pid).descriptors > before.descriptors:
        assert time.monotonic() < deadline_s, (before, Holdings.of(server.pid))
        time.sleep(0.1)
    robot.check(100)


def test_a_flood_of_greetings_that_nobody_follows_up(server: Server, robot: Robot) -> None:
    """Each asks for a session, as a client would, and leaves in the middle."""
    with contextlib.ExitStack() as stack:
        for number in range(30):
            dialer = stack.enter_context(Dialer("127.0.0.1", server.port, timeout_s=10))
            schema = messages.observation_schema(observation(0))
            hello = Hello(f"flood {number}", schema, ("shm", "zmq"), {"kind": "sim"})
            link = dialer._take_socket()
            dialer._client_socket = link
            link.send_control(Opcode.HELLO, NO_EPOCH, hello.to_body())
        robot.check(50)
    with PolicyClient(server.address) as newcomer:
        newcomer.infer(observation(1), timeout_s=15)
    robot.check(80)


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_a_client_whose_clock_jumps_gets_its_own_stamps_back(server: Server, transport) -> None:
    hour_ns = 3600 * 10**9
    stamps = [0, 1, hour_ns, 5, 2**62, time.monotonic_ns() - hour_ns, time.monotonic_ns() + hour_ns]
    with PolicyClient(server.address, transport=transport) as client:
        for index, stamp in enumerate(stamps):
            obs = observation(index, t_capture_ns=stamp, timestep=(7 * index) % 5)
            chunk = client.infer(obs)
            assert chunk.t_capture_ns == stamp
            assert chunk.obs_timestep == (7 * index) % 5
            assert np.array_equal(chunk.actions, expected(obs))


def test_a_second_server_on_the_port_says_so_and_the_first_serves_on(
    server: Server, robot: Robot
) -> None:
    with Program(
        "-m", "runtime.server", "-m", "python:tests.faults.crowd_policy:make",
        "--port", str(server.port),
    ) as second:  # fmt: skip
        second.expect(f"error: 127.0.0.1:{server.port} is taken")
        assert second.wait() == 2
    robot.check(20)


def test_an_upgrade_in_mid_episode(server: Server) -> None:
    """The old server is told to end, a new one takes the port; the client learns why and comes
    back when it wants to."""
    with Server("make", module="tests.faults.crowd_policy") as old:
        client = PolicyClient(old.address, timeout_s=10)
        client.infer(observation(1))
        old.signal(signal.SIGTERM)
        with pytest.raises(ServerLost, match="shutting down"):
            for index in range(1000):
                client.infer(observation(index))
                time.sleep(0.005)
        assert old.wait() == 0
        with Server("make", old.port, module="tests.faults.crowd_policy"):
            client.reconnect(timeout_s=30)
            assert client.infer(observation(5)).actions[0, 0] == 5 + 14
            client.close()


def test_a_stopped_client_costs_nobody_anything(server: Server, robot: Robot) -> None:
    """SIGSTOP in mid-conversation, for longer than a network's silence may last."""
    arguments = (server.address, "3", "100000", "shm")
    with Program("-m", "tests.faults.crowd_client", *arguments) as frozen:
        frozen.expect("^ready")
        time.sleep(0.3)
        frozen.signal(signal.SIGSTOP)
        robot.check(len(robot.latency_s) + 100)
        frozen.signal(signal.SIGCONT)
        robot.check(len(robot.latency_s) + 20)
    with dial(server.address, "", "") as dialer:
        deadline_s = time.monotonic() + 20

        def sessions() -> int:
            return len(dialer.send_admin_command("status")["sessions"])

        while sessions() > 1 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert sessions() == 1


def test_more_than_any_observation_is_hung_up_on(server: Server, robot: Robot) -> None:
    """A gigabyte from somebody without a session is never kept."""
    before = Holdings.of(server.pid)
    with dialled(server, GREETING, READY, long_frame(2**30)) as raw:
        raw.settimeout(10)
        with contextlib.suppress(OSError):
            for _ in range(64):
                raw.sendall(bytes(2**20))
        robot.check(20)
        assert Holdings.of(server.pid).rss_bytes - before.rss_bytes < MOST_BYTES
