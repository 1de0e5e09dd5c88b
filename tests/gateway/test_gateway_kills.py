"""``kill -9`` of a foreign client, of the gateway and of the policy server, in mid-request.

Each time: other clients go on, a new one works, and neither segments, descriptors nor threads are
left.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from runtime.gateway.renewing_gateway import WATCH_EVERY_S
from runtime.server import PolicyServer
from tests.faults.rig import Program, Server
from tests.gateway.groot_rig import GrootPeer, gateway, observation, wait_for
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import SlowPolicy
from tests.runtime.toy_policy import observation as own_observation

LONG = os.environ.get("METRONOME_LONG", "") not in ("", "0")
TIMES = 20 if LONG else 2
SLACK = 2
"""Descriptors that ZMQ's own threads may keep for later."""
CLIENT = """
import sys
from tests.gateway.groot_rig import GrootPeer, observation

peer = GrootPeer(int(sys.argv[1]))
for _ in range(2):
    peer.send("get_action", {"observation": observation(7)})
    print("asked", flush=True)
    peer.receive()
"""
pytestmark = [pytest.mark.long, pytest.mark.timeout(600 if LONG else 120)]


@contextlib.contextmanager
def gateway_process(server: PolicyServer, port: int = 0) -> Iterator[tuple[Program, int]]:
    address = f"{server.host}:{server.port}"
    command = ("-m", "runtime.gateway", "groot", "--server", address, "--port", str(port))
    with Program(*command) as program:
        match = program.expect(r"clients are served on 127\.0\.0\.1:(\d+)")
        yield program, int(match[1])


@pytest.fixture
def server() -> Iterator[PolicyServer]:
    with serving(SlowPolicy(), port=0) as made:
        yield made


def sessions(server: PolicyServer) -> int:
    return server.statistics().sessions


def descriptors(pid: int) -> list[str]:
    """What the process has open, by kind."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(path.readlink().name.partition(":")[0])
    return sorted(found)


def at_most(pid: int, before: list[str]) -> None:
    """The process returns to the descriptors that it had."""
    wait_for(lambda: len(descriptors(pid)) <= len(before) + SLACK)
    more = collections.Counter(descriptors(pid))
    more.subtract(before)
    assert more.total() <= SLACK, +more


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("metronome-*")}


def test_a_killed_client_leaves_nothing_in_the_gateway(server: PolicyServer) -> None:
    with gateway_process(server) as (program, port), GrootPeer(port) as stays:
        assert stays.act()[0]["action"][0, 0, 0] == 1
        time.sleep(2 * WATCH_EVERY_S)  # then the watch of the server's policy has its own threads
        before = descriptors(program.pid), threads(program.pid)
        for number in range(TIMES):
            with Program("-c", CLIENT, str(port)) as client:
                client.expect("asked")
                client.expect("asked")  # the first one's reply came
                assert wait_for(lambda: sessions(server) == 2)
                client.process.kill()
                assert stays.act()[0]["action"][0, 0, 0] == number + 2
            assert wait_for(lambda: sessions(server) == 1)
        assert wait_for(lambda: threads(program.pid) <= before[1])
        at_most(program.pid, before[0])


def test_a_killed_gateway_leaves_nothing_in_the_server(
    server: PolicyServer, caplog: pytest.LogCaptureFixture
) -> None:
    # pytest keeps records, these their exceptions, and these the dead sessions' memory.
    caplog.set_level(logging.ERROR, "runtime.server.request_handler")
    port, known = 0, segments()
    with connect(server) as ours:
        ours.infer(own_observation())
        mine, before = segments() - known, descriptors(os.getpid())
        for number in range(TIMES):
            with contextlib.ExitStack() as stack:
                program, port = stack.enter_context(gateway_process(server, port))
                peers = [stack.enter_context(GrootPeer(port)) for _ in range(2)]
                for peer in peers:
                    assert peer.act()[0]["action"][0, 0, 0] == 1
                for peer in peers:
                    peer.send("get_action", {"observation": observation()})
                time.sleep(0.05)
                program.process.kill()
                assert ours.infer(own_observation()).actions[0, 0] == number + 2
                assert wait_for(lambda: sessions(server) == 1)
                peers[0].socket.set(zmq.RCVTIMEO, 100)
                with pytest.raises(zmq.Again):  # a REQ socket is not told of a death
                    peers[0].receive()
        assert wait_for(lambda: segments() - known == mine)
        at_most(os.getpid(), before)


def test_a_killed_server_is_an_error_until_it_is_back() -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server("make_slow", module="tests.runtime.toy_policy"))
        address, known = server.address, segments()
        made = stack.enter_context(gateway(address, timeout_s=10.0))
        peers = [stack.enter_context(GrootPeer(made.port)) for _ in range(2)]
        counts = []
        for _ in range(TIMES):
            for peer in peers:
                assert wait_for(lambda peer=peer: "error" not in peer.act(), 20)
            for peer in peers:
                peer.send("get_action", {"observation": observation()})
            time.sleep(0.05)
            server.close()
            assert ["gone" in peer.receive()["error"] for peer in peers] == [True, True]
            assert peers[0].call("ping")["status"] == "ok"
            counts.append((len(descriptors(os.getpid())), threading.active_count()))
            port = int(address.rpartition(":")[2])
            server = stack.enter_context(
                Server("make_slow", port, module="tests.runtime.toy_policy")
            )
        assert max(counts[-1][0] - counts[0][0], 0) <= SLACK and counts[-1][1] == counts[0][1]
        assert wait_for(lambda: "error" not in peers[0].act(), 20)
        server.signal(15)
        server.wait()
    assert not segments() - known
